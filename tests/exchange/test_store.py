import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from flwr_moe.exchange.body import BadBody, BadName, pack, unpack
from flwr_moe.exchange.store import StoreFull, TensorStore


def blob(value: float, numbers: int = 256) -> dict[str, torch.Tensor]:
    return {"x": torch.full((numbers,), float(value))}


SIZE = len(pack(blob(0)))


def value(store: TensorStore, name: str) -> float:
    tensor = store.get(name)["x"]
    assert (tensor == tensor[0]).all()
    return tensor[0].item()


@pytest.fixture(params=["memory", "disk only", "both"])
def store(request, tmp_path):
    if request.param == "memory":
        return TensorStore()
    return TensorStore(
        tmp_path / "new" / "folder", ram_bytes=0 if request.param == "disk only" else 2**20
    )


def test_what_was_put_comes_back(store):
    tensors = {"w": torch.randn(3, 4).bfloat16(), "n": torch.tensor(7), "none": torch.empty(0, 2)}
    body = pack(tensors, {"version": "2"})
    assert store.put("layer.3-w_1", tensors, {"version": "2"}) == len(body)
    got = store.get("layer.3-w_1")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert store.metadata("layer.3-w_1") == {"version": "2"}
    assert store.body("layer.3-w_1") == body and store.body("layer.3-w_1").readonly
    assert store.size("layer.3-w_1") == len(body)


def test_names(store):
    for name in ("b.2", "a.1", "b.10"):
        store.put_body(name, pack(blob(1)))
    assert store.names() == ["a.1", "b.10", "b.2"] and store.names("b.") == ["b.10", "b.2"]
    assert "a.1" in store and "a" not in store and len(store) == 3
    store.delete("a.1")
    assert "a.1" not in store and store.names() == ["b.10", "b.2"]
    for lookup in (store.get, store.metadata, store.body, store.size, store.delete):
        with pytest.raises(KeyError, match=r"'a\.1' is not in the store"):
            lookup("a.1")


def test_bad_input_changes_nothing(store):
    store.put("a", blob(1))
    with pytest.raises(BadName):
        store.put("../a", blob(2))
    with pytest.raises(BadName):
        store.put_body(".a", pack(blob(2)))
    with pytest.raises(BadBody):
        store.put_body("a", pack(blob(2))[:-1])
    assert value(store, "a") == 1 and store.names() == ["a"]


def test_tensors_and_bodies_are_no_door_into_the_store(store):
    body = bytearray(pack(blob(1)))
    store.put_body("a", body)
    body[-4:] = b"\0\0\0\0"
    store.get("a")["x"].fill_(5)
    assert value(store, "a") == 1


def test_a_replaced_or_deleted_body_stays_valid_for_who_holds_it(store):
    store.put("a", blob(1))
    held = store.body("a")
    store.put("a", blob(2, numbers=64))
    assert value(store, "a") == 2 and unpack(held)[0]["x"].eq(1).all()
    held = store.body("a")
    store.delete("a")
    assert unpack(held)[0]["x"].eq(2).all()


def test_bodies_on_disk_are_memory_mapped_and_private(tmp_path):
    store = TensorStore(tmp_path, ram_bytes=0)
    store.put("a", blob(1))
    unpack(store.body("a"))[0]["x"].fill_(9)
    assert type(store.body("a").obj).__name__ == "mmap" and value(store, "a") == 1


def test_close(store):
    store.put("a", blob(1))
    store.close()
    store.close()
    for use in (lambda: store.get("a"), lambda: store.put("a", blob(1)), store.names):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_least_recently_used_leaves_memory_first(tmp_path):
    store = TensorStore(tmp_path, ram_bytes=2 * SIZE)
    store.put("a", blob(1))
    store.put("b", blob(2))
    value(store, "a")  # hit; b is now the older one
    store.put("c", blob(3))  # b leaves
    assert store.stats() == {
        "ram_bytes": 2 * SIZE,
        "disk_bytes": 3 * SIZE,
        "hits": 1,
        "misses": 0,
        "evicted": 1,
        "damaged": 0,
    }
    value(store, "a"), value(store, "c")  # hits
    assert store.stats()["hits"] == 3
    assert value(store, "b") == 2  # miss; comes back, a leaves
    value(store, "c"), value(store, "b")  # hits
    assert value(store, "a") == 1  # miss; c leaves
    stats = store.stats()
    assert (stats["hits"], stats["misses"], stats["evicted"]) == (5, 2, 3)
    store.put("large", blob(4, numbers=1000))  # more than all the memory: disk alone
    assert store.stats()["ram_bytes"] == 2 * SIZE and value(store, "large") == 4


