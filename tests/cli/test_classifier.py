import json

import numpy as np
import pytest
import torch
from PIL import Image

from edm2kit.guidance.classifier.noise_classifier import load_classifier
from tests.support.tiny import make_dataset, run


@pytest.fixture(scope="module")
def bright_and_dark(tmp_path_factory):
    """Two classes that anyone can tell apart."""
    folder, labels = tmp_path_factory.mktemp("data"), []
    random = np.random.default_rng(0)
    for k in range(64):
        level = 60 if k % 2 else 200
        pixels = random.integers(level - 50, level + 50, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:04d}.png")
        labels.append([f"{k:04d}.png", k % 2])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


ARGUMENTS = ["--duration", "2048", "--batch", "32", "--width", "8", "--levels", "2", "--lr", "0.01", "--device", "cpu"]


def test_a_classifier_learns_what_can_be_seen_and_repeats_itself(bright_and_dark, tmp_path):
    for name in ("one", "two"):
        done = run("scripts/train_classifier.py", "--data", bright_and_dark, "--dest", tmp_path / name, *ARGUMENTS)
        assert done.returncode == 0, done.stderr
    net, header = load_classifier(tmp_path / "one").net, load_classifier(tmp_path / "one").header
    bright = torch.full([1, 3, 8, 8], 0.5)
    assert net(torch.cat([bright, -bright]), 0.3).argmax(1).tolist() == [0, 1]
    # the louder the noise, the less is known
    certain = [net(bright, sigma).softmax(1)[0, 0].item() for sigma in (0.1, 80.0)]
    assert certain[0] > 0.9 > certain[1]
    assert (header.nimg, header.training["batch_size"]) == (2048, 32)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    done = run("scripts/train_classifier.py", "--data", bright_and_dark, "--dest", tmp_path / "one", *ARGUMENTS)
    assert done.returncode == 1
    assert "--overwrite to replace it" in done.stderr


def test_without_labels_there_is_nothing_to_learn(tmp_path):
    data = make_dataset(tmp_path / "data", num_images=2, num_classes=0)
    done = run("scripts/train_classifier.py", "--data", data, "--dest", tmp_path / "c", "--device", "cpu")
    assert (done.returncode, "has no labels" in done.stderr) == (1, True)
