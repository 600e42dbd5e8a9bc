"""The surroundings of processes that run model code."""

from __future__ import annotations

import os

ENVIRON = {  # what is set already stays as it is
    "GOMP_SPINCOUNT": "10000",  # a moment: who spins longer at a barrier may rob whom it waits for
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # weights on huge pages: products are a tenth faster
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU doesn't open it: a fork may follow
}


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model_environ() -> dict[str, str]:
    return {**ENVIRON, **os.environ, "OPENBLAS_NUM_THREADS": "1"}
