"""The study: what it holds out, how it searches, what its settings mean for generate.py, and its tables."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edm2kit.cli import dataset, tune
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.presets import write_preset_file
from edm2kit.data.dataset import open_source
from edm2kit.experiments.cifar10 import measure, report, study
from edm2kit.experiments.cifar10.networks import describe, is_searched, search_folder, settings_file, words
from edm2kit.experiments.cifar10.settings import DETECTORS, INFINITY, LARGE_METRICS, METHODS, METRICS
from edm2kit.experiments.demo import pictures
from edm2kit.metrics.detectors.registry import DETECTORS as KNOWN_DETECTORS
from edm2kit.metrics.moments import FeatureStatistics, Moments
from edm2kit.metrics.reference import Reference, load_reference
from edm2kit.metrics.scoring import image_features, make_scorer, measure_reference
from edm2kit.snapshots.file_format import read_header, save_snapshot, snapshot_name
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from tests.support.fakes import tiny_snapshot


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


class Done:
    returncode = 0


def test_the_step_train_makes_every_network_and_the_copy_for_sims_from_the_main_one(out, monkeypatch):
    asked = []
    monkeypatch.setattr(study.subprocess, "run", lambda words: asked.append(words[2:]) or Done())
    study.main(["train", "--out", str(out), "--nimg", "2Mi"], standalone_mode=False)
    folders = [Path(words_of[words_of.index("--outdir") + 1]).name for words_of in asked if "--outdir" in words_of]
    assert folders == ["guide", "uncond", "main", "synthetic", "sims"]
    assert ["--duration" in words_of for words_of in asked] == [False, False, True, False, False, True]
    _, uncond, main, drawn, converted, sims = asked
    assert uncond[uncond.index("--cond") + 1] == "no"
    assert main[main.index("--data") + 1] == str(out / "train.zip")
    newest = drawn[drawn.index("--net") + 1]
    assert read_header(newest).nimg == 4096
    assert drawn[0] == "edm2kit.cli.generate"
    assert converted[:2] == ["edm2kit.cli.dataset", "convert"]
    assert (sims[sims.index("--init-from") + 1], sims[sims.index("--data") + 1]) == (
        newest,
        str(out / "synthetic.zip"),
    )


def test_the_copy_for_sims_waits_for_a_main_network_that_was_stopped(out, monkeypatch):
    asked = []
    monkeypatch.setattr(study.subprocess, "run", lambda words: asked.append(words) or Done())
    monkeypatch.setattr(Done, "returncode", study.stopped_exit_code())
    study.main(["train", "--out", str(out), "--hours", "1"], standalone_mode=False)
    assert [Path(words_of[words_of.index("--outdir") + 1]).name for words_of in asked] == ["guide", "uncond", "main"]


def test_distances_are_measured_from_all_training_images_by_the_first_detector(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "DETECTORS", ("fd_random", "fd_lite0"))
    monkeypatch.setattr(measure, "REAL_IMAGES", 5)
    images, _ = pictures.draw(0, range(12))
    (tmp_path / "photos").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "photos" / f"{k:02d}.png")
    words_of = ["convert", "--source", str(tmp_path / "photos"), "--dest", str(tmp_path / "train.zip")]
    dataset.main(words_of, standalone_mode=False)
    reference = load_reference(measure.reference_file(tmp_path))
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    assert reference.num_images == 12
    for name, rows in (("fd_random", pixels), ("fd_lite0", pixels[[0, 2, 5, 8, 11]])):
        expected = measure_reference(rows, [name]).of(name)
        np.testing.assert_allclose(reference.of(name).mean, expected.mean, rtol=1e-5)


@pytest.mark.parametrize("name", ["cifar10", "cifar10-guide", "cifar10-gpu"])
def test_its_training_presets_are_complete(name):
    config = config_from_dict(read_yaml(preset_path(name)), name)
    assert config.network["channel_mult"] in ([1, 3, 6], (1, 3, 6), [1, 2, 2], (1, 2, 2))


@pytest.mark.parametrize("name", METHODS)
def test_every_search_is_a_command_line_of_tune(out, name, monkeypatch):
    asked = {}
    monkeypatch.setattr(tune.search, "callback", lambda **given: asked.update(given))
    tune.main(measure.search_words(out, name, 30), standalone_mode=False)
    assert asked["budget"].images == 30 * METHODS[name].budget
    assert (asked["num"], asked["metric"]) == (30, "fd_lite0.fd_infinity")
    assert [guide for guide, _ in asked["guides"]] == list(METHODS[name].guides)
    request = parse_request([*asked["words"], "--net", "a.safetensors"])
    assert (request.sampler.solver, request.precision) == ("dpmpp2m", "bf16")


def test_searches_run_one_after_the_other_and_those_that_ended_are_skipped(out, monkeypatch):
    searched(out, "none", {"net": "main.safetensors"}, 80.0)
    asked = []
    monkeypatch.setattr(measure.subprocess, "run", lambda words_of: asked.append(words_of) or Done())
    monkeypatch.setattr(measure, "reference_file", lambda out: out / "reference.npz")
    measure.tune(out, 30, ["none", "cfg", "autoguidance"])
    assert [Path(words_of[words_of.index("--outdir") + 1]).name for words_of in asked] == [
        "cfg-4096",
        "autoguidance-4096",
    ]
    monkeypatch.setattr(Done, "returncode", 1)
    with pytest.raises(ValueError, match="the search of cfg ended with exit code 1"):
        measure.tune(out, 30, ["cfg"])


@pytest.fixture
def out(tmp_path):
    """A study with snapshots of two runs, whose EMA lengths are those that training stores."""
    for run, times in (("main", (2048, 4096)), ("guide", (2048,))):
        (tmp_path / "runs" / run).mkdir(parents=True)
        for nimg in times:
            for std in (0.05, 0.1):
                path = tiny_snapshot(tmp_path / "runs" / run / snapshot_name(nimg, std), label_dim=10)
                config = {**dataclasses.asdict(TrainConfig()), "data": "/home/me/train.zip"}
                header = dataclasses.replace(
                    read_header(path), nimg=nimg, ema_std=std, training_config=config, run_id=run
                )
                save_snapshot(path, load_file(path), header)
    return tmp_path


SAMPLER = {"solver": "dpmpp2m", "steps": "3", "precision": "fp32"}


def searched(out, name, options, value, trials=()):
    """What the search of a method leaves: its best settings and its record."""
    folder = search_folder(out, name)
    folder.mkdir(parents=True)
    for role, run, nimg in (("net", "main", 4096), ("gnet", "guide", 2048)):
        if role in options:
            shutil.copy(out / "runs" / run / snapshot_name(nimg, 0.1), folder / options[role])
    write_preset_file(folder / "preset.yaml", {**options, **SAMPLER}, {})
    curve = [{"weight": 1.5, "value": value + 1}, {"weight": 2.0, "value": value}] if "guidance" in options else []
    record = {name: 0 for name in ("unguided", "seconds", "combinations", "commit", "python", "torch", "numpy")}
    record |= {"hardware": "x86_64 CPU", "metric": "fd_lite0", "num_images": 30, "candidates": 3, "images_spent": 90}
    record |= {"value": value, "rungs": [10, 30], "weight_curve": {"num_images": 10, "points": curve}}
    record["trials"] = [{"key": json.dumps(key), "num_images": num, "value": value} for key, num, value in trials]
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "index.html").write_text("<html></html>")


@pytest.fixture
def ended(out):
    """A study whose searches have ended."""
    alone = ["none", 1.0, "main at 4,096 images, EMA 0.1", None, None]
    searched(out, "none", {"net": "main.safetensors"}, 80.0, [(alone, 10, 85.0), (alone, 30, 80.0)])
    cfg = {"net": "main.safetensors", "guidance-method": "cfg", "guidance": 1.5}
    searched(out, "cfg", cfg, 60.0)
    guided = {"net": "main.safetensors", "gnet": "guide.safetensors", "guidance-method": "autoguidance"}
    searched(out, "autoguidance", {**guided, "guidance": 2.0}, 50.0)
    trials = [(["none", 1.0, "main at 4,096 images, EMA 0.1", "None", None], 10, 1.0)]  # the unguided baseline
    for guide, num, value in (
        ("early at 2,048 images, EMA 0.1", 10, 55.0),
        ("early at 2,048 images, EMA 0.05", 10, 52.0),
        ("small at 2,048 images, EMA 0.1", 10, 48.0),
        ("small at 2,048 images, EMA 0.1", 30, 40.0),
    ):
        trials.append((["autoguidance", 2.5, "main at 4,096 images, EMA 0.1", guide, [0.5, 80.0]], num, value))
    searched(out, "autoguidance-interval", {**guided, "guidance": 2.5, "interval": "0.5,80"}, 40.0, trials)
    return out


def test_the_best_settings_are_a_preset_with_its_networks_in_half_precision(ended):
    path = settings_file(ended, "autoguidance-interval")
    request = parse_request(words(path))
    assert (request.guidance.weight, request.guidance.interval) == (2.5, (0.5, 80.0))
    assert read_header(request.gnet).dtype == "float16"
    assert read_header(request.net).training_config["data"] == "train.zip"
    original = load_file(ended / "runs" / "main" / snapshot_name(4096, 0.1))
    for name, tensor in load_file(request.net).items():
        torch.testing.assert_close(tensor.float(), original[name].float(), rtol=1e-3, atol=1e-6)
    record = describe(ended, path)
    assert [record["net"][key] for key in ("run", "nimg", "ema_std")] == ["main", 4096, 0.1]
    assert [record["gnet"][key] for key in ("run", "nimg", "ema_std")] == ["guide", 2048, 0.1]
    assert parse_request(words(path, guidance=3.0)).guidance.weight == 3.0
    text = "EMA 0.1, guide guide at 2Ki, EMA 0.1, w 2.5, sigma in (0.5, 80]"
    assert report.setting_text(record) == text
    assert report.setting_text({**record, "guidance-also": "cfg=1.5"}) == f"{text}, with cfg=1.5"
    with pytest.raises(ValueError, match="run the step tune for combination"):
        settings_file(ended, "combination")


def test_a_main_network_that_was_trained_further_is_searched_again(ended):
    path = ended / "runs" / "main" / snapshot_name(4096, 0.1)
    save_snapshot(path, load_file(path), dataclasses.replace(read_header(path), nimg=8192))
    assert not is_searched(ended, "none")


def point(method, images, num, value, setting):
    results = {metric: value for metric in METRICS}
    bounds = {metric: [value - 1, value + 1] for metric in METRICS}
    key = {"method": method, "images": images, "num": num, "setting": setting}
    return {"key": key, "results": results, "intervals": bounds}


@pytest.fixture
def record(ended):
    points = [point("real", "0-8", 9, 20.0, None), point("real", "all", 29, 19.0, None)]
    none, guided = (describe(ended, settings_file(ended, name)) for name in ("none", "autoguidance-interval"))
    points += [point("none", "all", 30, 70.0, {**none, "steps": "4"}), point("none", "all", 30, 77.0, none)]
    points += [point("autoguidance-interval", "all", 30, 41.0, guided)]
    (ended / "scores.json").write_text(json.dumps(points))
    for run in ("main", "guide"):
        (ended / "runs" / run / "stats.jsonl").write_text('{"nimg": 4096}\n')
        (ended / "runs" / run / "config.yaml").write_text("data: /home/me/train.zip\n")
    return report.study_record(ended)


def test_the_tables_show_the_scores_of_the_best_settings_only(record):
    parts = {**report.document_parts(record), **report.first_parts(record)}
    assert "| no guidance | 77.0 (76.0 to 78.0) |" in parts["cifar10"]
    assert "70.0" not in parts["cifar10"] + parts["scores"]
    assert "| autoguidance in an interval | 41.0 (40.0 to 42.0) |" in parts["cifar10"]
    assert "30 images each" in parts["cifar10"]
    assert "| 29 held-out photos | 19.0" in parts["cifar10"]
    assert "|  | 0-8 | 20.0 |" in parts["scores"]
    assert "| no guidance | EMA 0.1 | 80.0 (fd_lite0 of 30) | 3 |" in parts["settings"]
    rows = ["| small at 2,048 images | 48.0 | 1 |", "| early at 2,048 images | 52.0 | 2 |"]
    assert parts["guides"].splitlines()[2:] == rows
    assert record["runs"]["main"] == {"config": {"data": "train.zip"}, "last_status": {"nimg": 4096}}
    assert "/home" not in json.dumps(record)


def test_many_images_have_a_table_of_their_own_with_the_change_from_no_guidance(record, ended):
    assert report.large_table(record) == "Not measured yet."
    for name, value in (("none", 50.0), ("autoguidance-interval", 20.0)):
        made = point(name, "all", 900, value, record["best"][name])
        made["key"]["detectors"] = ["fd_lite0"]
        made["results"] = {"fd_lite0": value, "fd_lite0.kid": value / 100, "fd_lite0.fd_infinity": value - 10}
        made["intervals"] = {}
        record["points"].append(made)
    lines = report.large_table(record).splitlines()
    assert lines[2] == "| no guidance | 900 | 50.0 |  | 40.0 |  | 0.5 |  |"
    assert lines[3] == "| autoguidance in an interval | 900 | 20.0 | -60.0% | 10.0 | -75.0% | 0.2 | -60.0% |"
    assert "900" not in report.document_parts(record)["scores"]


@pytest.mark.parametrize("large", [False, True])
def test_scores_of_many_images_are_those_of_the_first_detector_alone(ended, monkeypatch, large):
    def features(seed, num):
        return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))

    def statistics(rows):
        moments = Moments(4)
        moments.add(rows)
        return moments.mean_and_covariance()[1:]

    monkeypatch.setattr(measure, "open_images", lambda path: range(40))
    monkeypatch.setattr(measure, "real_features", lambda out, used: {name: features(99, 40) for name in used})
    monkeypatch.setattr(measure, "reference_file", lambda out: None)
    known = {
        name: FeatureStatistics(*statistics(features(99, 40)), KNOWN_DETECTORS[name].fingerprint) for name in DETECTORS
    }
    reference = Reference(40, known)
    monkeypatch.setattr(measure, "load_reference", lambda path: reference)
    fakes = {name: SimpleNamespace(name=name, fingerprint=None, net=None, num_features=4) for name in DETECTORS}
    monkeypatch.setattr(measure, "load_detectors", lambda names, device: [fakes[name] for name in names])
    monkeypatch.setattr(
        measure,
        "_generated_features",
        lambda out, file, first, num, used: {name: features(first, num) for name in used},
    )
    points = measure.score(ended, 20, ["none"], [0, 1000], lambda text: None, large=large)
    assert [point["key"]["images"] for point in points] == ["0-19", "1000-1019", "all"]
    assert points[-1]["key"].get("detectors") == (["fd_lite0"] if large else None)
    assert set(points[-1]["results"]) == set(LARGE_METRICS if large else (*METRICS, *INFINITY))
    again = measure.score(ended, 20, ["none"], [0, 1000], lambda text: None, large=not large)
    assert len(again) == 6  # neither kind stands for the other


def test_the_figure_has_a_curve_of_each_guided_method_and_the_unguided_value(record):
    figure = report.weight_figure(record)
    assert figure.count("<circle") == 6
    assert "no guidance" in figure
    assert report.best_guided(record) == "autoguidance-interval"


def test_the_box_gets_the_networks_of_the_best_settings_and_nothing_else(ended, record, monkeypatch):
    box = ended / "box"
    box.mkdir()
    (box / "cifar10-main9.safetensors").write_bytes(b"older")
    monkeypatch.setattr(report, "BOX", box)
    lines = []
    report.write_box(ended, record, lines.append)
    networks = ["cifar10-guide", "cifar10-main"]
    assert sorted(path.stem for path in box.glob("*.safetensors")) == networks
    request = parse_request(["--preset", str(box / "cifar10-autoguidance.yaml")])
    assert (request.guidance.weight, request.guidance.interval) == (2.5, (0.5, 80.0))
    assert request.gnet == str(box / f"{networks[0]}.safetensors")
    assert (request.sampler.num_steps, request.precision) == (3, "auto")
    cfg = parse_request(["--preset", str(box / "cifar10-cfg.yaml")])
    assert (cfg.guidance.method, cfg.net) == ("cfg", parse_request(["--preset", str(box / "cifar10.yaml")]).net)
    text = (box / f"{networks[1]}.md").read_text()
    assert "4,096 images seen" in text
    assert "fd_lite0 of 30 images: `cifar10` 77.0" in text
    assert read_header(box / f"{networks[1]}.safetensors").training_config["data"] == "train.zip"


@pytest.mark.parametrize(("limit", "own"), [(10, True), (0, False)])
def test_guidance_by_class_has_its_own_network_in_the_box_if_there_is_room(ended, record, monkeypatch, limit, own):
    net = search_folder(ended, "cfg") / "main.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(net).items()}
    save_snapshot(net, tensors, read_header(net))
    box = ended / "box"
    monkeypatch.setattr(report, "BOX", box)
    monkeypatch.setattr(report, "BOX_MB", limit)
    report.write_box(ended, record, lambda text: None)
    nets = [parse_request(["--preset", str(box / f"{name}.yaml")]).net for name in ("cifar10", "cifar10-cfg")]
    assert (nets[0] != nets[1]) == own
    assert len(list(box.glob("cifar10-main*.safetensors"))) == 1 + own


def test_features_that_are_known_score_as_their_images_do():
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, [40, 3, 8, 8], np.uint8))
    scorer = make_scorer(measure_reference(images[:20], ["fd_random"]), torch.device("cpu"))
    features = image_features(images[20:], scorer.detectors, torch.device("cpu"))
    assert scorer.measure_features(features).values == scorer.measure(images[20:]).values
