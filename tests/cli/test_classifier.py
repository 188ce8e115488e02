import json
import os
import subprocess

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from edm2kit.cli.classifier import main as classifier
from edm2kit.guidance.classifier.noise_classifier import load_classifier
from tests.support.tiny import command, environment, make_dataset, run


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
    read, nobody = os.pipe()
    os.close(read)
    for name, output in (("one", subprocess.DEVNULL), ("two", nobody)):  # what is printed must not decide
        words = command("scripts/train_classifier.py", "--data", bright_and_dark, "--dest", tmp_path / name, *ARGUMENTS)
        done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    os.close(nobody)
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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--width", "0"], "the width must be a multiple of 8 up to 4096"),
        (["--width", "1000000000"], "the width must be a multiple of 8 up to 4096"),
        (["--lr", "nan"], "lr is nan; expected a number above 0"),
        (["--batch", "0"], "batch_size is 0; expected a number above 0"),
        (["--P_mean", "inf"], "P_mean is inf; expected a finite number"),
    ],
)
def test_settings_that_cannot_work_are_one_line(bright_and_dark, tmp_path, arguments, reason):
    words = ["--data", str(bright_and_dark), "--dest", str(tmp_path / "c"), "--device", "cpu", *arguments]
    result = CliRunner().invoke(classifier, words)
    assert result.exit_code == 1
    assert reason in result.output
    assert not (tmp_path / "c").exists()


def test_a_network_is_not_replaced_by_a_classifier(bright_and_dark, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "network.safetensors")
    before = (tmp_path / "network.safetensors").read_bytes()
    words = ["--data", str(bright_and_dark), "--dest", str(tmp_path / "network.safetensors"), "--overwrite"]
    result = CliRunner().invoke(classifier, words)
    assert "is a safetensors file, but not a classifier" in result.output
    assert (tmp_path / "network.safetensors").read_bytes() == before
