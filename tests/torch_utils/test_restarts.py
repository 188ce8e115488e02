"""torchrun --max-restarts: after a rank has died, all start again, meet, and continue where another rank saved."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edm2kit.training.checkpoint import list_checkpoints
from tests.support import ROOT, tiny

pytestmark = pytest.mark.slow

DYING = """
import os, signal, sys
from edm2kit.cli import train
from edm2kit.training.loop import Trainer
step = Trainer.step
def step_then_die(self, *arguments):
    step(self, *arguments)
    if self.nimg == 96 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.step = step_then_die
train.main(sys.argv[1:])
"""


def test_a_killed_rank_costs_nothing_that_another_one_holds(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    data, config = tiny.make_dataset(tmp_path / "data"), tiny.write_config(tmp_path / "tiny.yaml")
    words = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2", "--nproc-per-node=2"]
    line = [*launch, tmp_path / "dying.py", *words, "--outdir", tmp_path / "killed"]
    environment = {**tiny.environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(w) for w in line], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "Resuming at 96 images" in done.stdout
    assert "Finished at 160 images" in done.stdout
    straight = tiny.run("train.py", *words, "--outdir", tmp_path / "straight", ranks=2)
    assert straight.returncode == 0, straight.stderr
    a, b = (torch.load(list_checkpoints(tmp_path / name)[-1], weights_only=True) for name in ("killed", "straight"))
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])
