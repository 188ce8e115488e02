"""Weighted sums of stored weights: exact, whatever the stretches, threads, groups and dtypes, in bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from edm2kit.ema import weighted_sums as averaging
from edm2kit.ema.rebuild import plan_outputs, reconstruct
from edm2kit.snapshots.file_format import read_tensors
from edm2kit.snapshots.loading import Weights, open_sources
from tests.support import ROOT, runs
from tests.support.fakes import tiny_snapshot
from tests.support.runs import Walk

WEIGHT = "unet.out_conv.weight"


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    rows = [torch.cat([state[name].double().flatten() for name in b]) for state in (a, b)]
    return float((rows[0] - rows[1]).norm() / rows[1].norm())


@pytest.fixture(scope="module")
def walk() -> Walk:
    return runs.walk(tracked=())


def exact(inputs: list[Weights], coefficients: np.ndarray, name: str) -> torch.Tensor:
    pairs = zip(coefficients, inputs, strict=True)
    return sum(float(coefficient) * weights.tensors[name].double() for coefficient, weights in pairs)


def test_sums_in_float32_equal_those_in_float64(walk):
    [output] = plan_outputs(walk.snapshots, [0.005])
    assert np.abs(output.coefficients).sum() > 40  # of alternating sign: they sum to 1
    state, _ = reconstruct(walk.snapshots, 0.005)
    truth = {name: exact(walk.snapshots, output.coefficients, name) for name in state}
    assert relative(state, truth) < 2e-6


def test_stretches_threads_and_groups_of_inputs_do_not_matter(walk, monkeypatch):
    whole, _ = reconstruct(walk.snapshots, 0.07)
    monkeypatch.setattr(averaging, "_INPUTS_AT_ONCE", 3)
    monkeypatch.setattr(averaging, "_SCRATCH_BYTES", (6 * 1 + 4 * 3) * 350)
    monkeypatch.setattr(averaging, "_BLOCK", 100)
    assert averaging._stretch_length(1, 4) == 300
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        state, _ = reconstruct(walk.snapshots, 0.07)
        assert torch.get_num_threads() == 3  # as the caller had it
    finally:
        torch.set_num_threads(threads)
    assert relative(state, whole) < 2e-7


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("float16", "bfloat16", "float32")])
def test_inputs_of_several_dtypes_lose_nothing(walk, tmp_path, dtypes):
    """In files and, where float32 is among them, in memory."""
    inputs = [
        weights
        if k % 4 == 0 and "float32" in dtypes
        else open_sources([runs.write(tmp_path / str(k), [weights], dtype=dtypes[k % len(dtypes)])])[0]
        for k, weights in enumerate(walk.snapshots)
    ]
    [output] = plan_outputs(inputs, [0.07])
    state, _ = reconstruct(inputs, 0.07)
    values = [dict(read_tensors(w.path)) if w.path else w.tensors for w in inputs]
    for name in (WEIGHT, "unet.out_gain"):
        truth = sum(float(c) * v[name].double() for c, v in zip(output.coefficients, values, strict=True))
        assert torch.allclose(state[name].double(), truth, rtol=1e-4, atol=1e-6)


def test_files_are_read_the_same_on_systems_without_positioned_reads(walk, tmp_path, monkeypatch):
    """As on Windows: two threads share a file's position."""
    inputs = open_sources([runs.write(tmp_path, walk.snapshots)])
    whole, _ = reconstruct(inputs, 0.07)
    monkeypatch.setattr(averaging, "_SCRATCH_BYTES", (6 * 1 + 4 * 48) * 100)
    monkeypatch.delattr("os.preadv")
    state, _ = reconstruct(inputs, 0.07)
    assert relative(state, whole) < 2e-7


def test_a_tensor_in_memory_may_stand_among_those_of_a_file(walk, tmp_path):
    inputs = open_sources([runs.write(tmp_path, walk.snapshots)])
    expected, _ = reconstruct(inputs, 0.07)
    mixed = [runs.with_tensors(w, **{WEIGHT: dict(read_tensors(w.path))[WEIGHT]}) for w in inputs]
    state, _ = reconstruct(mixed, 0.07)
    assert torch.equal(state[WEIGHT], expected[WEIGHT])


@pytest.mark.parametrize("itemsize", [2, 4])
def test_memory_knows_no_number_of_outputs(itemsize):
    for count in (1, 8, 31, 128, 1000):
        length = averaging._stretch_length(count, itemsize)
        scratch = averaging._Scratch(count, 48, length, itemsize)
        assert scratch.sums.shape[1] - averaging._PADDING == scratch.rounded.shape[1] == length > 1000
        held = sum(part.nbytes for part in (scratch.stored, scratch.sums, scratch.rounded))
        assert averaging._SCRATCH_BYTES / 2 < held < averaging._SCRATCH_BYTES * 1.05
        assert scratch.rows.nbytes <= 48 * averaging._BLOCK * 4


_FEW_FILES = """
import resource, sys
from edm2kit.snapshots.loading import WeightReader, open_weights

weights = open_weights(sys.argv[1])
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
try:
    readers = [WeightReader(weights) for _ in range(60)]
    print(len(readers), "open")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(("hard", "said"), [(80, "60 open"), (40, "may open 40 files, which is not enough")])
def test_more_files_than_the_soft_limit_are_opened_and_more_than_the_hard_one_named(tmp_path, hard, said):
    tiny_snapshot(tmp_path / "a.safetensors")
    command = [sys.executable, "-c", _FEW_FILES, str(tmp_path / "a.safetensors"), str(hard)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said in done.stdout
