"""Commands that take a network take a run folder, and say which of its snapshots they use."""

import dataclasses

import pytest
from click.testing import CliRunner

from edm2kit.cli import compare, flops, generate
from edm2kit.cli.generation import Request, with_files
from edm2kit.snapshots.file_format import read_header, save_snapshot
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.config import TrainConfig
from edm2kit.training.fine_tuning import adopt_source
from tests.support.fakes import tiny_snapshot


@pytest.fixture
def runs(tmp_path):
    """The folders main and guide, with two snapshots each; the newest are called new.safetensors."""
    for seed, name in enumerate(("main", "guide")):
        folder = tmp_path / name
        folder.mkdir()
        tiny_snapshot(folder / "old.safetensors", seed=seed)
        net = load_snapshot(folder / "old.safetensors").net
        header = read_header(folder / "old.safetensors")
        save_snapshot(
            folder / "new.safetensors", net.state_dict(), dataclasses.replace(header, nimg=header.nimg + 1000)
        )
    return tmp_path


def test_images_of_run_folders_are_those_of_their_newest_snapshots(runs, tmp_path):
    sheets = []
    for name, suffix in (("folders", ""), ("files", "/new.safetensors")):
        words = ["--net", f"{runs}/main{suffix}", "--gnet", f"{runs}/guide{suffix}", "--guidance", "2", "--steps", "2"]
        sheet = tmp_path / f"{name}.png"
        words += ["--seeds", "0-1", "--device", "cpu", "--grid", str(sheet), "--grid-weights", "1,2"]
        done = CliRunner().invoke(generate.main, words)
        assert done.exit_code == 0, done.output
        for folder in ("main", "guide"):
            said = f"{runs}/{folder}: using its newest snapshot, new.safetensors"
            assert done.output.count(said) == (name == "folders")
        assert f"Network:  {runs}/main/new.safetensors" in done.output
        sheets.append(sheet.read_bytes())
    assert sheets[0] == sheets[1]


def test_other_commands_take_them_too(runs):
    request = with_files(Request(net=f"{runs}/main"))
    assert request.net == f"{runs}/main/new.safetensors"
    assert with_files(request) is request
    one, other = (
        CliRunner().invoke(flops.main, [f"{runs}/{name}"]).output for name in ("main", "main/new.safetensors")
    )
    assert one.splitlines()[1:] == other.splitlines()[1:]
    assert len(one.splitlines()) > 5
    assert compare.NamedFile().convert(f"net={runs}/guide", None, None) == ("net", f"{runs}/guide/new.safetensors")
    config = adopt_source(TrainConfig(data="x", init_from=f"{runs}/guide"))
    assert config.init_from == f"{runs}/guide/new.safetensors"


def test_an_empty_folder_and_a_training_state_are_one_line(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (runs / "main" / "training-state-0000001000.pt").write_bytes(b"PK")
    for net, message in (("empty", "empty is empty; give"), ("main/training-state-0000001000.pt", "new.safetensors")):
        done = CliRunner().invoke(generate.main, ["--net", str(tmp_path / net), "--outdir", str(tmp_path / "out")])
        assert done.exit_code == 1
        assert len(done.output.strip().splitlines()) == 1
        assert message in done.output
