"""An error of one rank, or its death, costs at most the step under way: the others, or it, still save the state."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.torch_utils import dist
from edm2kit.training import checkpoint
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.stop import save_after
from tests.support import ROOT, tiny

# one rank runs out of memory, or is killed, in the step after 96 images; the last checkpoint was at 64
_LOSING = """
import os, signal, sys
from edm2kit.cli import train
from edm2kit.torch_utils import dist
from edm2kit.training import loop
how, rank = sys.argv[1], int(sys.argv[2])
def fail():
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
accumulate = loop.Trainer._accumulate
def accumulate_or_fail(self, batch):
    if self.nimg == 96 and dist.rank() in (rank, dist.rank() if how == "all" else rank):
        fail()
    accumulate(self, batch)
if how == "half":
    update = loop.PowerFunctionEMA.update
    def update_or_fail(self, nimg, batch_size):
        if nimg == 112 and dist.rank() == rank:
            fail()
        update(self, nimg, batch_size)
    loop.PowerFunctionEMA.update = update_or_fail
else:
    loop.Trainer._accumulate = accumulate_or_fail
train.main(sys.argv[3:])
"""


def options(folder: Path, run: str) -> list[str]:
    words = ["--config", folder / "tiny.yaml", "--data", folder / "data", "--samples", 0, "--device", "cpu"]
    return [*map(str, words), "--outdir", str(folder / run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.make_dataset(folder / "data")
    tiny.write_config(folder / "tiny.yaml")
    (folder / "losing.py").write_text(_LOSING)
    return folder


def lose(folder: Path, run: str, how: str, rank: int, *more: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*launch, str(folder / "losing.py"), how, str(rank), *options(folder, run), *more]
    environment = {**tiny.environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode != 0
    return done


def state(run: Path) -> dict[str, torch.Tensor]:
    found = torch.load(list_checkpoints(run)[-1], weights_only=True)
    assert found["progress"]["nimg"] == 160
    return dict(checkpoint.named_tensors({part: found[part] for part in ("net", "optimizer", "ema")}))


def test_a_rank_without_memory_saves_the_state_that_it_shares_with_the_others(folder):
    done = lose(folder, "lost", "memory", 1)
    assert "State saved at 96 images. Run the same command to resume." in done.stdout
    assert "Error: out of memory (DefaultCPUAllocator: can't allocate memory" in done.stderr
    assert [path.name for path in list_checkpoints(folder / "lost")] == [
        "training-state-0000000064.pt",
        "training-state-0000000096.pt",
    ]
    for run in ("lost", "straight"):  # in one process
        resumed = CliRunner().invoke(train.main, options(folder, run))
        assert resumed.exit_code == 0, resumed.output
        assert ("Resuming at 96 images" in resumed.output) == (run == "lost")
    theirs = state(folder / "straight")
    for name, value in state(folder / "lost").items():
        # two ranks add the gradients of a batch in another order than one
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


_LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:45678"


@pytest.mark.parametrize(
    ("reason", "device", "saved"), [("no memory", "cuda", True), (_LOST, "cpu", True), (_LOST, "cuda", False)]
)
def test_a_gpu_whose_last_step_may_have_used_half_of_the_gradients_is_not_saved(
    tmp_path, monkeypatch, capsys, reason, device, saved
):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    net = torch.nn.Linear(2, 2)
    trainer = SimpleNamespace(
        nimg=16,
        is_whole=True,
        config=SimpleNamespace(checkpoint_every_nimg=1, keep_checkpoints=2),
        device=torch.device(device),
        net=net,
        optimizer=torch.optim.Adam(net.parameters()),
        ema=PowerFunctionEMA(net),
        progress=lambda: {"nimg": 16},
    )
    save_after(RuntimeError(reason), trainer, tmp_path)
    assert bool(list_checkpoints(tmp_path)) == saved
    assert capsys.readouterr().out == ("State saved at 16 images. Run the same command to resume.\n" if saved else "")


@pytest.fixture(scope="module")
def straight(folder) -> dict[str, torch.Tensor]:
    done = tiny.run("train.py", *options(folder, "two"), ranks=2)
    assert done.returncode == 0, done.stderr
    return state(folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["false", "true"])
@pytest.mark.parametrize(
    ("how", "rank"), [("memory", 0), ("memory", 1), ("all", 0), ("kill", 0), ("kill", 1), ("half", 0), ("half", 1)]
)
def test_the_run_goes_on_bit_for_bit_after_any_rank_was_lost(folder, straight, how, rank, shard):
    run = f"{how}-{rank}-{shard}"
    done = lose(folder, run, how, rank, "--shard", shard)
    print(done.stdout, done.stderr)
    is_lost = shard == "true" and how in ("kill", "half")  # with what only this rank held
    # of a rank that fails half-way through a step, the other one may have completed it
    expected = {"64"} if is_lost else {"96"} if how != "half" else {"96", "112"}
    if not is_lost:
        saved = re.findall(r"State saved at (\d+) images", done.stdout)
        assert len(saved) == 1
        assert saved[0] in expected
    resumed = tiny.run("train.py", *options(folder, run), "--shard", shard, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert re.findall(r"Resuming at (\d+) images", resumed.stdout)[0] in expected
    assert ("could not save all parts of the state at" in resumed.stderr) == is_lost
    for name, value in state(folder / run).items():
        assert torch.equal(value, straight[name]), name
    assert not list((folder / run).glob("*.part-*"))
