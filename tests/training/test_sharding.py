"""Training in less memory, by shares and by computing again: the same bits as the plain way, resumed either way."""

import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.loss import EDM2Loss
from tests.support import golden, tiny
from tests.support.memory import PeakBytes

NETWORK = {**tiny.TINY["network"], "dropout": 0.1}

# All runs in one start of two processes: starting is what takes the time.
_RUNS = """
import shutil, sys
from edm2kit.cli import train
from edm2kit.torch_utils import dist
folder, options = sys.argv[1], sys.argv[2:]
def run(name, *more):
    train.main([*options, "--outdir", f"{{folder}}/{{name}}", *more], standalone_mode=False)
with dist.session("cpu"):
    run("plain", "--samples", "2")
    run("lean", "--samples", "2", "--shard", "true", "--recompute", "true")
    run("plain-then-lean", "--duration", "32")
    run("lean-then-plain", "--duration", "32", "--shard", "true")
    for name in ("plain", "lean"):
        dist.on_rank0(shutil.copytree, f"{{folder}}/{{name}}-then-" + {{"plain": "lean", "lean": "plain"}}[name],
                      f"{{folder}}/{{name}}-then-alone")
    run("plain-then-lean", "--shard", "true")
    run("lean-then-plain")
dist.exit_process(0)  # as the command lines do: gloo's threads now and then abort an interpreter that ends by itself
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: of two ranks, with and without --shard and --recompute, some changing over half-way."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny.make_dataset(folder / "data")
    config = tiny.write_config(folder / "tiny.yaml", network=NETWORK, duration_nimg=64, checkpoint_every_nimg=32)
    script = folder / "runs.py"
    script.write_text(_RUNS.format(root=str(tiny.ROOT)))
    options = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0, "--batch-gpu", 5]
    line = tiny.command(str(script), folder, *options, ranks=2)
    done = subprocess.run(line, capture_output=True, text=True, env=tiny.environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    for name in ("plain-then-alone", "lean-then-alone"):
        done = CliRunner().invoke(train.main, [*map(str, options), "--outdir", str(folder / name)])
        assert done.exit_code == 0, done.output
        assert "Resuming at 32 images" in done.output
    return folder


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {prefix: tree}
    return {key: leaf for name, value in items for key, leaf in flatten(value, f"{prefix}/{name}").items()}


def assert_same_bits(a: object, b: object) -> None:
    a, b = ({k: v for k, v in flatten(x).items() if "elapsed" not in k} for x in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
            assert value.stride() == b[key].stride(), key
        else:
            assert value == b[key], key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plain", "lean"),
        ("plain", "plain-then-lean"),
        ("plain", "lean-then-plain"),
        ("plain-then-alone", "lean-then-alone"),
    ],
)
def test_checkpoints_and_snapshots_are_the_same_bits(runs, one, other):
    one, other = runs / one, runs / other
    assert [p.name for p in list_checkpoints(one)][-1] == [p.name for p in list_checkpoints(other)][-1]
    a, b = (torch.load(list_checkpoints(folder)[-1], weights_only=True) for folder in (one, other))
    assert_same_bits(a, b)
    assert len(a["optimizer"]["state"]) == len(list(load_snapshot(one / snapshot_names(one)[0]).net.parameters()))
    for name in snapshot_names(one):
        assert_same_bits(*(load_snapshot(folder / name).net.state_dict() for folder in (one, other)))


def test_samples_are_drawn_from_an_average_put_together(runs):
    sheets = [(runs / name / "samples-0000000.png").read_bytes() for name in ("plain", "lean")]
    assert sheets[0] == sheets[1]


def snapshot_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("*.safetensors"))


def gradients(net: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    images, labels = torch.randn(2, 3, 16, 16), torch.eye(4)[[0, 3]]
    EDM2Loss()(net, images, labels).sum().backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    return [*found, torch.randn(3)]  # and what is drawn afterwards


def dropping_network() -> torch.nn.Module:
    net = golden.network("cond").train()
    for block in [*net.unet.enc.values(), *net.unet.dec.values()]:
        block.dropout = 0.3
    return net


def test_recomputing_draws_the_same_dropout():
    net = dropping_network()
    held = gradients(net)
    net.unet.recompute_in_training = True
    for one, other in zip(held, gradients(net), strict=True):
        assert torch.equal(one, other)


def test_recomputing_holds_less():
    net, peaks = dropping_network(), []
    for net.unet.recompute_in_training in (False, True):
        with PeakBytes() as memory:
            gradients(net)
        peaks.append(memory.peak)
    assert peaks[1] < 0.5 * peaks[0]
