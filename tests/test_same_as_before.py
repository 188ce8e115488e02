"""The commands give what they gave before the code became one package.

The records were made at commit 52f75c3, on a CPU with AVX512: images to the byte, weights to the bit. Another kind of
CPU adds in another order, so there the comparison is to one grey level and to float32 rounding.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from edm2kit.cli import generate, phema, train
from edm2kit.cli import metrics as calculate_metrics
from tests.support import DATA, tiny

RECORDS = DATA / "before_the_move"
# defaults that were corrected since, at their old values
OLD_DEFAULTS = {"icg": ["--icg-own", "no"], "tsg": ["--tsg-scale", "0.3", "--tsg-power", "0"]}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    for name in ("generate.zip", "train.zip"):
        with zipfile.ZipFile(RECORDS / name) as file:
            file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def same_cpu(record):
    """Whether this machine computes as the one that made the records did."""
    machine = json.loads((record / "machine.json").read_text())
    here = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    return all(machine[key] == value for key, value in here.items())


def commands():
    with zipfile.ZipFile(RECORDS / "generate.zip") as file:
        return json.loads(file.read("commands.json"))["generate"]


def invoke(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", commands())
def test_the_same_command_writes_the_same_images(name, record, same_cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(record)
    invoke(generate.main, *commands()[name], *OLD_DEFAULTS.get(name, []), "--outdir", tmp_path / "out")
    before = {path.name: path for path in sorted((record / "images" / name).glob("*.png"))}
    now = {path.name: path for path in sorted((tmp_path / "out").glob("*.png"))}
    assert list(now) == list(before)
    for file, path in now.items():
        if same_cpu:
            assert path.read_bytes() == before[file].read_bytes(), file
        else:
            one, other = (np.asarray(Image.open(p)).astype(int) for p in (path, before[file]))
            assert np.abs(one - other).max() <= 1, file


def assert_same_weights(now: Path, before: Path, same_cpu: bool) -> None:
    one, other = load_file(now), load_file(before)
    assert list(one) == list(other)
    for name, tensor in one.items():
        if same_cpu:
            assert torch.equal(tensor, other[name]), name
        else:
            torch.testing.assert_close(tensor, other[name], rtol=2e-3, atol=2e-3, msg=name)  # stored in half precision


@pytest.fixture(scope="module")
def resumed(record):
    """A run whose checkpoint was written before, continued to its end by the code of today."""
    tiny.make_dataset(record / "data")
    config = tiny.write_config(
        record / "tiny.yaml",
        duration_nimg=2560, snapshot_every_nimg=1024, checkpoint_every_nimg=1024, keep_checkpoints=9,
    )  # fmt: skip
    run = record / "run-at-2048"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(record)
        invoke(train.main, "--config", config, "--data", "data", "--outdir", run, "--samples", 0, "--device", "cpu")
    return run


def test_an_old_checkpoint_resumes_to_the_same_weights(resumed, record, same_cpu):
    before = sorted((record / "end").glob("network-snapshot-*.safetensors"))
    assert len(before) == 2
    for path in before:
        assert_same_weights(resumed / path.name, path, same_cpu)


def test_post_hoc_ema_rebuilds_the_same_weights(resumed, record, same_cpu, tmp_path):
    invoke(phema.main, "--indir", resumed, "--outdir", tmp_path, "--outstd", "0.12")
    (now,) = tmp_path.glob("*.safetensors")
    assert_same_weights(now, record / "end" / now.name, same_cpu)


def test_the_same_images_have_the_same_score(record, same_cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(record)
    tiny.make_dataset(record / "data")
    invoke(
        calculate_metrics.main, "ref", "--data", "data", "--dest", tmp_path / "ref.npz", "--metrics", "fd_random",
        "--device", "cpu",
    )  # fmt: skip
    invoke(
        calculate_metrics.main, "gen", "--net", "main.safetensors", "--gnet", "guide.safetensors",
        "--guidance", 1.5, "--steps", 4, "--ref", tmp_path / "ref.npz", "--num", 40, "--device", "cpu",
        "--record", tmp_path / "score.json",
    )  # fmt: skip
    now, before = (
        json.loads(path.read_text())["results"] for path in (tmp_path / "score.json", record / "end" / "score.json")
    )
    assert now == before if same_cpu else now == pytest.approx(before, rel=1e-3)
