"""The toy's command line, its record, page and pictures."""

import importlib.util
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli.toy import main
from edm2kit.experiments.toy import evaluation, page, report
from edm2kit.experiments.toy.measures import MEASURES
from edm2kit.experiments.toy.methods import TOY_METHODS, Nets
from edm2kit.experiments.toy.model import ToyNet
from edm2kit.experiments.toy.training import RECIPES, load_network, network_path, save_network
from tests.support.browser import dump, needs_browser, with_script
from tests.support.fakes import Gaussian


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def outdir(tmp_path):
    """Untrained networks of two seeds, and few methods to compare."""
    everything = dict(TOY_METHODS)
    for name in set(everything) - {"autoguidance", "cfg", "truncation"}:
        del TOY_METHODS[name]
    for seed in range(2):
        torch.manual_seed(seed)
        for role, recipe in RECIPES.items():
            save_network(network_path(tmp_path, role, seed), ToyNet(recipe.width), recipe, seed)
    yield tmp_path
    TOY_METHODS.clear()  # the order matters too: it is that of the tables
    TOY_METHODS.update(everything)


@pytest.fixture(scope="module")
def record():
    """A record of made-up numbers: measure number k of seed s is k + s / 10."""
    rows = [("truth", 1.0), ("unguided", 1.0)] + [(name, w) for name, m in TOY_METHODS.items() for w in m.weights]
    return {
        "command": "toy_example.py evaluate",
        "elapsed_sec": 90.0,
        "provenance": {"commit": "abc", "torch": "2.9", "hardware": "a CPU"},
        "training_seeds": [0, 1],
        "num_samples": 64,
        "num_steps": 32,
        "sigma_max": 5.0,
        "rows": [
            {"method": name, "weight": w, "seed": seed, **{key: k + seed / 10 for k, key in enumerate(MEASURES)}}
            for seed in range(2)
            for name, w in rows
        ],
    }


# ---- the record and what is made from it


@pytest.mark.slow
def test_evaluate_writes_a_record_with_its_origin_and_a_row_for_everything(outdir):
    result = run("evaluate", "--outdir", outdir, "--training-seeds", 2, "--samples", 1400, "--no-compile")
    assert result.exit_code == 0, result.output
    found = evaluation.load_record(outdir)
    assert found["training_seeds"] == [0, 1]
    assert set(found["provenance"]) >= {"commit", "hardware", "torch"}
    curves = [(name, weight) for name, method in TOY_METHODS.items() for weight in method.weights]
    for seed in range(2):
        rows = [row for row in found["rows"] if row["seed"] == seed]
        assert [(row["method"], row["weight"]) for row in rows] == [("truth", 1.0), ("unguided", 1.0), *curves]
        assert all(set(MEASURES) < set(row) for row in rows)
    assert (outdir / "tradeoff.pdf").read_bytes().startswith(b"%PDF")


def test_a_record_is_read_back_as_it_was_written(tmp_path, record):
    evaluation.save_record(tmp_path, record)
    assert evaluation.load_record(tmp_path) == record


def test_a_summary_is_the_mean_and_spread_over_seeds(record):
    found = evaluation.summary(record, "cfg", 4.0)["mean_log_density"]
    assert (found.mean, found.std) == (pytest.approx(1.05), pytest.approx(0.1 / 2**0.5))
    with pytest.raises(ValueError, match="no row of cfg at weight 9"):
        evaluation.summary(record, "cfg", 9.0)


def test_tables_show_mean_and_spread(record):
    lines = report.table(record, (("truth", 1.0), ("cfg", 4.0))).splitlines()
    assert [line.count("|") for line in lines] == [len(MEASURES) + 3] * 4
    assert lines[3].startswith("| Classifier-free guidance | 4 | 0.050 ± 0.071 | 1.05 ± 0.07 |")


def test_the_document_s_parts_show_every_method(record):
    parts = report.document_parts(record)
    assert all(f"| {method.title} |" in parts["every weight"] for method in TOY_METHODS.values())
    assert "Mean and standard deviation over 2 training seeds, 64 samples each" in parts["highlights"]
    assert "`toy_example.py evaluate` in 2 minutes" in parts["origin"]


def test_publishing_copies_record_and_pictures_and_fills_the_document(tmp_path, record):
    outdir, checkout = tmp_path / "out", tmp_path / "checkout"
    evaluation.save_record(outdir, record)
    (checkout / "docs").mkdir(parents=True)
    marks = [f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in report.document_parts(record)]
    (checkout / "docs" / "toy.md").write_text("".join(marks))
    with pytest.raises(ValueError, match=r"has no figure1\.png, figure2\.png, tradeoff\.png"):
        report.publish(outdir, checkout)
    for name in report.PICTURES:
        (outdir / name).write_bytes(name.encode())
    report.publish(outdir, checkout)
    assert evaluation.load_record(checkout / "experiments" / "toy") == record
    assert (checkout / "experiments" / "toy" / "figure2.png").read_bytes() == b"figure2.png"
    assert report.table(record) in (checkout / "docs" / "toy.md").read_text()


