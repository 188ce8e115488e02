"""Published pickles, by path and by URL, in every command that takes a snapshot; and presets from a mirror."""

import json
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import flops as count_flops
from edm2kit.cli import generate, train
from edm2kit.cli import metrics as calculate_metrics
from edm2kit.cli import phema as reconstruct_phema
from edm2kit.cli.presets import find_preset
from edm2kit.metrics.detectors.registry import load_detector
from edm2kit.metrics.reference import Reference, save_reference
from edm2kit.metrics.scoring import image_statistics
from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.loading import load_snapshot
from tests.support import fake_published, tiny
from tests.support.fake_published import ARCHITECTURE
from tests.support.fake_server import FakeServer, serve

PRESET = "edm2-img64-s-autog-fid"
HOSTILE = b"\x80\x04cos\nsystem\n(X\x0a\x00\x00\x00touch flagtR."


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A small published network under several names, and statistics."""
    folder = tmp_path_factory.mktemp("published")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = Precond(**ARCHITECTURE).half()
        net.unet.out_gain.fill_(1)
        for kimg in (33554, 67108):
            net.unet.out_conv.weight.add_(torch.randn_like(net.unet.out_conv.weight))
            for std in (0.05, 0.1):
                fake_published.write_snapshot(folder / f"toy-{kimg:07d}-{std:.3f}.pkl", net, ARCHITECTURE)
    images = torch.randint(256, (100, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_reference(
        folder / "ref.npz", Reference(*image_statistics([images], [load_detector("fd_random")], torch.device("cpu")))
    )
    return folder


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("EDM2_OFFLINE", "HF_HUB_OFFLINE", "EDM2_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    with serve({f"/x/{path.name}": path.read_bytes() for path in files.iterdir()}) as running:
        running.files["/x/hostile.pkl"] = HOSTILE
        yield running


def run(command: click.Command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def main_and_guide(files: Path, server: FakeServer) -> list[object]:
    return ["--net", server.url("/x/toy-0067108-0.050.pkl"), "--gnet", files / "toy-0033554-0.100.pkl"]


def test_generate(files, server, tmp_path):
    common = ["--guidance", 2, "--steps", 2, "--seeds", "0-3", "--device", "cpu"]
    run(generate.main, *main_and_guide(files, server), *common, "--outdir", tmp_path / "a")
    local = ["--net", files / "toy-0067108-0.050.pkl", "--gnet", server.url("/x/toy-0033554-0.100.pkl")]
    run(generate.main, *local, *common, "--outdir", tmp_path / "b")
    for k in range(4):
        one, other = (np.asarray(Image.open(tmp_path / folder / f"{k:06d}.png")) for folder in "ab")
        assert np.array_equal(one, other)
        assert one.std() > 0


def test_calculate_metrics(files, server, tmp_path):
    arguments = ["gen", *main_and_guide(files, server), "--guidance", 2, "--steps", 2, "--num", 16, "--device", "cpu"]
    reference = ["--ref", server.url("/x/ref.npz"), "--metrics", "fd_random"]
    run(calculate_metrics.main, *arguments, *reference, "--record", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["results"]["fd_random"]["min"] > 0


def test_reconstruct_phema(files, server, tmp_path):
    inputs = [("--indir", server.url(f"/x/toy-00{k}-{std}.pkl")) for k in (33554, 67108) for std in ("0.050", "0.100")]
    urls = [word for pair in inputs for word in pair]
    rest = ["--outstd", 0.07, "--dtype", "fp32", "--outdir"]
    run(reconstruct_phema.main, *urls, *rest, tmp_path / "urls")
    run(reconstruct_phema.main, "--indir", files, "--inprefix", "toy", *rest, tmp_path / "folder")
    one, other = (load_snapshot(tmp_path / d / "phema-0067108-0.070.safetensors") for d in ("urls", "folder"))
    assert len(one.header.recipe["inputs"]) == 4
    assert all(map(torch.equal, one.net.state_dict().values(), other.net.state_dict().values()))


def test_train_init_from(files, server, tmp_path):
    data = tiny.make_dataset(tmp_path / "data", 20, num_classes=3)
    config = tiny.write_config(tmp_path / "run.yaml", network={}, duration_nimg=16)
    arguments = ["--config", config, "--data", data, "--outdir", tmp_path / "run", "--device", "cpu", "--samples", 0]
    said = run(train.main, *arguments, "--init-from", server.url("/x/toy-0067108-0.050.pkl"))
    assert "starting from toy-0067108-0.050.pkl: 67108864 images" in said
    assert "it has 4 classes, this run 3" in said


def test_count_flops(files, server):
    assert "3x8x8, 4 classes" in run(count_flops.main, server.url("/x/toy-0067108-0.050.pkl"))


def test_a_preset_comes_from_the_mirror(files, server, tmp_path, monkeypatch):
    preset = find_preset(PRESET)
    for url, name in ((preset.net, "toy-0067108-0.050.pkl"), (preset.gnet, "toy-0033554-0.100.pkl")):
        server.files["/" + url.partition("://")[2].partition("/")[2]] = (files / name).read_bytes()
    monkeypatch.setenv("EDM2_MIRROR", server.url(""))
    common = ["--preset", PRESET, "--steps", 2, "--device", "cpu"]
    run(generate.main, *common, "--seeds", "0-1", "--outdir", tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").glob("*.png"))] == ["000000.png", "000001.png"]
    scored = ["--num", 8, "--ref", files / "ref.npz", "--metrics", "fd_random", "--record", tmp_path / "r.json"]
    run(calculate_metrics.main, "gen", *common, *scored)
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["guidance"]["weight"] == 1.7


@pytest.mark.parametrize("command", ["generate", "metrics", "phema", "train", "flops"])
def test_a_hostile_file_is_one_line_in_every_command(files, server, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    url, out = server.url("/x/hostile.pkl"), tmp_path / "out"
    lines = {
        "generate": (generate.main, "--net", url, "--outdir", out, "--seeds", 0, "--device", "cpu"),
        "metrics": (calculate_metrics.main, "gen", "--net", url, "--ref", files / "ref.npz", "--num", 4),
        "phema": (reconstruct_phema.main, "--indir", url, "--outdir", out, "--outstd", 0.1),
        "train": (train.main, "--data", tiny.make_dataset(tmp_path / "d", 8), "--outdir", out, "--init-from", url),
        "flops": (count_flops.main, url),
    }
    main, *arguments = lines[command]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "it names 'os.system', which is not on the list of harmless names" in line
    assert not out.exists()
    assert not (tmp_path / "flag").exists()
