"""Settings of every test."""

import os

import torch

# the tests' networks are tiny: more threads only wait for each other, 20 times as long on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
