"""edm2kit-tune from end to end on tiny networks, and everything that it refuses before work starts."""

import builtins
import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from edm2kit.cli import generate, tune
from edm2kit.cli import metrics as calculate_metrics
from edm2kit.experiments.tune.objective import FIRST_SEED
from edm2kit.training.config import read_yaml
from tests.support import tiny
from tests.support.tuning import make_run

SHARED = ("--steps", 2, "--balanced")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    make_run(folder / "main", seed=0)
    make_run(folder / "small", seed=1, times=(1000, 2000))
    make_run(folder / "big", seed=2, times=(1000,), img_resolution=16)
    make_run(folder / "uncond", seed=3, times=(1000,), stds=(0.1,), label_dim=0)
    tiny.make_dataset(folder / "data", 24)
    words = ["--data", folder / "data", "--dest", folder / "ref.npz", "--metrics", "fd_random", "--device", "cpu"]
    assert invoke(calculate_metrics.main, "ref", *words).exit_code == 0
    return folder


def invoke(command, *words):
    return CliRunner().invoke(command, [str(word) for word in words])


def search(place, outdir, *more, guide="small", shared=SHARED, main="main", metric="fd_random", budget="60img"):
    guides = [] if guide is None else ["--guide", place / guide]
    return invoke(
        tune.main, "search", "--main", place / main, *guides, "--ref", place / "ref.npz", "--metric", metric,
        "--budget", budget, "--num", 12, "--halvings", 1, "--outdir", outdir, "--device", "cpu", *more, "--", *shared,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(place):
    done = search(place, place / "found")
    assert done.exit_code == 0, done.output
    return done.output, json.loads((place / "found" / "result.json").read_text())


def test_a_search_spends_its_budget_and_confirms_on_fresh_seeds(place, found):
    output, result = found
    assert "Budget:   60 images" in output
    assert "s per image" in output
    assert result["images_spent"] <= 60
    assert result["rungs"] == [4, 12]
    assert result["num_images"] == 12
    points = result["confirmation"]["points"]
    assert [(one["way"], one["first_seed"]) for one in points] == [
        (way, first) for first in (0, 12, 24) for way in ("unguided", "best")
    ]
    for point in points:
        low, high = point["interval"]
        assert low < point["value"] < high
    assert {"commit", "hardware", "command"} <= set(result)
    assert result["value"] == min(one["value"] for one in result["trials"] if one["num_images"] == 12)


def test_scores_are_those_of_calculate_metrics_for_the_same_seeds(place, found, tmp_path):
    plain = next(one for one in found[1]["trials"] if one["values"] == {"way": "unguided"} and one["num_images"] == 12)
    net = next((place / "main").glob("*3-0.100*"))
    done = invoke(
        calculate_metrics.main, "gen", "--net", net, *SHARED, "--num", 12, "--seed", FIRST_SEED, "--ref",
        place / "ref.npz", "--device", "cpu", "--record", tmp_path / "r.json", "--batch", 5,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    expected = json.loads((tmp_path / "r.json").read_text())["results"]["fd_random"]["min"]
    assert plain["results"]["fd_random"] == pytest.approx(expected, rel=1e-4)


def test_the_preset_makes_the_images_that_were_confirmed(place, found, tmp_path):
    preset = place / "found" / "preset.yaml"
    options = read_yaml(preset)["options"]
    assert (options["steps"], options["balanced"]) == ("2", True)
    assert f"generate.py --preset {preset}" in found[0]
    done = invoke(
        calculate_metrics.main, "gen", "--preset", preset, "--num", 12, "--seed", 12, "--ref", place / "ref.npz",
        "--device", "cpu", "--record", tmp_path / "r.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    value = json.loads((tmp_path / "r.json").read_text())["results"]["fd_random"]["min"]
    (point,) = (p for p in found[1]["confirmation"]["points"] if (p["way"], p["first_seed"]) == ("best", 12))
    assert value == pytest.approx(point["value"], rel=1e-4)
    done = invoke(generate.main, "--preset", preset, "--seeds", "0-1", "--outdir", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 0, done.output


def test_the_page_has_figures_a_slider_and_nothing_from_elsewhere(place, found):
    text = (place / "found" / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert text.count("<svg") >= 1
    assert "Confirmation on fresh seeds" in text
    if "autoguidance" in found[1]["best"]:
        assert text.count('class="slider"') == 1
        assert (place / "found" / "weight.svg").read_text().startswith("<svg")
    assert (place / "found" / "progress.svg").exists()


def test_the_same_command_again_repeats_nothing_and_other_settings_are_refused(place, found):
    before = (place / "found" / "result.json").stat().st_mtime_ns
    features = {file.name: file.stat().st_mtime_ns for file in (place / "found" / "features").iterdir()}
    again = search(place, place / "found")
    assert again.exit_code == 0, again.output
    result = json.loads((place / "found" / "result.json").read_text())
    assert result["trials"] == found[1]["trials"]
    assert result["confirmation"] == found[1]["confirmation"]
    assert (place / "found" / "result.json").stat().st_mtime_ns > before
    assert {file.name: file.stat().st_mtime_ns for file in (place / "found" / "features").iterdir()} == features
    other = search(place, place / "found", "--weights", "1,2")
    assert other.exit_code == 1
    assert "holds a search with other settings (space.weights.autoguidance" in other.output


def test_a_candidate_that_goes_on_generates_only_what_is_missing_and_damaged_features_are_made_again(
    place, found, tmp_path
):
    trials = found[1]["trials"]
    assert sum(one["cost"] for one in trials) == found[1]["images_spent"]
    for key in {one["key"] for one in trials if one["num_images"] == 12}:
        assert sorted(one["cost"] for one in trials if one["key"] == key) == [4, 8]
    folder = shutil.copytree(place / "found", tmp_path / "found")
    file = next((folder / "features").iterdir())
    with np.load(file) as kept:
        assert len(kept["classes"]) == len(kept["fd_random"])
    file.write_bytes(b"PK broken")
    again = search(place, folder, budget="64img")
    assert again.exit_code == 0, again.output


def test_methods_of_the_registry_and_their_options_are_searched(place, tmp_path):
    done = search(
        place, tmp_path, "--method", "icg", "--method", "none", "--method", "cfg", "--interval", "none",
        guide="uncond", budget="30img",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "combinations of icg, none, cfg" in done.output
    result = json.loads((tmp_path / "result.json").read_text())
    ways = {one["values"]["way"] for one in result["trials"]}
    assert {"icg", "cfg", "none"} <= ways | {"none"}


REFUSALS = {
    "a budget without a unit": (dict(budget="60"), "is not a budget"),
    "a budget of nothing": (dict(budget="0h"), "allows nothing"),
    "a budget too small": (dict(budget="20img"), "is too small: the unguided network and one candidate take 24"),
    "a time too small": (dict(budget="0.0001s"), "is too small: at"),
    "no snapshots": (dict(main="data"), "found no training snapshots"),
    "no such run": (dict(main="nowhere"), "nowhere"),
    "a guide of another size": (dict(guide="big"), "does not fit the main network: its resolution is 16"),
    "nothing to search": (dict(guide=None), "give a --guide, or a --method"),
    "an unknown metric": (dict(metric="fd_light0"), "did you mean fd_lite0?"),
    "a metric without a direction": (dict(metric="vendi"), "is good near that of real images"),
    "a metric that the reference lacks": (dict(metric="fd_lite0"), "fd_lite0"),
    "a metric without real images": (dict(metric="fd_random.kid"), "kid needs real images; give --real"),
    "what the search chooses": (dict(shared=("--guidance", 2)), "--guidance is chosen by the search"),
    "an unknown option": (dict(shared=("--stepz", 2)), "stepz"),
    "a word": (dict(shared=("steps",)), "is not an option"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_refused_in_one_line_before_work_starts(place, tmp_path, case):
    changes, reason = REFUSALS[case]
    done = search(place, tmp_path / "out", **changes)
    assert done.exit_code in (1, 2), done.output
    assert reason in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "study.db").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--method", "pagg"), "there is no guidance method 'pagg'"),
        (("--method", "autoguidance", "--method", "icg", "--guide", "icg=x"), "x"),
        (("--method", "icg"), "none of the methods icg uses the guide small"),
        (("--age", "1500"), "has no snapshot at 1500 images; available: 1000, 2000"),
        (("--ema-main", "0.287"), "cannot be rebuilt well"),
        (("--ema-guide", "0.5"), "is not a list of EMA lengths"),
        (("--weights", "3,1"), "runs backwards"),
        (("--interval", "5,1"), "runs backwards"),
        (("--num", 40), "is too small"),
    ],
)
def test_options_that_do_not_fit_are_refused(place, tmp_path, more, reason):
    done = search(place, tmp_path / "out", *more)
    assert done.exit_code in (1, 2), done.output
    assert reason in done.output
    assert not (tmp_path / "out" / "study.db").exists()


def test_without_optuna_one_line_says_what_to_install(place, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *rest, **named):
        if name.split(".")[0] == "optuna":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    done = search(place, tmp_path / "out")
    assert done.exit_code == 1
    assert done.output.strip() == "Error: the search needs optuna. Run: pip install 'edm2kit[tune]'"
    assert not (tmp_path / "out").exists()


def test_a_probe_compares_guides_of_several_ages_and_other_methods(place, tmp_path):
    done = invoke(
        tune.main, "probe", "--main", place / "main", "--guide", f"weak={place / 'small'}", "--method", "autoguidance",
        "--method", "icg", "--data", place / "data", "--num", 8, "--levels", 3, "--outdir", tmp_path, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "probe.json").read_text())
    names = {level["guide"] for level in record["levels"]}
    assert names == {"icg", "autoguidance (weak at 1,000 images)", "autoguidance (weak at 2,000 images)"}
    assert len(record["levels"]) == 9
    assert "Wrote" in done.output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("--num", 1000), "has 24 images, fewer than --num 1000"),
        (("--ema-main", "0.05,0.1"), "takes one EMA length"),
        (("--method", "none"), "none of the methods none uses the guide"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_a_probe_refuses_what_it_cannot_do(place, tmp_path, changes, reason):
    words = {"--data": place / "data", "--num": 8, changes[0]: changes[1]}
    flat = [part for pair in words.items() for part in pair]
    done = invoke(
        tune.main, "probe", "--main", place / "main", "--guide", place / "small", *flat, "--outdir", tmp_path / "out",
        "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert reason in done.output
    assert not (tmp_path / "out").exists()
