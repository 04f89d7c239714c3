"""Transfers over measured rates, worked out by hand and second by second."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_moe.network import NodeProfile
from flwr_moe.network.links.trace import RateTrace, TraceLinks

NODE, OTHER, STRANGER = NodeProfile(11, 0), NodeProfile(12, 3), NodeProfile(13, 7)
ROUNDING_S = 1e-6

# 1 byte a second, a gap, 2 bytes a second, and again 1.
ROWS = "time-s,rate-bps\n0,8\n10,0\n30,16\n40,8\n"


def write(tmp_path, text, **options):
    path = tmp_path / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return TraceLinks.from_csv(path, **options)


@pytest.mark.parametrize(
    ("n_bytes", "start", "once", "repeated"),
    [
        (0, 5.0, 5.0, 5.0),
        (5, 5.0, 10.0, 10.0),
        # The bit that just fits has left before the gap, one more has to wait for its end.
        (6, 5.0, 30.5, 30.5),
        (0, 10.0, 30.0, 30.0),
        (0, 29.0, 30.0, 30.0),
        (30, 0.0, 40.0, 40.0),
        (31, 0.0, 41.0, 41.0),
        # Round again: 10 bytes until 50 s, then nothing until 70 s.
        (10, 40.0, 50.0, 50.0),
        (12, 40.0, 52.0, 71.0),
        (60, 40.0, 100.0, 120.0),
        (90, 0.0, 100.0, 120.0),
        (91, 0.0, 101.0, 121.0),
        (4, 1000.0, 1004.0, 1004.0),
        (0, 1015.0, 1015.0, 1030.0),
        (10**6, math.inf, math.inf, math.inf),
    ],
)
def test_by_hand(tmp_path, n_bytes, start, once, repeated):
    for repeat, expected in ((False, once), (True, repeated)):
        links = write(tmp_path, ROWS, repeat=repeat, delay_s=0.5)
        for direction in ("uplink", "downlink", "peer"):
            assert links.transfer(NODE, direction, n_bytes, start) == pytest.approx(expected + 0.5)


@pytest.mark.parametrize(
    ("after", "once", "repeated"),
    [
        (0.0, 30.0, 30.0),
        (29.9, 30.0, 30.0),
        (30.0, math.inf, 70.0),
        (41.0, math.inf, 70.0),
        (70.0, math.inf, 110.0),
        (math.inf, math.inf, math.inf),
    ],
)
def test_next_contact(tmp_path, after, once, repeated):
    # At 40 s the trace goes round from one rate to another: nothing rises from 0 there.
    assert write(tmp_path, ROWS).next_contact(NODE, "uplink", after) == once
    assert write(tmp_path, ROWS, repeat=True).next_contact(NODE, "uplink", after) == repeated


def test_edges_of_a_trace():
    assert RateTrace([0.0], [8.0]).end(80.0, 3.0) == 13.0
    assert RateTrace([0.0], [8.0]).next_contact(3.0) == 3.0
    # Before the first row there is no link, after a last one of 0 neither.
    burst = RateTrace([5.0, 10.0], [8.0, 0.0])
    assert burst.end(0.0, 0.0) == 5.0 and burst.end(40.0, 0.0) == 10.0
    assert burst.end(41.0, 0.0) == burst.end(0.0, 10.0) == math.inf
    assert burst.next_contact(0.0) == 5.0 and burst.next_contact(5.0) == math.inf
    again = RateTrace([5.0, 10.0], [8.0, 0.0], repeat=True)
    assert again.end(40.0, 0.0) == 10.0 and again.end(80.0, 0.0) == 20.0
    assert again.end(48.0, 10.0) == 26.0
    assert [again.next_contact(t) for t in (4.0, 5.0, 12.0, 15.0)] == [5.0, 15.0, 15.0, 25.0]
    # A gap that ends where the trace goes round.
    tail = RateTrace([0.0, 5.0, 10.0], [8.0, 0.0, 9.0], repeat=True)
    assert [tail.next_contact(t) for t in (0.0, 7.0, 10.0)] == [10.0, 10.0, 20.0]
    assert tail.end(0.0, 7.0) == 10.0
    for repeat in (False, True):
        silent = RateTrace([0.0, 5.0], [0.0, 0.0], repeat)
        assert silent.end(0.0, 1.0) == silent.next_contact(1.0) == math.inf


def test_nodes_and_directions(tmp_path):
    links = write(
        tmp_path,
        "direction,node,rate-bps,time-s\r\n"
        "uplink,0,8,0\r\ndownlink,0,80,0\r\n\r\n"
        "uplink,3,16,0\r\ndownlink, 3 ,160,0\r\npeer,3,4,0\r\n",
    )
    expected = {(0, "uplink"): 100, (0, "downlink"): 10, (0, "peer"): 100}
    expected |= {(3, "uplink"): 50, (3, "downlink"): 5, (3, "peer"): 200}
    for node in (NODE, OTHER):
        for direction in ("uplink", "downlink", "peer"):
            seconds = links.transfer(node, direction, 100, 7.0) - 7.0
            assert seconds == pytest.approx(expected[node.partition_id, direction])
    assert links.nodes == {0, 3}
    for call in (links.transfer, lambda n, d, _, t: links.next_contact(n, d, t)):
        with pytest.raises(ValueError, match="node 7 has no trace, expected one of 0, 3"):
            call(STRANGER, "uplink", 0, 0.0)
        with pytest.raises(ValueError, match="direction is 'up', expected one of uplink, downlink"):
            call(NODE, "up", 0, 0.0)
    everyone = write(tmp_path, "\ufefftime-s,rate-bps,direction\n0,8,uplink\n0,16,downlink\n")
    assert everyone.transfer(STRANGER, "downlink", 100, 0.0) == 50.0
    assert everyone.transfer(STRANGER, "peer", 100, 0.0) == 100.0


def plain_end(times, rates, repeat, bits, start):
    """Go through the trace in steps of a second; all numbers are whole."""
    now = start
    while now < 5000:
        phase = now % times[-1] if repeat else now
        row = max((i for i, time in enumerate(times) if time <= phase), default=None)
        rate = 0 if row is None else rates[row]
        if rate > 0 and bits <= rate:
            return now + bits / rate
        bits -= rate
        now += 1
    return math.inf


@st.composite
def traces(draw):
    times = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=8)))
    rates = draw(st.lists(st.sampled_from([0, 8, 24, 40]), min_size=len(times), max_size=8))
    return times, rates[: len(times)], draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(0, 200), st.integers(0, 75))
def test_against_a_plain_loop(trace, start, n_bytes):
    times, rates, repeat = trace
    end = RateTrace(times, rates, repeat).end(8.0 * n_bytes, float(start))
    expected = plain_end(times, rates, repeat, 8 * n_bytes, start)
    assert end == (expected if math.isinf(expected) else pytest.approx(expected, abs=ROUNDING_S))


@settings(max_examples=150, deadline=None)
@given(
    traces(),
    st.tuples(st.floats(0, 500), st.floats(0, 500)),
    st.tuples(st.integers(0, 2000), st.integers(0, 2000)),
    st.floats(0.0, 1.0),
)
def test_later_or_more_never_arrives_earlier(trace, starts, sizes, share):
    links = TraceLinks({(None, None): RateTrace(*trace)})
    early = links.transfer(NODE, "uplink", min(sizes), min(starts))
    assert early >= min(starts)
    for n_bytes, start in ((max(sizes), min(starts)), (min(sizes), max(starts))):
        assert links.transfer(NODE, "uplink", n_bytes, start) >= early - ROUNDING_S
    # In two parts it is as fast.
    part = int(share * min(sizes))
    middle = links.transfer(NODE, "uplink", part, min(starts))
    if part < min(sizes) and math.isfinite(early):
        rest = links.transfer(NODE, "uplink", min(sizes) - part, middle)
        assert rest == pytest.approx(early, abs=ROUNDING_S)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no rows, expected a header"),
        ("time-s,rate-bps\n", "no rows, expected a header"),
        ("time-s,rate\n0,1\n", "line 1: no column 'rate-bps', expected time-s, rate-bps"),
        ("time-s,rate-bps,nodes\n0,1,1\n", "line 1: column 'nodes', expected time-s, rate-bps, n"),
        ("time-s,rate-bps,time-s\n0,1,1\n", "line 1: column 'time-s', .* each at most once"),
        ("time-s,rate-bps\n0,1\n1\n", "line 3: 1 values, expected 2"),
        ("time-s,rate-bps\n0,1\n1,fast\n", "line 3: rate-bps is 'fast', expected a number"),
        ("time-s,rate-bps\n0,1\n\n2,\n", "line 4: rate-bps is '', expected a number"),
        ("time-s,rate-bps\n0,nan\n", "line 2: rate-bps is nan, expected 0 or more"),
        ("time-s,rate-bps\n0,1\n1,-5\n", "line 3: rate-bps is -5, expected 0 or more"),
        ("time-s,rate-bps\n-1,1\n", "line 2: time-s is -1, expected 0 or more"),
        ("time-s,rate-bps\n0,1\n5,1\n5,2\n", "line 4: time-s is 5, expected more than 5"),
        ("time-s,rate-bps,node\n0,1,-1\n", "line 2: node is '-1', expected a whole number from 0"),
        (
            "time-s,rate-bps,direction\n0,1,up\n",
            "line 2: direction is 'up', expected one of uplink",
        ),
        ("time-s,rate-bps,direction\n0,1,uplink\n", "traces: no downlink, expected an uplink and"),
        (
            "time-s,rate-bps,node,direction\n0,1,4,downlink\n",
            "node 4: no uplink, expected an uplink and a downlink",
        ),
        (b"time-s,rate-bps\n0,1\n1,\xff\n", "line 3: not UTF-8"),
        (b'time-s,rate-bps\n0,"' + b"1" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_broken_files(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=r"trace.csv(, |: ).*" + complaint.removeprefix("line ")):
        write(tmp_path, text)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.csv: cannot be read \(No such file"):
        TraceLinks.from_csv(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match=r"trace.csv: a trace to repeat ends at second 0"):
        write(tmp_path, "time-s,rate-bps\n0,1\n", repeat=True)
    good = RateTrace([0.0], [1.0])
    with pytest.raises(ValueError, match="delay_s is -1"):
        TraceLinks({(None, None): good}, delay_s=-1.0)
    with pytest.raises(ValueError, match="traces is empty"):
        TraceLinks({})
    with pytest.raises(ValueError, match="traces: some name a node and some do not"):
        TraceLinks({(None, None): good, (1, None): good})
    with pytest.raises(ValueError, match="one rate a time"):
        RateTrace([0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="time-s is 0, expected more than 0"):
        RateTrace(np.zeros(2), np.ones(2))
