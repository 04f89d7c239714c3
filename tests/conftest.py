"""Settings for all tests: no telemetry, one thread."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch

torch.set_num_threads(1)
