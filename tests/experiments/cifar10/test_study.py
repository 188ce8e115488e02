"""The study: what it holds out, how it searches, what its settings mean for generate.py, and its tables."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edm2kit.cli.generation_options import parse_request
from edm2kit.data.dataset import open_source
from edm2kit.experiments.cifar10 import measure, report, study
from edm2kit.experiments.cifar10.networks import ema_file, words
from edm2kit.experiments.cifar10.settings import METHODS, METRICS, RUNS, START, Method, Setting, axis
from edm2kit.experiments.demo import pictures
from edm2kit.metrics.scoring import image_features, make_scorer, measure_reference
from edm2kit.snapshots.file_format import read_header, save_snapshot, snapshot_name
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from tests.support.fakes import tiny_snapshot

SAMPLER = ("--solver", "dpmpp2m", "--steps", "3")


def test_the_last_images_of_each_class_are_held_out():
    held_out = study.last_of_each_class(np.array([0, 1, 0, 0, 1, 2]), 1)
    assert held_out.tolist() == [False, False, False, True, True, True]


def test_the_step_data_divides_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HELD_OUT_PER_CLASS", 1)
    images, _ = pictures.draw(0, range(12))
    for k, (image, kind) in enumerate(zip(images, np.arange(12) % 3, strict=True)):
        folder = tmp_path / "photos" / f"kind{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k:02d}.png")
    words_of = ["data", "--source", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    study.main(words_of, standalone_mode=False)
    train, heldout = (open_source(tmp_path / "out" / name) for name in ("train.zip", "heldout.zip"))
    assert (len(train), len(heldout)) == (9, 3)
    assert heldout.labels.tolist() == [0, 1, 2]
    # folder by folder: the pictures k = 0, 3, 6, 9 are of kind 0
    np.testing.assert_array_equal(heldout.read(np.arange(1))[0], images[9].transpose(2, 0, 1))
    assert not (train.read(np.arange(9))[:, None] == heldout.read(np.arange(3))[None]).all(axis=(2, 3, 4)).any()


def test_the_step_train_continues_runs_with_the_command_of_training(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study.subprocess, "run", lambda words: asked.append(words) or Done())
    options = ["--out", str(tmp_path), "--hours", "1.5", "--nimg", "2Mi"]
    study.main(["train", *options, "--from-box", "--only", "main"], standalone_mode=False)
    (words_of,) = asked
    assert words_of[2:5] == ["edm2kit.cli.train", "--preset", "cifar10"]
    assert words_of[words_of.index("--max-time") + 1] == "1.5h"
    assert words_of[words_of.index("--duration") + 1] == "2Mi"
    assert read_header(words_of[words_of.index("--init-from") + 1]).nimg > 1 << 16
    study.main(["train", *options], standalone_mode=False)
    assert [words_of[4] for words_of in asked[1:]] == ["cifar10-guide", "cifar10"]
    assert "--duration" not in asked[1]


class Done:
    returncode = 0


@pytest.mark.parametrize("name", [*RUNS.values(), "cifar10-gpu"])
def test_its_training_presets_are_complete(name):
    config = config_from_dict(read_yaml(preset_path(name)), name)
    assert config.network["channel_mult"] in ([1, 3, 6], (1, 3, 6), [1, 2, 2], (1, 2, 2))


class Bowl:
    """Trials whose score is known: 0 at weight 2, EMA 0.07."""

    def __init__(self):
        self.asked = []

    def value(self, setting):
        self.asked.append(setting)
        return (setting.weight - 2) ** 2 + 100 * (setting.ema - 0.07) ** 2


def test_the_search_keeps_the_best_of_each_axis():
    trials = Bowl()
    method = Method("x", [axis("weight", 1.0, 2.0, 3.0), axis("ema", 0.05, 0.07)], {"guide": "uncond", "weight": 9.0})
    best = measure.search(method, START, trials)
    assert (best.weight, best.ema, best.guide) == (2.0, 0.07, "uncond")
    assert {setting.weight for setting in trials.asked if setting.ema == 0.05} == {2.0}


def test_a_setting_survives_its_record():
    setting = Setting(0.1, 4096, "guide", 2048, 0.15, 2.5, (0.3, math.inf), SAMPLER)
    assert measure.setting_from_json(json.loads(json.dumps(measure.plain_json(measure.asdict(setting))))) == setting
    text = "EMA 0.10, guide guide at 2Ki, EMA 0.15, w 2.5, sigma in (0.3, inf]"
    assert measure.describe(setting) == text


@pytest.fixture
def out(tmp_path):
    """A study with snapshots of two runs, whose EMA lengths are those that training stores."""
    for run, times in (("main", (2048, 4096)), ("guide", (2048,))):
        (tmp_path / "runs" / run).mkdir(parents=True)
        for nimg in times:
            for std in (0.05, 0.1):
                path = tiny_snapshot(tmp_path / "runs" / run / snapshot_name(nimg, std), label_dim=10)
                config = {**dataclasses.asdict(TrainConfig()), "data": "/home/me/train.zip"}
                header = dataclasses.replace(read_header(path), nimg=nimg, ema_std=std, training_config=config)
                save_snapshot(path, load_file(path), header)
    return tmp_path


def test_the_options_of_a_setting_name_its_networks(out):
    request = parse_request(words(out, Setting(0.1, None, "guide", 2048, 0.05, 2.5, (0.3, math.inf), SAMPLER)))
    assert request.net == str(ema_file(out, "main", 4096, 0.1))
    assert request.gnet == str(ema_file(out, "guide", 2048, 0.05))
    guidance = request.guidance
    assert (guidance.method, guidance.weight, guidance.interval) == ("autoguidance", 2.5, (0.3, math.inf))
    assert (request.sampler.solver, request.sampler.num_steps) == ("dpmpp2m", 3)
    cfg = parse_request(words(out, Setting(0.1, 2048, "uncond", weight=1.5)))
    assert (cfg.guidance.method, cfg.gnet, cfg.guidance.interval) == ("cfg", None, None)
    with pytest.raises(ValueError, match="has no snapshots yet"):
        words(out, Setting(0.1, None, "other", 2048, 0.05, 2.0))


def test_every_start_and_axis_is_a_setting():
    best = {}
    for name, method in METHODS.items():
        start = (START if method.base is None else best[method.base]).with_values(method.start)
        for values in method.axes:
            assert len(values) > 1
            for value in values:
                start.with_values(value)
        best[name] = start


def point(method, images, num, value, setting=None):
    results = {metric: value for metric in METRICS}
    bounds = {metric: [value - 1, value + 1] for metric in METRICS}
    key = {"method": method, "images": images, "num": num, "setting": setting, "files": {}}
    return {"key": key, "results": results, "intervals": bounds}


@pytest.fixture
def record():
    none, guided = ({"ema": ema, "weight": weight} for ema, weight in ((0.1, 1.0), (0.05, 2.0)))
    others = {"interval": [0.0, "inf"], "guide": None, "sampler": [], "nimg": None, "guide_nimg": None}
    none, guided = ({**values, **others, "guide_ema": None} for values in (none, guided))
    trials = [{"key": {"setting": none}, "value": 80.0}, {"key": {"setting": guided}, "value": 40.0}]
    trials.append({"key": {"setting": {**guided, "weight": 3.0}}, "value": 50.0})
    points = [point("real", "0-9", 10, 20.0), point("real", "all", 30, 19.0)]
    points += [point("none", "all", 30, 70.0, {**none, "ema": 0.2}), point("none", "all", 30, 77.0, none)]
    points += [point("autoguidance", "all", 30, 41.0, guided)]
    return {"trials": trials, "best": {"none": none, "autoguidance": guided}, "points": points}


def test_the_tables_show_the_scores_of_the_best_settings_only(record):
    parts = {**report.document_parts(record), **report.first_parts(record)}
    assert "| no guidance | 77.0 (76.0 to 78.0) |" in parts["cifar10"]
    assert "70.0" not in parts["cifar10"] + parts["scores"]
    assert "| autoguidance | 41.0 (40.0 to 42.0) |" in parts["cifar10"]
    assert "30 images each" in parts["cifar10"]
    assert "|  | 0-9 | 20.0 |" in parts["scores"]
    assert "| no guidance | EMA 0.10 | 80.0 |" in parts["settings"]


def test_the_figure_has_a_curve_of_each_guided_method_and_the_unguided_value(record):
    figure = report.weight_figure(record)
    assert figure.count("<circle") == 2
    assert "no guidance" in figure
    assert report.best_guided({"autoguidance": None}, record) == "autoguidance"


def test_the_box_gets_the_networks_of_the_best_settings_and_nothing_else(out, tmp_path, monkeypatch):
    box = tmp_path / "box"
    box.mkdir()
    (box / "cifar10-main9.safetensors").write_bytes(b"older")
    monkeypatch.setattr(report, "BOX", box)
    guided = Setting(0.1, None, "guide", 2048, 0.05, 2.5, (0.5, 80.0), SAMPLER)
    best = {"none": Setting(0.1, sampler=SAMPLER), "cfg": Setting(0.1, guide="uncond", weight=1.5, sampler=SAMPLER)}
    best |= {"autoguidance": guided.with_values({"weight": 2.0}), "autoguidance-interval": guided}
    plain = {name: measure.plain_json(dataclasses.asdict(setting)) for name, setting in best.items()}
    (out / "best.json").write_text(json.dumps(plain))
    trials = [{"key": {"setting": plain["autoguidance"]}, "value": 3.0}]
    trials.append({"key": {"setting": plain["autoguidance-interval"]}, "value": 2.0})
    points = [point("none", "all", 30, 77.0, plain["none"])]
    lines = []
    report.write_box(out, {"trials": trials, "best": plain, "points": points}, lines.append)
    networks = ["cifar10-guide", "cifar10-main"]
    assert sorted(path.stem for path in box.glob("*.safetensors")) == networks
    request = parse_request(["--preset", str(box / "cifar10-autoguidance.yaml")])
    assert (request.guidance.weight, request.guidance.interval) == (2.5, (0.5, 80.0))
    assert request.gnet == str(box / f"{networks[0]}.safetensors")
    assert request.sampler.num_steps == 3
    assert parse_request(["--preset", str(box / "cifar10-cfg.yaml")]).guidance.method == "cfg"
    text = (box / f"{networks[1]}.md").read_text()
    assert "4,096 images seen" in text
    assert "fd_lite0 of 30 images: `cifar10` 77.0" in text
    assert read_header(box / f"{networks[1]}.safetensors").training_config["data"] == "train.zip"


def test_features_that_are_known_score_as_their_images_do():
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, [40, 3, 8, 8], np.uint8))
    scorer = make_scorer(measure_reference(images[:20], ["fd_random"]), torch.device("cpu"))
    features = image_features(images[20:], scorer.detectors, torch.device("cpu"))
    assert scorer.measure_features(features).values == scorer.measure(images[20:]).values
