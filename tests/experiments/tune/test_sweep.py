"""edm2kit.sweep: every combination is scored on the same seeds, kept, and shown as a table and as a figure."""

import csv
import itertools
import xml.etree.ElementTree as ET

import pytest
import torch

import edm2kit
from edm2kit.cli.presets import BOX
from edm2kit.experiments.tune.objective import FIRST_SEED, Objective
from edm2kit.experiments.tune.table import SweepTable
from edm2kit.snapshots.file_format import read_header
from tests.support.tuning import make_run

OPTIONS = "--steps 2"
NUM = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    make_run(folder / "main", seed=0)
    make_run(folder / "small", seed=1)
    make_run(folder / "other", seed=2, times=(1000, 2000))
    return folder


@pytest.fixture(scope="module")
def reference():
    images = torch.randint(0, 256, [16, 3, 8, 8], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return edm2kit.measure_reference(images, ["fd_random"])


@pytest.fixture(scope="module")
def table(folder, reference):
    return edm2kit.sweep(
        folder / "main",
        reference,
        [1, 2],
        guides={"small": folder / "small", "other": folder / "other"},
        ema_guide=[0.05, 0.07],
        intervals=[None, (0.1, 5.0)],
        options=OPTIONS,
        num=NUM,
        confidence=True,
    )


@pytest.fixture
def generated(monkeypatch):
    """The numbers of images of the calls that generate."""
    counts = []
    features = Objective._features

    def counted(self, candidate, seeds):
        counts.append(len(seeds))
        return features(self, candidate, seeds)

    monkeypatch.setattr(Objective, "_features", counted)
    return counts


def test_every_combination_has_a_row_and_the_unguided_network_one(table):
    assert len(table) == 1 + 2 * 2 * 2
    assert [row["weight"] for row in table].count(1.0) == 1
    assert table.rows[0]["method"] == "unguided"
    assert table.rows[0]["guide"] is None
    combinations = [(row["guide"], row["ema_guide"], row["sigma_lo"]) for row in table.rows[1:]]
    assert combinations == list(itertools.product(("small", "other"), (0.05, 0.07), (None, 0.1)))
    assert {row["age"] for row in table if row["guide"] == "other"} == {2000}  # the latest snapshot
    assert all(row["error"] is None for row in table)
    assert all(row["fd_random_low"] <= row["fd_random"] <= row["fd_random_high"] for row in table)


def test_a_row_is_what_the_engine_and_the_score_give(folder, reference):
    main = edm2kit.load_snapshot(folder / "main" / "network-snapshot-0000003-0.100.safetensors")
    guide = edm2kit.load_snapshot(folder / "small" / "network-snapshot-0000002-0.050.safetensors")
    table = edm2kit.sweep(
        folder / "main",
        reference,
        [2],
        guides=folder / "small",
        ages=[2000],
        ema_guide=[0.05],
        options=OPTIONS,
        num=NUM,
    )
    engine = edm2kit.Engine(
        edm2kit.Guided(main.net, guide.net, 2.0), main.encoder.decode, edm2kit.Sampler(num_steps=2), (3, 8, 8), 4,
        torch.device("cpu"),
    )  # fmt: skip
    images = engine.generate(range(FIRST_SEED, FIRST_SEED + NUM)).images
    (row,) = table
    assert row["fd_random"] == pytest.approx(edm2kit.score_images(images, reference)["fd_random"], rel=1e-4)
    # networks in memory are scored as their files are
    (again,) = edm2kit.sweep(main, reference, [2], guides=guide, options=OPTIONS, num=NUM)
    assert again["fd_random"] == row["fd_random"]


def test_a_cache_resumes_and_never_meets_other_networks(folder, reference, tmp_path, generated):
    def run(weights, num=NUM, options=OPTIONS, main=folder / "main"):
        generated.clear()
        guide = folder / "small"
        rows = edm2kit.sweep(main, reference, weights, guides=guide, options=options, num=num, cache=tmp_path).rows
        return [row["fd_random"] for row in rows], list(generated)

    values, counts = run([1, 2])
    assert counts == [NUM, NUM]
    assert run([1, 2]) == (values, [])
    assert run([1, 1.5, 2])[1] == [NUM]
    assert run([1, 2], num=NUM + 2)[1] == [2, 2]
    assert run([1, 2]) == (values, [])
    assert run([1, 2], options="--steps 3")[1] == [NUM, NUM]
    other_values, counts = run([1, 2], main=folder / "other")
    assert counts == [NUM, NUM]
    assert other_values != values


def test_networks_of_the_package_by_the_name_of_their_preset(reference):
    table = edm2kit.sweep("cifar10-autoguidance", reference, [1, 2.5], options="--steps 2", num=2)
    assert [row["method"] for row in table] == ["unguided", "autoguidance"]
    assert table.rows[1]["ema_guide"] == pytest.approx(read_header(BOX / "cifar10-guide.safetensors").ema_std)
    alone = edm2kit.sweep("cifar10", reference, methods=["truncation"], weights=[1.2], options="--steps 2", num=2)
    assert [row["method"] for row in alone] == ["truncation"]


def test_csv_has_everything(table, tmp_path):
    text = table.to_csv(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table)
    assert [float(row["fd_random"]) for row in rows] == [row["fd_random"] for row in table]
    assert text.splitlines()[0].split(",") == [
        "method", "guide", "age", "ema_main", "ema_guide", "sigma_lo", "sigma_hi", "weight",
        "fd_random", "fd_random_low", "fd_random_high", "error",
    ]  # fmt: skip


def test_markdown_and_notebooks_show_what_differs_and_mark_the_best(table):
    head, rule, *lines = table.to_markdown().splitlines()
    assert "| ema_main |" not in head  # the same in all rows
    assert len(lines) == len(table)
    (best,) = [line for line in lines if "**" in line]
    assert f"**{table.best()['fd_random']:.4g}" in best
    assert set(rule) <= set("| :-")
    assert table._repr_html_().count("<tr>") == len(table) + 1


def test_the_figure_has_a_curve_per_combination_of_the_others(table, tmp_path):
    figure = table.figure()
    figure.save(tmp_path / "sweep.svg")
    svg = (tmp_path / "sweep.svg").read_text()
    ET.fromstring(svg)
    assert svg == figure._repr_svg_()
    for guide in ("guide small, at 3,000 images", "guide other, at 2,000 images"):
        for std in ("0.05", "0.07"):
            assert f"{guide}, EMA of guide {std}, all sigma" in svg
            assert f"{guide}, EMA of guide {std}, sigma in (0.1, 5]" in svg
    assert svg.count("<circle") == 8 * 2  # the unguided network is a point of each
    against_length = table.figure(x="ema_guide").svg
    assert "guide small, at 3,000 images, sigma in (0.1, 5]" in against_length
    assert against_length.count("<circle") == 8
    assert against_length.count('class="reference"') == 2  # and in the legend


def test_it_says_what_it_is(table):
    lines = repr(table).splitlines()
    assert lines[0] == "SweepTable: 9 rows of 6 images, fd_random"
    assert f"{table.best()['fd_random']:.4g}" in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize("call", ["figure", "best"])
def test_unknown_metrics_and_axes_are_refused(table, call):
    with pytest.raises(ValueError, match="the table has no metric 'fid'; it has fd_random"):
        getattr(table, call)("fid")
    with pytest.raises(ValueError, match="against 'sigma_lo' is not possible; choose one of weight"):
        table.figure(x="sigma_lo")
    with pytest.raises(ValueError, match=r"use a name that ends in \.svg"):
        table.figure().save("picture.png")


def test_what_cannot_be_generated_has_no_value_and_says_why(folder, reference):
    table = edm2kit.sweep(folder / "main", reference, [1, 1e38], guides=folder / "small", options=OPTIONS, num=NUM)
    assert table.rows[0]["fd_random"] is not None
    assert table.rows[1]["fd_random"] is None
    assert "is not finite" in table.rows[1]["error"]
    assert "1 without a value" in repr(table)
    assert "is not finite" in table.to_markdown()
    assert table.best()["weight"] == 1
    empty = SweepTable(table.rows[1:], table.metrics, NUM)
    with pytest.raises(ValueError, match="none of the 1 rows has a value of fd_random: the image of seed"):
        empty.best()
    with pytest.raises(ValueError, match="nothing to draw"):
        empty.figure()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"guides": None}, r"nothing to guide with; give guides=\.\.\., or methods"),
        ({"ema_guide": [0.2]}, r"an EMA of length 0\.2 cannot be rebuilt well"),
        ({"ages": [7]}, "has no snapshot at 7 images"),
        ({"metrics": ["fid"]}, "the reference has no fid"),
        ({"methods": ["autoguidences"]}, "autoguidences"),
        ({"options": "--guidance 3"}, "--guidance is chosen by the search"),
        ({"options": "--stepz 3"}, "--stepz"),
        ({"weights": []}, "at least two images and a weight"),
        ({"num": 1}, "at least two images and a weight"),
        ({"metrics": ["fd_random.recall"]}, "real"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_generated(changes, reason, folder, reference, generated):
    arguments = {"weights": [2], "guides": folder / "small", "options": OPTIONS, "num": NUM, **changes}
    with pytest.raises(ValueError, match=reason):
        edm2kit.sweep(folder / "main", reference, **arguments)
    assert generated == []
