"""How many threads a computation takes, so that what it gives does not depend on the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, in torch and in the BLAS of numpy and scipy.

    Sums that several threads share are rounded otherwise for every number of them: with one, a
    result depends neither on ``OMP_NUM_THREADS`` nor on the number of cores. Libraries that are
    loaded meanwhile, and processes that are started, keep to one thread too.
    """
    threads = torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def one_thread_if_simulated() -> None:
    """Let a simulated node's process compute on one thread; a deployed node takes all it has.

    A node of Flower's simulation runs in a process of Ray, which no deployed node does. Nodes that
    are simulated in one process keep to the threads of that process, see :func:`one_thread`.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        threadpool_limits(1)