def test_memory_alone_refuses_what_does_not_fit():
    store = TensorStore(ram_bytes=2 * SIZE)
    store.put("a", blob(1))
    store.put("b", blob(2))
    store.put("b", blob(3))  # a replacement needs no more room
    for name, numbers in (("c", 256), ("b", 257)):
        with pytest.raises(
            StoreFull, match=f"'{name}' would bring memory to .* at most {2 * SIZE}"
        ):
            store.put(name, blob(4, numbers))
    assert value(store, "a") == 1 and value(store, "b") == 3 and store.names() == ["a", "b"]


def test_disk_budget(tmp_path):
    store = TensorStore(tmp_path, disk_bytes=2 * SIZE)
    store.put("a", blob(1))
    store.put("b", blob(2))
    store.put("b", blob(3))
    with pytest.raises(StoreFull, match="'c' would bring the disk to"):
        store.put("c", blob(4))
    assert len(list(tmp_path.iterdir())) == 2 and store.names() == ["a", "b"]
    store.delete("a")
    store.put("c", blob(4))
    assert store.stats()["disk_bytes"] == 2 * SIZE


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"ram_bytes": -1}, "ram_bytes is -1, expected 0 or more"),
        ({"disk_bytes": 5}, "disk_bytes is 5 without a folder"),
    ],
)
def test_bad_budgets(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        TensorStore(**arguments)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"folder .*file/inner cannot be used: Not a directory"):
        TensorStore(tmp_path / "file" / "inner")


def test_disk_full_leaves_no_trace(tmp_path):
    # A limit on the size of files fails a write midway, as a full disk does.
    script = """
import resource, sys, torch
from flwr_moe.exchange.store import StoreFull, TensorStore
store = TensorStore(sys.argv[1])
store.put("a", {"x": torch.ones(256)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.put("a", {"x": torch.zeros(100_000)})
except StoreFull as err:
    print(err, store.get("a")["x"].sum().item(), store.stats()["disk_bytes"])
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert (
        f"'a' (400072 bytes) cannot be written to {tmp_path}: File too large 256.0" in done.stdout
    )
    assert len(list(tmp_path.iterdir())) == 1 and value(TensorStore(tmp_path), "a") == 1


def test_reopening_finds_the_last_of_everything(tmp_path):
    store = TensorStore(tmp_path)
    for number in range(12):  # version 10 is newer than version 9
        store.put("a", blob(number))
    store.put("gone", blob(1))
    store.put("b", blob(2), {"k": "v"})
    store.delete("gone")
    store.close()
    again = TensorStore(tmp_path)
    assert again.names() == ["a", "b"] and value(again, "a") == 11
    assert again.metadata("b") == {"k": "v"} and again.stats()["disk_bytes"] == 2 * SIZE + 24
    again.put("a", blob(12))
    assert value(TensorStore(tmp_path), "a") == 12


def test_of_two_versions_a_crash_left_the_newer_is_used(tmp_path):
    store = TensorStore(tmp_path)
    store.put("a", blob(1))
    old = next(tmp_path.iterdir())
    kept = old.read_bytes()
    store.put("a", blob(2))
    old.write_bytes(kept)
    assert value(TensorStore(tmp_path), "a") == 2 and not old.exists()


def test_damaged_files_are_counted_and_the_rest_is_used(tmp_path):
    store = TensorStore(tmp_path)
    for name in ("cut", "altered", "shape", "empty", "fine"):
        store.put(name, {"x": torch.ones(16, 16)})
    store.close()
    files = {path.name.split("~")[0]: path for path in tmp_path.iterdir()}
    files["cut"].write_bytes(files["cut"].read_bytes()[:-1])
    files["empty"].write_bytes(b"")
    whole = files["altered"].read_bytes()
    files["altered"].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    files["shape"].write_bytes(whole.replace(b"[16,16]", b"[8, 32]"))
    again = TensorStore(tmp_path, ram_bytes=0)
    assert again.stats()["damaged"] == 2 and again.names() == ["altered", "fine", "shape"]
    for number, name in enumerate(("altered", "shape"), start=3):
        with pytest.raises(KeyError, match=f"'{name}' is damaged"):
            again.body(name)
        assert name not in again and again.stats()["damaged"] == number
    assert torch.equal(again.get("fine")["x"], torch.ones(16, 16))
    assert again.stats()["disk_bytes"] == files["fine"].stat().st_size
    again.put("altered", blob(5))
    last = TensorStore(tmp_path)
    assert last.names() == ["altered", "fine"] and value(last, "altered") == 5


def test_a_file_damaged_or_removed_while_the_store_is_open(tmp_path):
    store = TensorStore(tmp_path, ram_bytes=0)
    for name in ("cut", "gone"):
        store.put(name, blob(1))
        value(store, name)
    for path in tmp_path.iterdir():
        path.unlink() if path.name.startswith("gone") else os.truncate(path, 30)
    for name in ("cut", "gone"):
        with pytest.raises(KeyError, match=f"'{name}' is"):
            store.get(name)
    assert store.stats()["damaged"] == 2 and store.names() == []


def test_a_file_altered_between_put_and_first_read(tmp_path):
    store = TensorStore(tmp_path, ram_bytes=0)
    store.put("a", blob(1))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")
    with pytest.raises(KeyError, match="'a' is damaged"):
        store.get("a")


def test_other_files_are_left_alone_and_temporary_ones_swept(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / ".put-abc.tmp").write_bytes(b"left over")
    store = TensorStore(tmp_path)
    assert len(store) == 0 and store.stats()["damaged"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_killed_in_the_middle_of_a_put(tmp_path):
    script = """
