"""A blob of 50 MB fetched from the exchange over loopback, and calls of 2 MB.

The server, who stores the blob, who fetches it and who calls are fresh processes, one after the
other against the same server. Prints one JSON line; `ratio` is the median rate of fetching (body
checked against its checksum and unpacked) over the bar of 300 MB/s. `peaks` say how far the
resident memory of each process rose above where it stood before the blob, in sizes of the blob;
what the process itself holds of it counts, and none may exceed 2.5. `call_ms` is the median time
of a call that answers with the 2 MB it was given.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

BAR_MBPS, BAR_PEAK = 300.0, 2.5
BLOB_BYTES, CALL_BYTES = 50_000_000, 2_000_000
FETCHES, CALLS = 9, 101
TOKEN = "benchmark"


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def say(**measured: object) -> None:
    print(json.dumps(measured), flush=True)


def serve() -> None:
    """Serve until standard input ends; then tell the memory."""
    from flwr_moe.exchange import ExchangeServer, TensorStore

    store = TensorStore(ram_bytes=4 * BLOB_BYTES)
    with ExchangeServer(store, TOKEN, {"echo": lambda tensors, words: (tensors, words)}) as server:
        say(url=server.url)
        sys.stdin.readline()
        before = peak_bytes()
        say(ready=True)
        sys.stdin.readline()
    say(peak=(peak_bytes() - before) / BLOB_BYTES)


def client(role: str, url: str) -> None:
    """Store, fetch or call."""
    import torch

    from flwr_moe.exchange import ExchangeClient

    def numbers(n_bytes: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"weights": torch.randn(n_bytes // 4, generator=generator)}

    with ExchangeClient(url, TOKEN) as exchange:
        exchange.put("warm-up", numbers(1000))
        exchange.get("warm-up")
        before, times = peak_bytes(), []
        if role == "put":
            blob = numbers(BLOB_BYTES)
            begun = time.perf_counter()
            exchange.put("blob", blob)
            times.append(time.perf_counter() - begun)
        for _ in range(FETCHES if role == "get" else 0):
            begun = time.perf_counter()
            fetched = exchange.get("blob")
            times.append(time.perf_counter() - begun)
            if fetched["weights"].numel() != BLOB_BYTES // 4:
                raise RuntimeError("fetched other than what was stored")
            del fetched
        question = numbers(CALL_BYTES)
        for _ in range(CALLS if role == "call" else 0):
            begun = time.perf_counter()
            answer, _ = exchange.call("echo", question)
            times.append(time.perf_counter() - begun)
        if role == "call" and not torch.equal(answer["weights"], question["weights"]):
            raise RuntimeError("answered other than what was asked")
        peak = (peak_bytes() - before) / BLOB_BYTES
        if role == "get" and not torch.equal(
            exchange.get("blob")["weights"], numbers(BLOB_BYTES)["weights"]
        ):
            raise RuntimeError("fetched other than what was stored")
    say(
        quartiles_s=statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times,
        peak=peak,
    )


def main() -> None:
    python = [sys.executable, __file__]
    server = subprocess.Popen(
        [*python, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def heard() -> dict:
        return json.loads(server.stdout.readline())

    def told(role: str) -> dict:
        command = [*python, role, url]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    url = heard()["url"]
    told("warm-up")
    print(file=server.stdin, flush=True)
    heard()
    put, get, call = told("put"), told("get"), told("call")
    server.stdin.close()
    peaks = {"server": heard()["peak"], "put": put["peak"], "get": get["peak"]}
    server.wait()
    rates = sorted(BLOB_BYTES / 1e6 / seconds for seconds in get["quartiles_s"])
    ratio = round(rates[1] / BAR_MBPS, 2)
    summary = {
        "benchmark": "exchange",
        "ratio": ratio,
        "bars": {"get_mbps": BAR_MBPS, "peaks": BAR_PEAK},
        "passed": ratio >= 1 and max(peaks.values()) < BAR_PEAK,
        "get_mbps_quartiles": [round(rate) for rate in rates],
        "put_mbps": round(BLOB_BYTES / 1e6 / put["quartiles_s"][1]),
        "peaks": {role: round(peak, 2) for role, peak in peaks.items()},
        "call_ms_quartiles": [round(1000 * seconds, 2) for seconds in call["quartiles_s"]],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    elif sys.argv[1:]:
        client(*sys.argv[1:])
    else:
        main()
