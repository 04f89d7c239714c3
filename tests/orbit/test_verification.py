"""SGP4's published verification cases (Vallado and others, AIAA 2006-6753) through our loader.

The cases and their printed states come with the sgp4 package.
"""

from importlib.resources import files

import pytest

from flwr_moe.orbit import load_elements
from flwr_moe.orbit.satellite import catalogue_number

# The states are printed with 8 and 9 decimals; compilers differ in the last but one.
PRINTED_KM = 1e-6
PRINTED_KM_S = 1e-8
# Cases that are there to fail: their lines carry wrong checksums.
FALSE_CHECKSUMS = {"33333", "33334", "33335"}


def verification_lines():
    """Element lines in pairs, without the propagation spans behind column 69."""
    text = files("sgp4").joinpath("SGP4-VER.TLE").read_text("ascii")
    lines = [line[:69] for line in text.splitlines() if not line.startswith("#")]
    return list(zip(lines[::2], lines[1::2], strict=True))


def printed_states():
    """Per case its number and rows of minutes, km and km/s."""
    cases = []
    for line in files("sgp4").joinpath("tcppver.out").read_text("ascii").splitlines():
        fields = line.split()
        if fields[1] == "xx":
            cases.append((int(fields[0]), []))
        else:
            cases[-1][1].append([float(field) for field in fields[:7]])
    return cases


def test_all_cases_propagate_to_the_printed_states(tmp_path):
    path = tmp_path / "verification.tle"
    good = [pair for pair in verification_lines() if pair[0][2:7] not in FALSE_CHECKSUMS]
    path.write_text("".join(f"{first}\n{second}\n" for first, second in good))
    with pytest.warns(UserWarning, match="20413 comes more than once"):
        satellites = load_elements(path)
    cases = [case for case in printed_states() if str(case[0]) not in FALSE_CHECKSUMS]
    assert [catalogue_number(s) for s in satellites] == [number for number, _ in cases]
    for satellite, (_, rows) in zip(satellites, cases, strict=True):
        for minutes, *state in rows:
            error, position_km, velocity_km_s = satellite.model.sgp4_tsince(minutes)
            assert error == 0
            assert position_km == pytest.approx(state[:3], abs=PRINTED_KM)
            assert velocity_km_s == pytest.approx(state[3:], abs=PRINTED_KM_S)
    assert (len(cases), sum(len(rows) for _, rows in cases)) == (30, 588)


@pytest.mark.parametrize("number", sorted(FALSE_CHECKSUMS))
def test_cases_with_false_checksums_are_refused(number, tmp_path):
    (pair,) = (pair for pair in verification_lines() if pair[0][2:7] == number)
    path = tmp_path / "false.tle"
    path.write_text("\n".join(pair))
    with pytest.raises(ValueError, match="line 1: the checksum is"):
        load_elements(path)
