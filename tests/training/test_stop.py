"""A run that ends early leaves a network of its last image, which it replaces when it goes on."""

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import phema, train
from edm2kit.snapshots.file_format import read_header, snapshot_name
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training import loop
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.config import TrainConfig
from edm2kit.training.run import prepare_run
from tests.support import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("images"))


def train_until(run_dir: Path, data: Path, nimg: float = math.inf, **changes: object) -> bool:
    """Train the tiny network in `run_dir` until `nimg` images or the end; returns whether it got there."""
    config = TrainConfig(**{**tiny.TINY, **changes, "data": str(data)})
    with StopAt(nimg) as stop:
        return not prepare_run(config, run_dir).train(torch.device("cpu"), should_stop=stop)


class StopAt:
    """Asks to stop after the step that ends at `nimg` images."""

    def __init__(self, nimg: float) -> None:
        self.wanted, self.reached = nimg, 0

    def __enter__(self) -> "StopAt":
        self.step = step = loop.Trainer.step

        def counted(trainer: loop.Trainer, *arguments: object) -> None:
            step(trainer, *arguments)
            self.reached = trainer.nimg

        loop.Trainer.step = counted
        return self

    def __exit__(self, *error: object) -> None:
        loop.Trainer.step = self.step

    def __call__(self) -> bool:
        return self.reached >= self.wanted


def times(run_dir: Path) -> list[tuple[str, int, float]]:
    found = [(path.name, read_header(path)) for path in sorted(run_dir.glob("*.safetensors"))]
    return [(name, header.nimg, header.ema_std) for name, header in found]


def test_a_stopped_run_leaves_both_averages_of_its_last_image(images, tmp_path, capsys):
    assert not train_until(tmp_path, images, 48)
    names = [f"network-snapshot-0000000-{length}.safetensors" for length in ("0.050", "0.100")]
    assert times(tmp_path) == [(names[0], 48, 0.05), (names[1], 48, 0.1)]
    saved = torch.load(list_checkpoints(tmp_path)[-1], weights_only=True)["ema"]["0.100"]
    for name, value in load_snapshot(tmp_path / names[1]).net.state_dict().items():
        assert torch.equal(value, saved[name].half().float() if value.ndim > 1 else saved[name])
    said = capsys.readouterr().out
    assert f"The network at 48 images: {tmp_path / names[0]} and {tmp_path / names[1]}" in said


