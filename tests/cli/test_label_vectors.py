"""Label vectors from the data set to the images: training, resuming, samples, generating, scoring and distilling."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import distill, generate, metrics, phema, train
from edm2kit.snapshots.loading import load_snapshot, open_weights
from tests.support.tiny import make_dataset, write_config

DIMENSION = 3
VECTORS = np.random.default_rng(1).standard_normal((100, DIMENSION)).astype(np.float32)
SNAPSHOT = "network-snapshot-0000000-0.100.safetensors"


def invoke(command, *arguments, code=0):
    result = CliRunner().invoke(command, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("vectors") / "data")
    content = json.loads((folder / "dataset.json").read_text())
    labels = [[name, vector.tolist()] for (name, _), vector in zip(content["labels"], VECTORS, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "tiny.yaml", label_dropout=0.1, duration_nimg=80)
    output = invoke(train.main, "--data", data, "--config", config, "--outdir", folder / "run", "--samples", 4)
    assert f"label vectors of {DIMENSION} numbers" in output
    return folder / "run"


@pytest.fixture(scope="module")
def net(run_dir):
    return run_dir / SNAPSHOT


@pytest.fixture
def labels(tmp_path):
    np.save(tmp_path / "labels.npy", VECTORS[:2])
    return tmp_path / "labels.npy"


def test_the_snapshot_says_that_its_labels_are_vectors(net, run_dir):
    header = open_weights(net).header
    assert (header.label_kind, header.label_names, header.architecture["label_dim"]) == ("vectors", None, DIMENSION)
    assert Image.open(run_dir / "samples-0000000.png").size[0] == 2 * (128 + 4) + 4


def test_a_resumed_run_is_the_same_to_the_last_bit(data, run_dir, tmp_path):
    config = run_dir.parent / "tiny.yaml"
    arguments = ("--data", data, "--config", config, "--outdir", tmp_path / "run", "--samples", 0)
    invoke(train.main, *arguments, "--duration", 64)
    assert "Resuming at 64 images" in invoke(train.main, *arguments)
    one, two = (load_snapshot(folder / SNAPSHOT).net.state_dict() for folder in (run_dir, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_vectors_are_other_data(data, run_dir, tmp_path):
    content = json.loads((data / "dataset.json").read_text())
    content["labels"][0][1][0] += 1
    other = make_dataset(tmp_path / "other")
    (other / "dataset.json").write_text(json.dumps(content))
    arguments = ("--data", other, "--config", run_dir.parent / "tiny.yaml", "--outdir", run_dir, "--samples", 0)
    assert "differs in sha256" in invoke(train.main, *arguments, code=1)


def test_images_cycle_through_the_vectors(net, labels, tmp_path):
    def images(*arguments):
        invoke(generate.main, "--net", net, "--steps", 2, "--seeds", "0-2", "--npz", tmp_path / "x.npz", *arguments)
        with np.load(tmp_path / "x.npz") as arrays:
            return arrays["images"]

    found = images("--labels", labels)
    (tmp_path / "one.json").write_text(json.dumps(VECTORS[:1].tolist()))
    first = images("--labels", tmp_path / "one.json", "--overwrite")
    assert np.array_equal(found[[0, 2]], first[[0, 2]])
    assert not np.array_equal(found[1], first[1])
    record = json.loads((tmp_path / "x.npz.json").read_text())["settings"]
    assert record["classes"] is None
    assert len(record["labels_sha256"]) == 64


def test_images_are_scored(net, labels, data, tmp_path):
    invoke(metrics.main, "ref", "--data", data, "--dest", tmp_path / "ref.npz", "--metrics", "fd_random")
    options = ("--ref", tmp_path / "ref.npz", "--num", 4, "--steps", 2)
    assert "fd_random" in invoke(metrics.main, "gen", "--net", net, "--labels", labels, *options)
    assert "give some with --labels FILE" in invoke(metrics.main, "gen", "--net", net, *options, code=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "takes label vectors of 3 numbers; give some with --labels FILE, a .npy array [K, 3]"),
        ("[[1, 2]]", "labels.json: has vectors of 2 numbers, but the network takes 3"),
        ("[[1, 2], [3]]", "labels.json: is neither a .npy array nor a JSON list of label vectors"),
        ("{", "labels.json: is neither"),
        ("[1, 2, 3]", "labels.json: is float64 [3]; expected label vectors [K, D]"),
        ("[[1, 2, NaN]]", "labels.json: label vectors hold numbers that are not finite"),
    ],
)
def test_wrong_vectors_are_refused_in_one_line(net, tmp_path, content, reason):
    options = ()
    if content is not None:
        (tmp_path / "labels.json").write_text(content)
        options = ("--labels", tmp_path / "labels.json")
    output = invoke(generate.main, "--net", net, *options, "--outdir", tmp_path / "out", code=1)
    assert reason in output
    assert "Traceback" not in output


def test_vectors_and_classes_do_not_mix(net, labels, tmp_path):
    output = invoke(generate.main, "--net", net, "--class", 1, "--outdir", tmp_path / "out", code=1)
    assert "takes label vectors; use --labels FILE instead of --class" in output
    classes = make_dataset(tmp_path / "classes", num_classes=DIMENSION)
    config = write_config(tmp_path / "tiny.yaml", duration_nimg=16)
    invoke(train.main, "--data", classes, "--config", config, "--outdir", tmp_path / "run", "--samples", 0)
    other = tmp_path / "run" / SNAPSHOT
    output = invoke(generate.main, "--net", other, "--labels", labels, "--outdir", tmp_path / "out", code=1)
    assert "--labels is for networks that take label vectors" in output
    pair = ("--net", net, "--gnet", other, "--labels", labels, "--guidance", 2, "--outdir", tmp_path / "out")
    assert "its labels are classes, the main network's vectors" in invoke(generate.main, *pair, code=1)


@pytest.mark.parametrize("method", ["cfg", "icg"])
def test_guidance_by_other_conditions(net, labels, tmp_path, method):
    options = ("--guidance-method", method, "--guidance", 2, "--steps", 2, "--seeds", "0-1", "--labels", labels)
    invoke(generate.main, "--net", net, *options, "--outdir", tmp_path / "guided")
    assert len(list((tmp_path / "guided").glob("*.png"))) == 2


def test_a_rebuilt_average_keeps_its_kind_of_labels(run_dir, tmp_path):
    result = CliRunner().invoke(phema.main, ["--indir", str(run_dir), "--outdir", str(tmp_path), "--outstd", "0.07"])
    assert result.exit_code == 0, result.output
    (rebuilt,) = tmp_path.glob("*.safetensors")
    assert open_weights(rebuilt).header.label_kind == "vectors"


@pytest.mark.parametrize("method", ["cfg", "icg"])
def test_a_guided_network_of_vectors_is_distilled(net, data, tmp_path, method):
    options = ("--guidance-method", method, "--guidance", 2, "--steps", 4, "--duration", 32, "--batch", 16)
    invoke(distill.main, "--net", net, *options, "--data", data, "--outdir", tmp_path / "run", "--workers", 0)
    assert open_weights(tmp_path / "run" / SNAPSHOT.replace("0.100", "0.050")).header.label_kind == "vectors"
