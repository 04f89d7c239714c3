"""Small made-up runs."""

import numpy as np

from flwr_moe.report import HistoryRow, RunRecord


def fake_run(system: str = "ems-fl", seed: int = 0, lift: float = 0.0) -> RunRecord:
    """Accuracies 0.5, 0.75, 0.625 (plus `lift`) at 0, 1 and 2 hours; one pass, one upload."""
    accuracies = (0.5, 0.75, 0.625)
    history = [
        HistoryRow(system, seed, 3600.0 * i, i, value + lift, 1.0 - value, 1000 * i, 4000 * i, 0)
        for i, value in enumerate(accuracies)
    ]
    summary = {
        "device-steps": 300,
        "device-seconds": 5400.0,
        "wall-s": 1.5,
        "captured-mass": 0.9,
        "gate-accuracy": 0.95,
        "updates": 4,
        "uplink-bytes-per-update": 500.0,
        "events": {"lost": 1, "late": 0, "rejected": 2},
        "bytes-by-kind": {
            "uplink": {"expert": 1500, "gate": 500},
            "downlink": {"shared": 6000, "expert": 2000},
        },
    }
    return RunRecord(
        system,
        seed,
        history,
        summary,
        passes=[{"cluster": 0, "rise-s": 600.0, "set-s": 900.0}],
        uploads=[{"cluster": 0, "time-s": 700.0}],
        weights={"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scale": np.float32(2.5)},
    )
