"""The networks that come with the package: complete, small, described, and generating offline."""

import socket

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import generate
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.presets import BOX, boxed_presets, find_preset
from edm2kit.snapshots.file_format import read_header
from tests.support.pictures import cell

NETWORKS = sorted(BOX.glob("*.safetensors"))
_MAX_BYTES = 10_000_000


def pictures(folder, *words):
    arguments = [*words, "--seeds", "0-2", "--steps", "2", "--device", "cpu", "--outdir", str(folder)]
    result = CliRunner().invoke(generate.main, arguments)
    assert result.exit_code == 0, result.output
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_they_are_small_and_each_has_a_card():
    assert NETWORKS
    assert sum(path.stat().st_size for path in NETWORKS) <= _MAX_BYTES
    for path in NETWORKS:
        header, text = read_header(path), path.with_suffix(".md").read_text()
        assert header.dtype == "float16"
        assert f"{header.nimg:,} images seen" in text
        assert "Apache-2.0" in text
        assert "/" not in header.training_config["data"], "the header names a folder of the machine that trained it"


@pytest.mark.parametrize("name", boxed_presets())
def test_a_preset_uses_networks_of_the_package_that_fit_together(name):
    request = parse_request(["--preset", name])
    files = [path for path in (request.net, request.gnet) if path is not None]
    assert {path.rpartition("/")[2] for path in files} <= {path.name for path in NETWORKS}
    assert {read_header(path).label_names for path in files} == {read_header(request.net).label_names}
    assert (request.guidance.method == "none") == (name == "cifar10")


def test_every_network_is_used_by_a_preset():
    requests = [parse_request(["--preset", name]) for name in boxed_presets()]
    used = {path for request in requests for path in (request.net, request.gnet) if path is not None}
    assert used == {str(path) for path in NETWORKS}


def test_they_generate_without_a_connection(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    alone = pictures(tmp_path / "alone", "--preset", "cifar10")
    guided = pictures(tmp_path / "guided", "--preset", "cifar10-autoguidance")
    assert alone.shape == guided.shape == (3, 32, 32, 3)
    assert np.abs(alone.astype(int) - guided).mean() > 1
    assert np.ptp(guided) > 100


def test_only_a_sheet_leaves_only_the_sheet(tmp_path):
    sheet = tmp_path / "sheet.png"
    words = ["--preset", "cifar10", "--steps", "2", "--seeds", "0-3", "--device", "cpu"]
    result = CliRunner().invoke(generate.main, [*words, "--grid", str(sheet)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(sheet) as file:
        shown = [cell(np.asarray(file), 2, seed // 2, seed % 2, 32) for seed in range(3)]
    made = pictures(tmp_path / "made", "--preset", "cifar10")
    assert np.abs(np.stack(shown).astype(int) - made).max() <= 1  # batches of other sizes round differently
    kept = pictures(tmp_path / "kept", "--preset", "cifar10", "--balanced")
    assert len(kept) == 3


def test_their_names_are_listed_and_suggested():
    listed = CliRunner().invoke(generate.main, ["--list-presets"]).output.split()
    assert listed[: len(boxed_presets())] == boxed_presets()
    assert "edm2-img64-s-autog-fid" in listed
    with pytest.raises(ValueError, match="did you mean 'cifar10-autoguidance'"):
        find_preset("cifar10-autoguidence")
