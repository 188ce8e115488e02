"""The ablations: every combination is measured once, with the guides that the study trains, and shown."""

import dataclasses
import json

import click
import pytest
from safetensors.torch import load_file

from edm2kit.experiments.cifar10 import ablation, study
from edm2kit.experiments.cifar10.ablation import combinations, degradation_table, ema_figure
from edm2kit.experiments.tune.table import SweepTable
from edm2kit.snapshots.file_format import read_header, save_snapshot, snapshot_name
from tests.support.fakes import tiny_snapshot


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ablation, "DEGRADATIONS", (("less training", "early", 1000), ("both", "small", 2000)))
    monkeypatch.setattr(ablation, "WEIGHTS", (1.5, 2.5))
    monkeypatch.setattr(ablation, "EMA_MAIN", (0.05, 0.1))
    monkeypatch.setattr(ablation, "EMA_GUIDE", (0.07, 0.1))
    monkeypatch.setattr(ablation, "GRID_GUIDE", ("early", 1000))


def value_of(age, weight, ema_main, ema_guide):
    return 10 + age / 1000 + abs(weight - 2.5) + 10 * abs(ema_main - 0.05) + ema_guide


def test_the_default_has_each_combination_once():
    found = [json.dumps(setting) for setting in combinations()]
    assert len(set(found)) == len(found) == 8 * 4 + 4 * 4 - 1


def test_combinations_are_measured_once_and_shown(small, tmp_path, monkeypatch):
    asked = []

    def sweep(main, reference, weights, **settings):
        asked.append((settings["guides"], settings["ages"], weights))
        assert (settings["num"], settings["device"]) == (30, "cpu")
        value = value_of(settings["ages"][0], weights[0], settings["ema_main"][0], settings["ema_guide"][0])
        (name,) = settings["metrics"]
        return SweepTable(({name: value},), (name,), 30)

    monkeypatch.setattr(ablation, "sweep", sweep)
    monkeypatch.setattr(ablation, "reference_file", lambda out: out / "reference.npz")
    words = ["ablation", "--out", str(tmp_path), "--num", "30"]
    further = r"runs/.*at 0\. Train it further: .* --only (main --nimg 1000|guide --nimg 2000)"
    with pytest.raises(click.ClickException, match=further):
        study.main(words, standalone_mode=False)
    for run, nimg in (("main", 1000), ("guide", 2000)):
        path = tmp_path / "runs" / run / snapshot_name(nimg, 0.1)
        path.parent.mkdir(parents=True)
        tiny_snapshot(path, label_dim=10)
        save_snapshot(path, load_file(path), dataclasses.replace(read_header(path), nimg=nimg))
    for _ in range(2):
        study.main(words, standalone_mode=False)
    assert len(asked) == 4 + 3
    assert asked[2] == ({"small": tmp_path / "runs" / "guide"}, [2000], [1.5])
    rows = json.loads((tmp_path / "ablation.json").read_text())
    assert degradation_table(rows).splitlines()[2:] == [
        "| less training | early | 1,000 | 12.1 | **11.1** |",
        "| both | small | 2,000 | 13.1 | **12.1** |",
    ]
    figure = ema_figure(rows)
    assert "EMA of the guide" in figure
    assert "11.6" in figure  # 0.1 and 0.1


def test_what_is_not_measured_is_left_empty(small):
    assert degradation_table([]) == "Not measured yet."
    assert ema_figure([]) is None
    setting = {"guide": "early", "age": 1000, **ablation.USUAL, "weight": 2.5}
    rows = [{"setting": setting, "num": 5, "value": 7.0}, {"setting": setting, "num": 50, "value": 8.0}]
    assert degradation_table(rows).splitlines()[2:] == [
        "| less training | early | 1,000 |  | **8.0** |",
        "| both | small | 2,000 |  |  |",
    ]
