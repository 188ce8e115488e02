"""The search of training settings: what is tried, what is kept, and its table."""

import dataclasses
import json
import re
from types import SimpleNamespace

import click
import pytest
from safetensors.torch import load_file

from edm2kit.cli import train
from edm2kit.experiments.cifar10 import study, training_settings
from edm2kit.experiments.cifar10.training_settings import METRICS, TRIED, settings_table
from edm2kit.snapshots.file_format import read_header, save_snapshot, snapshot_name
from edm2kit.training.config import TrainConfig
from tests.support.fakes import tiny_snapshot


@pytest.mark.parametrize("name", TRIED)
def test_every_setting_changes_what_its_options_name_and_nothing_else(name):
    words = ["--outdir", "run", "--data", "images.zip", "--preset", "cifar10"]
    plain, tried = (train.main.make_context("train.py", [*words, *more]).params for more in ((), TRIED[name][1]))
    changed = {key for key in plain if plain[key] != tried[key]}
    assert len(changed) == len(TRIED[name][1]) / 2
    numbers = re.findall(r"-?\d+(?:\.\d+)?", TRIED[name][0].replace(",000", "000"))
    assert set(numbers) <= set(TRIED[name][1])  # the title says what is tried


def test_each_is_trained_and_scored_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_settings, "TRIED", dict(list(TRIED.items())[:3]))
    started, scored = [], []

    def run(words):
        started.append(words)
        folder = tmp_path / "settings" / words[words.index("--outdir") + 1].rsplit("/", 1)[1]
        path = tiny_snapshot(folder / snapshot_name(2048, 0.1))
        config = {**dataclasses.asdict(TrainConfig()), "data": "/home/me/train.zip"}
        save_snapshot(path, load_file(path), dataclasses.replace(read_header(path), training_config=config))
        return SimpleNamespace(returncode=0)

    def score(out, snapshot, num):
        scored.append((snapshot.parent.name, num))
        value = 100.0 - 7 * len(scored)
        return SimpleNamespace(
            values=dict.fromkeys(METRICS, value), intervals={metric: (value - 1, value + 2) for metric in METRICS}
        )

    monkeypatch.setattr(training_settings, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(training_settings, "_score", score)
    words = ["settings", "--out", str(tmp_path), "--nimg", "2Ki", "--num", "5", "--device", "cuda"]
    for _ in range(2):
        study.main(words, standalone_mode=False)
    assert scored == [("base", 5), ("seed_2", 5), ("lr_0p01", 5)]
    assert [words[words.index("--device") + 1] for words in started] == ["cuda"] * 3
    assert started[2][started[2].index("--lr") + 1] == "0.01"
    assert all(words[words.index("--duration") + 1] == "2048" for words in started)
    points = json.loads((tmp_path / "settings.json").read_text())
    assert "/home" not in json.dumps(points)
    assert settings_table(points).splitlines()[2:] == [
        "| the preset | 93.0 (92.0 to 95.0) |  | 93.0 | 93.000 | 93.000 |",
        "| the preset, another seed | 86.0 (85.0 to 88.0) | -7.0 | 86.0 | 86.000 | 86.000 |",
        "| learning rate 0.01 | 79.0 (78.0 to 81.0) | -14.0 | 79.0 | 79.000 | 79.000 |",
    ]
    assert "the preset, another seed: fd_lite0 86" in capsys.readouterr().out


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    failing = SimpleNamespace(run=lambda words: SimpleNamespace(returncode=1))
    monkeypatch.setattr(training_settings, "subprocess", failing)
    with pytest.raises(click.ClickException, match="the training run base ended with exit code 1"):
        study.main(["settings", "--out", str(tmp_path)], standalone_mode=False)


def test_without_measurements_the_page_says_so():
    assert settings_table([]) == "Not measured yet."
