"""Settings of every test."""

import os

# The tests' networks are tiny: more threads only wait for each other, 20 times as long on a busy machine. Set before
# the first import of numpy, whose linear algebra reads it then; the ranks that torchrun starts have one thread, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
