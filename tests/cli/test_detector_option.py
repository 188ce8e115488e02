"""The option --detector of calculate_metrics.py, in ref, calc and gen."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from edm2kit.cli import metrics as calculate_metrics
from edm2kit.metrics.detectors.exported import export_detector
from edm2kit.metrics.detectors.preprocess import Preprocessing
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.reference import load_reference
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import encoded, picture, some_files, write_folder

NUM = 12


@pytest.fixture(autouse=True)
def forgotten():
    """Each run starts as a new process would: without the detectors of others."""
    before = set(DETECTORS)
    yield
    for name in set(DETECTORS) - before:
        del DETECTORS[name]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    write_folder(folder / "real", some_files(NUM))
    write_folder(folder / "fake", {f"{k:06d}.png": encoded(picture(100 + k)) for k in range(NUM)})
    tiny_snapshot(folder / "net")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_detector(net, folder / "my.pt2", Preprocessing(16, "bilinear", (0, 1), (0.5,) * 3, (0.5,) * 3))
    net[0].weight.data += 1
    export_detector(net, folder / "other.pt2", Preprocessing(16, "bilinear", (0, 1), (0.5,) * 3, (0.5,) * 3))
    return folder


def run(*words):
    for name in ("my", "other"):
        DETECTORS.pop(name, None)
    result = CliRunner().invoke(calculate_metrics.main, [str(word) for word in words] + ["--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_program_serves_ref_calc_and_gen(place):
    own = ["--detector", f"my={place / 'my.pt2'}"]
    code, output = run("ref", "--data", place / "real", "--dest", place / "ref.npz", *own)
    assert code == 0, output
    assert list(load_reference(place / "ref.npz").statistics) == ["my"]  # not fid, which needs a download
    common = ["--ref", place / "ref.npz", "--num", NUM, "--record", place / "out.json", *own]
    for words in (["calc", "--images", place / "fake"], ["gen", "--net", place / "net", "--steps", 2]):
        code, output = run(*words, *common, "--metrics", "my,my.vendi")
        assert code == 0, output
        record = json.loads((place / "out.json").read_text())
        assert record["results"]["my"]["min"] > 0
        assert record["results"]["my.vendi"]["min"] >= 1
        assert record["detectors"]["my"].startswith("weights sha256 ")
        assert "not FID" in output
    code, output = run("calc", "--images", place / "fake", *common[:-2])
    assert code == 1
    assert "give --detector my=FILE.pt2" in output
    code, output = run("calc", "--images", place / "fake", *common[:-2], "--detector", f"my={place / 'other.pt2'}")
    assert code == 1
    assert "another detector" in output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("my", "'my' has no source"),
        ("my=none.pt2", "none.pt2: no such file"),
        ("my=none", "neither a folder nor a name"),
        ("kid=my.pt2", "'kid' is a metric"),
        ("all=my.pt2", "'all' is a metric"),
        ("fid=my.pt2", "'fid' exists already"),
        ("a.b=my.pt2", "cannot be the name"),
    ],
)
def test_wrong_detectors_are_refused_before_work(place, monkeypatch, text, reason):
    monkeypatch.chdir(place)
    for command in (["calc", "--images", "fake", "--ref", "ref.npz"], ["ref", "--data", "real", "--dest", "x.npz"]):
        code, output = run(*command, "--detector", text)
        assert code == 2
        assert reason in output.replace("\n", " ")
    assert not (place / "x.npz").exists()
