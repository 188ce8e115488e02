"""Training from every kind of data set: the same images give the same weights, resumed or not."""

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.data.dataset import ImageDataset
from edm2kit.models.encoders import to_image
from edm2kit.snapshots.loading import load_snapshot, open_weights
from tests.support.tiny import make_dataset, write_config

SNAPSHOT = "network-snapshot-0000000-0.100.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One data set as image files, arrays and a Hugging Face folder."""
    root = tmp_path_factory.mktemp("data")
    source = ImageDataset(make_dataset(root / "image_files"))
    pixels = source.read(np.arange(len(source)))
    (root / "arrays").mkdir()
    for k, part in enumerate(np.array_split(pixels, 3)):
        np.save(root / "arrays" / f"{k}.npy", part)
    np.save(root / "arrays" / "labels.npy", source.labels)
    columns = {"img": [to_image(image) for image in pixels], "label": source.labels.tolist()}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(4)})
    datasets.Dataset.from_dict(columns, features).save_to_disk(root / "hf")
    return root


def run_training(data, outdir, *options):
    config = write_config(outdir.parent / f"{outdir.name}.yaml", duration_nimg=80)
    arguments = ("--data", data, "--config", config, "--outdir", outdir, "--samples", 0, "--device", "cpu", *options)
    result = CliRunner().invoke(train.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "image_files"
    run_training(folder / "image_files", run_dir)
    return load_snapshot(run_dir / SNAPSHOT).net.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["arrays", "hf"])
def test_weights_do_not_depend_on_the_kind_of_data_set(folder, expected, tmp_path, kind, workers):
    output = run_training(folder / kind, tmp_path / "run", "--duration", 64, "--workers", workers)
    assert "100 items of 3x8x8, 4 classes" in output
    assert "convert" not in output
    output = run_training(f"{kind}:{folder / kind}", tmp_path / "run", "--workers", workers)
    assert "Resuming at 64 images" in output
    found = load_snapshot(tmp_path / "run" / SNAPSHOT).net.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_class_names_of_a_hugging_face_folder_go_into_the_snapshot(folder, tmp_path):
    run_training(folder / "hf", tmp_path / "run", "--duration", 16)
    assert open_weights(tmp_path / "run" / SNAPSHOT).header.label_names == ("0", "1", "2", "3")
