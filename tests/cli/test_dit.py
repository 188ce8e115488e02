"""A network of another kind, a DiT, through every command: train, resume, rebuild an EMA, generate, score."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import flops, generate, phema, train
from edm2kit.cli import metrics as calculate_metrics
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.checkpoint import list_checkpoints
from tests.support import tiny

DIT = {"kind": "dit", "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "dropout": 0.1}


def run(command, *arguments, code=0) -> str:
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output


def train_to(nimg: int, place, *options) -> str:
    config = ("--config", place / "dit.yaml", "--data", place / "data", "--samples", 2, "--device", "cpu")
    return run(train, *config, "--duration", nimg, *options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a run of ten steps that stopped in between and was resumed."""
    folder = tmp_path_factory.mktemp("dit")
    tiny.make_dataset(folder / "data")
    tiny.write_config(folder / "dit.yaml", network=DIT, label_dropout=0.1, keep_checkpoints=0)
    train_to(80, folder, "--outdir", folder / "run")
    train_to(160, folder, "--outdir", folder / "run")
    return folder


def snapshots(place) -> list:
    return sorted((place / "run").glob("network-snapshot-*.safetensors"))


def test_snapshots_name_the_kind_and_hold_the_complete_architecture(place):
    header = read_header(snapshots(place)[-1])
    assert header.network == "dit"
    assert header.architecture["num_layers"] == 3
    assert header.architecture["patch_size"] == 2  # defaults are written out
    assert "kind" not in header.architecture
    assert (place / "run" / "samples-0000000.png").exists()


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(place):
    train_to(160, place, "--outdir", place / "at once", "--recompute", "true")
    states = [torch.load(list_checkpoints(place / name)[-1], weights_only=True)["net"] for name in ("run", "at once")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_training_changes_the_network_and_its_averages(place):
    nets = [load_snapshot(path).net for path in snapshots(place)]
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(4)[:2]
    with torch.no_grad():
        short, long = (net(x, 1.0, labels) for net in nets)
        assert not torch.equal(short, long)
        assert not torch.equal(short, nets[0](x, 1.0))  # it knows labels from their absence


def test_averages_are_rebuilt_and_networks_generate_and_are_scored(place):
    out = place / "ema"
    run(phema, "--indir", place / "run", "--outdir", out, "--outstd", "0.08", "--dtype", "fp32")
    (rebuilt,) = out.iterdir()
    assert read_header(rebuilt).network == "dit"
    weights = {std: load_snapshot(path).net.state_dict() for std, path in zip((5, 10), snapshots(place), strict=True)}
    name = "dit.transformer.transformer_blocks.1.attn1.to_q.weight"
    ours = load_snapshot(rebuilt).net.state_dict()[name]
    assert not torch.equal(ours, weights[5][name])
    assert not torch.equal(ours, weights[10][name])

    pictures = place / "pictures"
    options = ("--seeds", "0-3", "--steps", 2, "--device", "cpu")
    guidance = ("--gnet", snapshots(place)[0], "--guidance", 2)
    run(generate, "--net", rebuilt, "--outdir", pictures, *options, *guidance)
    images = [np.asarray(Image.open(path)) for path in sorted(pictures.rglob("*.png"))]
    assert [image.shape for image in images] == [(8, 8, 3)] * 4

    common = ("--metrics", "fd_random", "--device", "cpu")
    run(calculate_metrics, "ref", "--data", place / "data", "--dest", place / "ref.npz", *common)
    scored = ("--ref", place / "ref.npz", "--num", 4, "--record", place / "record.json", *common)
    run(calculate_metrics, "calc", "--images", pictures, *scored)
    assert json.loads((place / "record.json").read_text())["results"]["fd_random"]["min"] > 0


def generated(place, name: str, *guidance, code: int = 0) -> str | list[bytes]:
    out = place / f"guided {name}"
    line = ("--net", snapshots(place)[-1], "--outdir", out, "--seeds", "0-1", "--steps", 2, "--device", "cpu")
    output = run(generate, *line, *guidance, code=code)
    return [path.read_bytes() for path in sorted(out.rglob("*.png"))] if code == 0 else output


@pytest.mark.parametrize("method", ["pag", "seg", "sag", "icg", "windows", "input-noise"])
def test_guidance_by_the_network_s_own_interior_works(place, method):
    guided = generated(place, method, "--guidance-method", method, "--guidance", 40)
    assert len(guided) == 2
    assert guided != generated(place, "off")


@pytest.mark.parametrize(("method", "edit"), [("dropout", "dropout"), ("tsg", "embedding")])
def test_guidance_that_needs_another_interior_refuses_in_one_line(place, method, edit):
    output = generated(place, method, "--guidance-method", method, "--guidance", 2, code=1)
    assert f"needs a network that supports the edit {edit}; this one supports: attention, return_attention" in output
    assert "Traceback" not in output


def test_training_continues_from_a_snapshot_with_other_classes(place):
    tiny.make_dataset(place / "six", num_classes=6)
    line = ("--data", place / "six", "--init-from", snapshots(place)[-1], "--outdir", place / "tuned", "--samples", 0)
    plain = {name: value for name, value in tiny.TINY.items() if name != "network"}
    plain_config = place / "plain.yaml"
    plain_config.write_text(json.dumps(plain))
    output = run(train, "--config", plain_config, *line, "--duration", 16, "--device", "cpu")
    assert "label embedding" in output
    header = read_header(next((place / "tuned").glob("*.safetensors")))
    assert (header.network, header.architecture["label_dim"]) == ("dit", 6)


def test_cost_is_counted_by_kind(place):
    output = run(flops, snapshots(place)[0])
    assert "dit.transformer.transformer_blocks.0.attn1.attention" in output
    assert "3x8x8, 4 classes" in output


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ({**DIT, "num_layer": 2}, "unknown network argument 'num_layer' (dit); did you mean 'num_layers'?"),
        ({"kind": "transformer"}, "unknown kind of network 'transformer'; known kinds: edm2, dit"),
        ({**DIT, "patch_size": 3}, "patch_size must divide the resolution 8; got 3"),
    ],
)
def test_wrong_arguments_are_one_line(place, network, reason):
    config = tiny.write_config(place / "wrong.yaml", network=network)
    line = ("--config", config, "--data", place / "data", "--outdir", place / "wrong", "--device", "cpu")
    assert reason in run(train, *line, code=1)
