"""A run resumes with another number of processes: the same images, noise and checkpoints' meaning, up to rounding."""

from pathlib import Path

import pytest
import torch

from edm2kit.training.checkpoint import list_checkpoints
from tests.support import tiny

pytestmark = pytest.mark.slow


def train(folder: Path, run: str, ranks: int, *more: object) -> None:
    words = ["--config", folder / "tiny.yaml", "--data", folder / "data", "--outdir", folder / run, "--samples", 0]
    done = tiny.run("train.py", *words, "--device", "cpu", *more, ranks=ranks)
    assert done.returncode == 0, done.stderr


def weights(run: Path) -> torch.Tensor:
    state = torch.load(list_checkpoints(run)[-1], weights_only=True)["net"]
    return torch.cat([value.flatten() for value in state.values()])


@pytest.mark.parametrize("shard", [False, True])
def test_one_and_two_processes_take_over_from_each_other(tmp_path, shard):
    tiny.make_dataset(tmp_path / "data")
    tiny.write_config(tmp_path / "tiny.yaml", shard=shard)
    train(tmp_path, "one", 1)
    for run, first, second in (("grown", 1, 2), ("shrunk", 2, 1)):
        train(tmp_path, run, first, "--duration", 80)
        train(tmp_path, run, second)
    train(tmp_path, "two", 2)
    one = weights(tmp_path / "one")
    for run in ("two", "grown", "shrunk"):
        difference = ((weights(tmp_path / run) - one).norm() / one.norm()).item()
        print(f"{run}, shard {shard}: relative difference {difference:.1e}")
        assert difference <= 1e-6
    # each resumed run repeats to the last bit
    train(tmp_path, "again", 1, "--duration", 80)
    train(tmp_path, "again", 2)
    assert torch.equal(weights(tmp_path / "again"), weights(tmp_path / "grown"))
