"""--wandb: one run at Weights & Biases for one run folder, and never in the way of training."""

import json
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.training import wandb_log
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.log import RunLog
from edm2kit.training.wandb_log import WandbLog
from tests.support import tiny

STATS = {"nonfinite_gradients": (0.0, 1), "loss": (-1.5, 4), "lr": (0.1, 1), "gradient_norm": (1.0, 1)}


class FakeWandb:
    """The package wandb; calls whose name is in `failing` raise."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.calls = failing, []

    def init(self, **settings: object) -> SimpleNamespace:
        self.note("init", settings)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: self.note("define_metric", (name, step_metric)),
            log=lambda record: self.note("log", record),
            finish=lambda exit_code: self.note("finish", exit_code),
        )

    def Image(self, pixels: np.ndarray) -> tuple[str, tuple[int, ...]]:
        return "image", pixels.shape

    def note(self, name: str, value: object) -> None:
        self.calls.append((name, value))
        if name in self.failing:
            raise RuntimeError(f"no {name}\nat all")

    def of(self, name: str) -> list:
        return [value for called, value in self.calls if called == name]


@pytest.fixture
def package(monkeypatch):
    def use(*failing: str) -> FakeWandb:
        fake = FakeWandb(*failing)
        fake.__spec__ = "found"
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return use


def log_to(folder, nimgs, error=None):
    with WandbLog(folder, {"lr": 0.1}) as online:
        log = RunLog(folder, 128, torch.device("cpu"), wandb=online)
        log.begin(nimgs[0], 0.0)
        for nimg in nimgs:
            log.status(nimg, float(nimg), dict(STATS))
        log.picture(nimg, np.zeros((8, 8, 3), np.uint8))
        if error:
            raise error


def test_a_resumed_run_keeps_its_id_and_counts_images(tmp_path, package):
    fake = package()
    log_to(tmp_path, [16, 32])
    log_to(tmp_path, [32, 48])
    first, second = fake.of("init")
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["resume"], first["name"], first["config"]) == ("allow", tmp_path.name, {"lr": 0.1})
    assert fake.of("define_metric")[0] == ("*", "nimg")
    assert [record["nimg"] for record in fake.of("log")] == [16, 32, 32, 32, 48, 48]
    assert fake.of("log")[-1] == {"nimg": 48, "samples": ("image", (8, 8, 3))}
    assert fake.of("log")[0]["loss"] == -1.5
    assert fake.of("finish") == [0, 0]


def test_another_folder_is_another_run_and_a_damaged_id_is_replaced(tmp_path, package):
    fake = package()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log_to(tmp_path / name, [16])
    (tmp_path / "b" / "wandb.json").write_text("{")
    log_to(tmp_path / "b", [16])
    assert len({settings["id"] for settings in fake.of("init")}) == 3


def test_an_error_of_training_shows_as_a_failed_run(tmp_path, package):
    fake = package()
    with pytest.raises(ValueError, match="diverged"):
        log_to(tmp_path, [16], ValueError("diverged"))
    assert fake.of("finish") == [1]


@pytest.mark.parametrize(("failing", "calls"), [("init", 1), ("log", 3), ("finish", 6)])
def test_its_failures_are_reported_once_and_stop_nothing(tmp_path, package, capsys, failing, calls):
    fake = package(failing)
    log_to(tmp_path, [16, 32])
    said = capsys.readouterr()
    assert said.err.count(f"Weights & Biases failed (no {failing}); training continues without it") == 1
    assert said.out.count("images (") == 2
    assert len(fake.calls) == calls


def test_a_closing_that_hangs_is_left_behind(tmp_path, package, capsys, monkeypatch):
    fake, never = package(), threading.Event()
    monkeypatch.setattr(wandb_log, "_FINISH_SEC", 0.01)
    monkeypatch.setattr(fake, "note", lambda name, value: never.wait() if name == "finish" else None)
    log_to(tmp_path, [16])
    never.set()
    assert "did not finish in 0.01 s; `wandb sync` sends what is missing" in capsys.readouterr().err


def test_without_the_package_it_is_one_line_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    config = tiny.write_config(tmp_path / "tiny.yaml")
    words = ["--config", config, "--data", tiny.make_dataset(tmp_path / "data"), "--outdir", tmp_path / "run"]
    done = CliRunner().invoke(train.main, [str(w) for w in (*words, "--device", "cpu", "--samples", 0, "--wandb")])
    assert done.exit_code == 1
    assert "Error: --wandb needs the package wandb: pip install wandb" in done.output
    assert not list_checkpoints(tmp_path / "run")


def test_only_the_option_imports_the_package(tmp_path):
    data, config = tiny.make_dataset(tmp_path / "data"), tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=16)
    words = ["--config", config, "--data", data, "--outdir", tmp_path / "run", "--device", "cpu", "--samples", 0]
    sys.modules.pop("wandb", None)
    done = CliRunner().invoke(train.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "wandb" not in sys.modules


@pytest.mark.slow
def test_offline_files_of_the_real_package_have_one_id(tmp_path):
    pytest.importorskip("wandb")
    data, config = tiny.make_dataset(tmp_path / "data"), tiny.write_config(tmp_path / "tiny.yaml")
    words = ["--config", config, "--data", data, "--outdir", tmp_path / "run", "--device", "cpu", "--samples", 4]
    environment = {**tiny.environment(), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for more, code in ((["--max-time", "0.001s"], 75), ([], 0)):
        line = tiny.command("train.py", *words, "--wandb", *more)
        done = tiny.subprocess.run(line, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == code, done.stderr
        assert "Weights & Biases failed" not in done.stderr
    found = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    number = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert len(found) == 2
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{number}", name) for name in found)
    for name in found:
        (record,) = (tmp_path / "run" / "wandb" / name).glob("*.wandb")
        assert b"gradient_norm" in record.read_bytes()
    assert list((tmp_path / "run" / "wandb").rglob("*.png"))
