"""Settings of every test."""

import functools
import os

# The tests' networks are tiny: more threads only wait for each other, 20 times as long on a busy machine. Set before
# the first import of numpy, whose linear algebra reads it then; the ranks that torchrun starts have one thread, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The suite is the same on every machine: only tests/gpu uses a GPU, if asked to (see tests/gpu/conftest.py).
if os.environ.get("EDM2KIT_GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(1)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names of functions in the names of tests: an address in memory would differ between parallel processes."""
    if isinstance(val, functools.partial):
        settings = [str(a) for a in val.args] + [f"{name}={value}" for name, value in val.keywords.items()]
        return f"{val.func.__name__}({', '.join(settings)})"
    return getattr(val, "__name__", None) if callable(val) else None