# ---- pictures and the page


@pytest.mark.slow
def test_plot_draws_figures_for_print_and_screen(outdir):
    result = run("plot", "--outdir", outdir)
    assert result.exit_code == 0, result.output
    for name in ("figure1", "figure2"):
        png = (outdir / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert width == 3000
        assert 600 < height < 1200
        assert (outdir / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture(scope="module")
def slider_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "toy.html"
    nets = Nets(Gaussian(0.4, 0.10), Gaussian(0.4, 0.13), Gaussian(0.1, 0.2))
    page.write(nets, seed=0, path=path, num=32)
    return path


def data_of(path: Path) -> dict:
    return json.loads(re.search(r"^const data = (.*);$", path.read_text(encoding="utf-8"), re.MULTILINE)[1])


def test_the_page_holds_all_it_needs(slider_page):
    text, data = slider_page.read_text(encoding="utf-8"), data_of(slider_page)
    assert not re.search(r"https?://|<link|src=|@import|url\(", text)
    assert list(data["methods"]) == list(TOY_METHODS)
    for one in data["methods"].values():
        assert one["weights"][0] == 1
        assert len(one["weights"]) == len(one["stops"])
        # no guidance is the same for all
        assert one["stops"][0] == data["methods"]["cfg"]["stops"][0]
        assert one["stops"][-1]["points"] != one["stops"][0]["points"]


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_and_moves_the_slider(slider_page, tmp_path):
    def shown(path: Path, fragment: str = "") -> str:
        document, console = dump(path, fragment)
        assert console == []
        return re.search(r'<p id="status"[^>]*>(.*?)</p>', document)[1]

    data = data_of(slider_page)["methods"]["cfg"]
    assert shown(slider_page).startswith(f"{TOY_METHODS['autoguidance'].title}, w = 1: ")
    at_four = f"{TOY_METHODS['cfg'].title}, w = 4: {100 * data['stops'][-1]['measured']['outside']:.1f}% of the samples"
    assert shown(slider_page, "#method=cfg&w=4").startswith(at_four)
    script = """
      byId("method").value = "cfg"; byId("method").dispatchEvent(new Event("change"));
      byId("weight").value = byId("weight").max; byId("weight").dispatchEvent(new Event("input"));
    """
    assert shown(with_script(slider_page, tmp_path / "moved.html", script)).startswith(at_four)


def test_outlines_are_closed_also_where_the_window_cuts_the_tree(slider_page):
    for lines in data_of(slider_page)["outlines"].values():
        for line in lines:
            assert max(abs(line[0] - line[-2]), abs(line[1] - line[-1])) < 0.02


# ---- refusals


def told_in_one_line(result) -> str:
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    return result.output


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["plot"], "does not exist. Run `toy_example.py train"),
        (["publish"], "does not exist. Run `toy_example.py evaluate"),
        (["all", "--samples", 1000], "1000 samples are too few to tell a lost branch from chance"),
    ],
)
def test_missing_or_too_few_inputs_are_reported_in_one_line(tmp_path, arguments, wrong):
    assert wrong in told_in_one_line(run(*arguments, "--outdir", tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_damaged_network_is_reported_before_another_is_trained(outdir):
    path = network_path(outdir, "both", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"both-seed1.safetensors is damaged: its weights do not match"):
        load_network(outdir, "both", 1)
    network_path(outdir, "main", 0).unlink()
    path.write_bytes(b"")
    assert "both-seed1.safetensors is not a complete network file" in told_in_one_line(
        run("train", "--outdir", outdir, "--seeds", "0-1")
    )


def test_pictures_without_matplotlib_are_refused_before_training(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    for command in ("plot", "evaluate", "all"):
        assert "the figures need matplotlib. Run: pip install" in told_in_one_line(run(command, "--outdir", tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_is_reported(tmp_path, record):
    evaluation.save_record(tmp_path, record)
    path = tmp_path / evaluation.RECORD_NAME
    path.write_bytes(path.read_bytes()[:-100])
    assert "evaluation.json is not complete JSON" in told_in_one_line(run("publish", "--outdir", tmp_path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "holds a JSON list"),
        ("{}", "training_seeds must be a list of int; got None"),
        ('{"training_seeds": [0], "num_samples": 5, "rows": [5]}', "rows must be a list of a mapping"),
        ('{"training_seeds": [0], "num_samples": 5, "rows": [{"method": 5}]}', "rows[0].method must be str; got 5"),
        ('{"training_seeds": [0], "num_samples": 5, "rows": [{"method": "cfg"}]}', "rows[0].weight must be a number"),
    ],
)
def test_a_record_of_the_wrong_types_is_reported(tmp_path, text, reason):
    (tmp_path / evaluation.RECORD_NAME).write_text(text)
    told = told_in_one_line(run("publish", "--outdir", tmp_path))
    assert "evaluation.json is damaged (" in told
    assert reason in told
