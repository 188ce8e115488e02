import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from edm2kit.cli import classifier as classifier_module
from edm2kit.cli.classifier import ClassifierTrainer
from edm2kit.cli.classifier import main as classifier
from edm2kit.data.dataset import ImageDataset
from edm2kit.guidance.classifier.noise_classifier import load_classifier
from edm2kit.training.checkpoint import list_checkpoints
from tests.support import ROOT
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


SHORT = ["--duration", "320", "--batch", "32", "--width", "8", "--levels", "2", "--device", "cpu", "--checkpoint", "64"]


def train(data, dest, *more):
    """Exit code and everything printed."""
    result = CliRunner().invoke(classifier, ["--data", str(data), "--dest", str(dest), *SHORT, *map(str, more)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def uninterrupted(bright_and_dark, tmp_path_factory):
    """The bytes of a classifier that was trained without interruption, and what was printed."""
    dest = tmp_path_factory.mktemp("whole") / "c.safetensors"
    code, output = train(bright_and_dark, dest)
    assert code == 0, output
    assert [path.name for path in dest.parent.iterdir()] == ["c.safetensors"]
    return dest.read_bytes(), [line for line in output.splitlines() if "correct" in line and "%|" not in line]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, nimg):
    """Let the training end at once, as if it were killed, when it begins the step at `nimg` images."""
    step = ClassifierTrainer.step

    def dying(self, batch):
        if self.nimg == nimg:
            raise Killed
        step(self, batch)

    monkeypatch.setattr(ClassifierTrainer, "step", dying)


@pytest.mark.parametrize("nimg", [0, 32, 64, 224])
def test_a_killed_training_continues_with_the_bytes_of_an_uninterrupted_one(
    bright_and_dark, uninterrupted, tmp_path, monkeypatch, nimg
):
    dest = tmp_path / "c.safetensors"
    with monkeypatch.context() as patch:
        kill_at(patch, nimg)
        with pytest.raises(Killed):
            train(bright_and_dark, dest)
    assert not dest.exists()
    code, output = train(bright_and_dark, dest)
    assert code == 0, output
    assert ("Resuming at" in output) == (nimg >= 64)
    assert f"Resuming at {nimg // 64 * 64} images" in output or nimg < 64
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert dest.read_bytes() == uninterrupted[0]
    assert [line for line in output.splitlines() if "correct" in line and "%|" not in line] == uninterrupted[1]


KILLED = """
import os, signal, sys
from edm2kit.cli import classifier
step = classifier.ClassifierTrainer.step
def dying(self, batch):
    step(self, batch)
    if self.nimg == 160:
        os.kill(os.getpid(), signal.SIGKILL)
classifier.ClassifierTrainer.step = dying
classifier.main()
"""


def test_what_kill_9_leaves_is_continued(bright_and_dark, uninterrupted, tmp_path):
    dest = tmp_path / "c.safetensors"
    words = [sys.executable, "-c", KILLED, "--data", bright_and_dark, "--dest", dest, *SHORT]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other numbers may round differently
    done = subprocess.run(words, cwd=ROOT, env={**environment(), **threads}, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    code, output = train(bright_and_dark, dest)
    assert code == 0, output
    assert "Resuming at 128 images" in output
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert dest.read_bytes() == uninterrupted[0]


def test_a_signal_saves_and_stops(bright_and_dark, uninterrupted, tmp_path, monkeypatch):
    dest, step = tmp_path / "c.safetensors", ClassifierTrainer.step

    def signalled(self, batch):
        step(self, batch)
        if self.nimg == 96:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "step", signalled)
        assert train(bright_and_dark, tmp_path / "none", "--checkpoint", 0)[0] == 1  # there is nothing to resume
        code, output = train(bright_and_dark, dest)
    assert (code, "Stopped at 96 images; state saved. Run the same command to resume." in output) == (75, True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors.partial"]
    code, output = train(bright_and_dark, dest)
    assert "Resuming at 96 images" in output
    assert dest.read_bytes() == uninterrupted[0]


def test_an_unreadable_image_saves_first(bright_and_dark, uninterrupted, tmp_path, monkeypatch):
    dest, read, calls = tmp_path / "c.safetensors", ImageDataset._decode, []

    def damaged(self, index):
        if calls.append(index) or len(calls) > 96 + 64:  # besides those that identify the data
            raise ValueError("0007.png: is cut short")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "_decode", damaged)
        code, output = train(bright_and_dark, dest)
    assert (code, "0007.png: is cut short" in output) == (1, True)
    assert [path.name for path in list_checkpoints(tmp_path / "c.safetensors.partial")] == [
        "training-state-0000000064.pt",
        "training-state-0000000096.pt",
    ]
    assert train(bright_and_dark, dest)[0] == 0
    assert dest.read_bytes() == uninterrupted[0]


def stopped(bright_and_dark, dest, monkeypatch, nimg=160):
    """The folder of checkpoints of a training that was killed."""
    with monkeypatch.context() as patch:
        kill_at(patch, nimg)
        with pytest.raises(Killed):
            train(bright_and_dark, dest)
    return dest.with_name(f"{dest.name}.partial")


def test_a_damaged_checkpoint_is_set_aside(bright_and_dark, uninterrupted, tmp_path, monkeypatch):
    dest = tmp_path / "c.safetensors"
    folder = stopped(bright_and_dark, dest, monkeypatch)
    newest = list_checkpoints(folder)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    code, output = train(bright_and_dark, dest)
    assert code == 0, output
    assert "training-state-0000000128.pt is damaged" in output
    assert "Resuming at 64 images" in output
    assert dest.read_bytes() == uninterrupted[0]
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_another_training_does_not_continue_it(bright_and_dark, tmp_path, monkeypatch):
    dest = tmp_path / "c.safetensors"
    folder = stopped(bright_and_dark, dest, monkeypatch)
    before = {path.name: path.read_bytes() for path in list_checkpoints(folder)}
    other = make_dataset(tmp_path / "other", num_images=8)
    for data, more in ((bright_and_dark, ["--lr", "0.5"]), (bright_and_dark, ["--width", 16]), (other, [])):
        code, output = train(data, dest, *more)
        assert code == 1
        assert f"{folder} has checkpoints of a classifier with other settings or images" in output
    assert {path.name: path.read_bytes() for path in list_checkpoints(folder)} == before


def test_a_finished_classifier_stays_until_the_one_that_replaces_it_is_complete(
    bright_and_dark, uninterrupted, tmp_path, monkeypatch
):
    dest = tmp_path / "c.safetensors"
    assert train(bright_and_dark, dest, "--lr", "0.01")[0] == 0
    before = dest.read_bytes()
    with monkeypatch.context() as patch:
        kill_at(patch, 160)
        with pytest.raises(Killed):
            train(bright_and_dark, dest, "--overwrite")
    assert dest.read_bytes() == before
    assert (
        "c.safetensors.partial has checkpoints of a training that would replace it" in train(bright_and_dark, dest)[1]
    )
    code, output = train(bright_and_dark, dest, "--overwrite")
    assert (code, "Resuming at 128 images" in output) == (0, True)
    assert dest.read_bytes() == uninterrupted[0]


def test_a_folder_of_somebody_else_and_one_in_use_are_refused(bright_and_dark, tmp_path):
    dest, folder = tmp_path / "c.safetensors", tmp_path / "c.safetensors.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    assert "has other files, such as thesis.tex; move it" in train(bright_and_dark, dest)[1]
    assert (folder / "thesis.tex").read_text() == "years of work"
    (folder / "thesis.tex").unlink()
    with classifier_module.unfinished(folder):
        assert "is being written by another run" in train(bright_and_dark, dest)[1]
    assert not folder.exists()


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(bright_and_dark, tmp_path, monkeypatch):
    encode = classifier_module.ClassifierTrainer.step

    def overflow(self, batch):
        if self.nimg == 160:
            next(iter(self.net.parameters())).data.fill_(float("nan"))
        encode(self, batch)

    monkeypatch.setattr(ClassifierTrainer, "step", overflow)
    dest = tmp_path / "c.safetensors"
    code, output = train(bright_and_dark, dest)
    assert (code, "the loss is nan after 160 images; try a smaller --lr" in output) == (1, True)
    assert list_checkpoints(Path(f"{dest}.partial"))[-1].name == "training-state-0000000128.pt"