import os, sys, torch
from flwr_moe.exchange.store import TensorStore
store = TensorStore(sys.argv[1])
store.put("a", {"x": torch.full((256,), 1.0)})
os.fsync = lambda descriptor: (print("half way", flush=True), sys.stdin.read())
store.put("a", {"x": torch.full((256,), 2.0)})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"half way\n"
    assert len(list(tmp_path.iterdir())) == 2
    assert value(TensorStore(tmp_path), "a") == 1
    assert len(list(tmp_path.iterdir())) == 2  # its writer lives, so the file is not swept
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert value(TensorStore(tmp_path), "a") == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_see_no_torn_bodies(tmp_path):
    store = TensorStore(tmp_path, ram_bytes=3 * 4_100)
    names = [f"n{number}" for number in range(6)]
    for name in names:
        store.put(name, blob(0, 1_000))
    failures: list[BaseException] = []
    stop = time.monotonic() + 1.0

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            while time.monotonic() < stop:
                name = generator.choice(names)
                if seed % 2:
                    store.put(name, blob(generator.randrange(100), 1_000))
                else:
                    value(store, name)
                    assert unpack(store.body(name))[0]["x"].unique().numel() == 1
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats()
    size = store.size("n0")
    assert failures == [] and stats["damaged"] == 0
    assert stats["disk_bytes"] == 6 * size == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert stats["ram_bytes"] <= 3 * 4_100
    assert [value(TensorStore(tmp_path), name) for name in names] == [
        value(store, n) for n in names
    ]


def test_random_reads_stay_in_the_memory_budget(tmp_path):
    # 40 MB on disk, 8 MB in memory; anonymous memory of the process, as the kernel counts it.
    script = """
import random, sys, torch
from flwr_moe.exchange.store import TensorStore
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
store = TensorStore(sys.argv[1], ram_bytes=8_000_000)
for number in range(40):
    store.put(f"n{number}", {"x": torch.full((250_000,), float(number))})
store.close()
store = TensorStore(sys.argv[1], ram_bytes=8_000_000)
before, most, generator = resident(), 0, random.Random(0)
for _ in range(300):
    number = generator.randrange(40)
    assert store.get(f"n{number}")["x"][-1] == number
    most = max(most, resident())
print(most - before, store.stats()["ram_bytes"])
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the kernel does not say how much memory a process has")
    # Freed bodies go back to the kernel at once, instead of when the allocator sees fit.
    kernel = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env=kernel,
    )
    grown, held = map(int, done.stdout.split())
    assert 6_000_000 < held <= 8_000_000
    assert grown <= 8_000_000 + 3 * 1_000_100  # the budget, a body on its way in, the reader's copy
