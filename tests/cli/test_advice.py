"""--auto and advise: the commands that they print lead from pictures to scored, guided images."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import advice, dataset, generate, metrics, phema, train
from edm2kit.data.dataset import open_source
from edm2kit.metrics.card import read_card
from edm2kit.training.config import config_from_dict
from edm2kit.training.throughput import images_per_sec
from tests.support import tiny

COMMANDS = {
    "edm2kit-train": train.main,
    "edm2kit-phema": phema.main,
    "edm2kit-generate": generate.main,
    "edm2kit-metrics": metrics.main,
}
GIVEN = ("--budget", "3m", "--channels", 16, "--throughput", 100)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


def invoke(command, *arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(command, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_both_commands_write_the_same_configurations(data, tmp_path):
    said = invoke(train.main, "--auto", "--data", data, "--outdir", tmp_path / "a", *GIVEN)
    invoke(dataset.main, "advise", "--source", data, "--outdir", tmp_path / "b", *GIVEN)
    for name in ("main.yaml", "guide.yaml"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert "100 images of 8x8 pixels, 4 classes" in said
    assert "Warning: networks memorise fewer than 1,000 images" in said
    main, guide = (yaml.safe_load((tmp_path / "a" / f"{name}.yaml").read_text()) for name in ("main", "guide"))
    assert main["network"]["model_channels"] == 2 * guide["network"]["model_channels"] == 16
    script = [line for line in (tmp_path / "a" / "commands.sh").read_text().splitlines() if line[0] != "#"]
    assert all(line in said for line in script[1:])


@pytest.mark.slow  # trains two networks and scores them
def test_the_printed_commands_run_as_they_are(data, tmp_path, monkeypatch):
    # everything as printed, except that networks and scores are tiny
    monkeypatch.setattr(advice.recipe, "duration_nimg", lambda *_: 2048)
    monkeypatch.setattr(advice, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    invoke(train.main, "--auto", "--data", data, "--outdir", "runs/photos", *GIVEN)
    tiny_network = tiny.TINY["network"]
    for name in ("main", "guide"):
        path = tmp_path / "runs" / "photos" / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(
                {**yaml.safe_load(path.read_text()), "network": tiny_network, "workers": 0, "batch_size": 256}
            )
        )
    lines = [line for line in (tmp_path / "runs/photos/commands.sh").read_text().splitlines() if line.startswith("edm")]
    assert [line.split()[0] for line in lines] == [
        *["edm2kit-train"] * 2, *["edm2kit-phema"] * 2, "edm2kit-generate", *["edm2kit-metrics"] * 3,
    ]  # fmt: skip
    for line in lines:
        program, *words = shlex.split(line.replace("fd_dinov2", "fd_random"))
        invoke(COMMANDS[program], *[re.sub("^500$", "8", word) for word in words])
    sheet = np.asarray(Image.open("runs/photos/sheet.png"))
    assert sheet.shape[1] == 8 * (128 + 4) + 4  # 64 images, enlarged
    for name in ("alone", "guided"):
        assert read_card(Path(f"runs/photos/{name}.json"))["results"]


def test_in_a_checkout_the_scripts_are_named(monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert advice._line("edm2kit-train", "--data", "my photos.zip").endswith(" train.py --data 'my photos.zip'")
    monkeypatch.setattr("sys.argv", ["/usr/bin/edm2kit-train"])
    assert advice._line("edm2kit-train").startswith("edm2kit-train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1s", "--channels", 16, "--throughput", 100], "no network learns from so few"),
        (["--budget", "3m", "--throughput", 100], "add its --channels"),
        (["--budget", "3m", "--channels", 17], "--channels 17: expected one of 16, 24"),
        (["--channels", 16], "--auto needs --data and --budget"),
        ([*GIVEN, "--lr", 0.1], "--auto decides about --lr"),
        ([*GIVEN, "--dropout", 0.1, "--workers", 1], "--auto decides about --dropout, --workers"),
        ([*GIVEN, "--preset", "pictures32"], "--auto decides about pictures32"),
    ],
)
def test_what_does_not_make_a_plan_is_refused(data, tmp_path, arguments, message):
    said = invoke(train.main, "--auto", "--data", data, "--outdir", tmp_path / "out", *arguments, code=1)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_is_never_overwritten_and_a_budget_needs_auto(data, tmp_path):
    invoke(train.main, "--auto", "--data", data, "--outdir", tmp_path / "out", *GIVEN)
    again = invoke(train.main, "--auto", "--data", data, "--outdir", tmp_path / "out", *GIVEN, code=1)
    assert "main.yaml exists; choose another --outdir" in again
    assert "--budget belongs to --auto" in invoke(train.main, "--budget", "3h", "--outdir", tmp_path / "x", code=1)


def test_speed_is_measured_in_complete_steps(data, monkeypatch):
    source = open_source(data)
    config = config_from_dict({**tiny.TINY, "data": str(data)}, "tiny")
    steps = []

    def step(self, micro_batches, rounds):
        steps.append([len(next(micro_batches).raw) for _ in range(rounds)])

    monkeypatch.setattr("edm2kit.training.throughput.Trainer.step", step)
    config = dataclasses.replace(config, batch_gpu=8)
    rate = images_per_sec(config, source, torch.device("cpu"), 0)
    assert steps == [[8, 8]] * 5  # two to warm up, three to measure
    assert 0 < rate < float("inf")


def test_the_measurement_chooses_the_width(data, tmp_path, monkeypatch):
    asked = []

    def measured(config, source, device, seconds):
        asked.append((config.network["model_channels"], config.precision))
        return 100_000 / config.network["model_channels"] ** 2 * (2 if config.precision == "bf16" else 1)

    monkeypatch.setattr("edm2kit.training.throughput.images_per_sec", measured)
    monkeypatch.setattr(advice, "slow_precision", lambda dtype, device: None)
    said = invoke(
        train.main, "--auto", "--data", data, "--outdir", tmp_path / "out", "--budget", "10m", "--device", "cpu"
    )
    assert asked == [(16, "fp32"), (16, "bf16"), (24, "bf16"), (32, "bf16"), (12, "bf16")]
    config = yaml.safe_load((tmp_path / "out" / "main.yaml").read_text())
    assert (config["precision"], config["network"]["model_channels"]) == ("bf16", 24)
    assert "Measuring how fast this machine (cpu) trains" in said