def test_the_folder_of_a_run_that_was_stopped_ends_like_that_of_one_that_was_not(images, tmp_path):
    changes = {"duration_nimg": 2250, "batch_size": 250, "snapshot_every_nimg": 1000, "checkpoint_every_nimg": 500}
    assert train_until(tmp_path / "straight", images, **changes)
    for nimg in (250, 1250, 1500, 1750):
        assert not train_until(tmp_path / "stopped", images, nimg, **changes)
    # the stops share the thousand of the snapshot at 1000 images, which stays; only the last one is kept
    assert times(tmp_path / "stopped") == [
        ("network-snapshot-0000001-0.050.safetensors", 1000, 0.05),
        ("network-snapshot-0000001-0.100.safetensors", 1000, 0.1),
        ("network-snapshot-0000001.750-0.050.safetensors", 1750, 0.05),
        ("network-snapshot-0000001.750-0.100.safetensors", 1750, 0.1),
    ]
    assert train_until(tmp_path / "stopped", images, **changes)
    straight, stopped = (sorted(path.name for path in (tmp_path / n).iterdir()) for n in ("straight", "stopped"))
    assert stopped == straight
    for name, *_ in times(tmp_path / "straight"):
        a, b = (load_snapshot(tmp_path / n / name).net.state_dict() for n in ("straight", "stopped"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_stop_at_a_snapshot_of_the_schedule_adds_nothing(images, tmp_path):
    changes = {"duration_nimg": 2000, "batch_size": 500, "snapshot_every_nimg": 1000}
    assert not train_until(tmp_path, images, 1000, **changes)
    assert [nimg for _, nimg, _ in times(tmp_path)] == [1000, 1000]
    assert train_until(tmp_path, images, **changes)
    assert [nimg for _, nimg, _ in times(tmp_path)] == [1000, 1000, 2000, 2000]


def test_without_snapshots_a_stop_writes_none(images, tmp_path):
    assert not train_until(tmp_path, images, 32, snapshot_every_nimg=0)
    assert times(tmp_path) == []


def test_post_hoc_ema_uses_the_snapshots_of_a_stop_at_their_exact_time(images, tmp_path):
    changes = {"duration_nimg": 10000, "batch_size": 500, "snapshot_every_nimg": 1000, "checkpoint_every_nimg": 48000}
    assert not train_until(tmp_path / "run", images, 2500, **changes)
    line = ["--indir", str(tmp_path / "run"), "--outdir", str(tmp_path / "ema"), "--outstd", "0.1,0.07"]
    done = CliRunner().invoke(phema.main, line)
    assert done.exit_code == 0, done.output
    stored = load_snapshot(tmp_path / "run" / snapshot_name(2500, 0.1, exact=True))
    rebuilt = load_snapshot(tmp_path / "ema" / snapshot_name(2500, 0.1, "phema"))
    assert rebuilt.header.nimg == stored.header.nimg == 2500
    assert {entry["nimg"] for entry in rebuilt.header.recipe["inputs"]} == {1000, 2000, 2500}
    for name, value in stored.net.state_dict().items():
        assert torch.equal(rebuilt.net.state_dict()[name], value)


def test_a_full_disk_at_the_stop_loses_the_snapshot_only(images, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_snapshot", fail)
    assert not train_until(tmp_path, images, 48)
    assert "no snapshots of the network at 48 images: [Errno 28] No space left" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path)] == ["training-state-0000000048.pt"]
    monkeypatch.undo()
    assert train_until(tmp_path, images)


def test_a_run_that_diverged_leaves_the_network_of_its_last_good_checkpoint(images, tmp_path, monkeypatch):
    step = loop.Trainer.step

    def spoiled(self, *arguments):
        step(self, *arguments)
        if self.nimg == 80:
            next(self.net.parameters()).data.view(-1)[0] = math.inf

    monkeypatch.setattr(loop.Trainer, "step", spoiled)
    with pytest.raises(ValueError, match="the weights are not finite"):
        train_until(tmp_path, images, checkpoint_every_nimg=32)
    assert [nimg for _, nimg, _ in times(tmp_path)] == [64, 64]
    saved = torch.load(list_checkpoints(tmp_path)[-1], weights_only=True)["ema"]["0.050"]
    net = load_snapshot(tmp_path / snapshot_name(64, 0.05)).net
    assert all(torch.equal(v, saved[n].half().float()) for n, v in net.state_dict().items() if v.ndim > 1)


def test_exit_codes_tell_complete_from_stopped_and_a_file_says_so_too(images, tmp_path, monkeypatch):
    config = tiny.write_config(tmp_path / "tiny.yaml")
    line = ["--config", config, "--data", images, "--device", "cpu", "--samples", 0, "--outdir", tmp_path / "run"]

    def exit_code(*more: object) -> int:
        done = CliRunner().invoke(train.main, [str(word) for word in (*line, *more)])
        print(done.output)  # shown if a line below fails
        return done.exit_code

    assert exit_code("--max-time", "0.001s") == 75
    assert "Run the same command to resume" in (tmp_path / "run" / "stopped.txt").read_text()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # a failure would make torchrun restart the run
    assert exit_code("--max-time", "0.001s") == 0
    assert (tmp_path / "run" / "stopped.txt").exists()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert exit_code() == 0
    assert not (tmp_path / "run" / "stopped.txt").exists()
    assert exit_code("--batch", 17) == 1
    line[-1] = tmp_path / "unsaved"
    assert exit_code("--max-time", "0.001s", "--checkpoint", 0) == 1  # there is nothing to resume
    assert not (tmp_path / "unsaved" / "stopped.txt").exists()


def test_a_complete_run_whose_last_snapshots_are_gone_writes_them_again(images, tmp_path, capsys):
    assert train_until(tmp_path, images)
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    first, second = sorted(tmp_path.glob("*.safetensors"))[-2:]
    first.unlink()
    flipped = bytes([expected[second.name][-1] ^ 1])  # a bit of the weights
    for damaged in (b"damaged", expected[second.name][:-1] + flipped):
        second.write_bytes(damaged)
        assert train_until(tmp_path, images)
        assert "writing them again" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == expected
    assert train_until(tmp_path, images)
    assert "writing them again" not in capsys.readouterr().err


def test_a_run_that_lost_its_checkpoints_says_that_it_starts_again(images, tmp_path, capsys):
    assert train_until(tmp_path, images)
    assert "starts again" not in capsys.readouterr().err
    for path in list_checkpoints(tmp_path):
        path.unlink()
    assert train_until(tmp_path, images)
    assert "has snapshots, but no checkpoint: training starts again at image 0" in capsys.readouterr().err
