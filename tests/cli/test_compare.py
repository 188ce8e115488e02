"""Comparing ways to guide: tuned on some seeds, reported on others, and never measured twice."""

import json
import re
import shutil

import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import compare as compare_guidance
from edm2kit.cli import distill
from edm2kit.cli import metrics as calculate_metrics
from edm2kit.experiments.compare_guidance import measure
from edm2kit.experiments.compare_guidance.report import (
    cost_table,
    front,
    front_marks,
    load_collected,
    load_costs,
    score_table,
)
from edm2kit.experiments.compare_guidance.rows import ROWS_FILE, load_comparison
from tests.support import tiny
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import some_files, write_folder

NUM = 8
ROWS = """
metric: fd_random
tune: {images: 8, seeds: [1000000]}
report: {images: 8, seeds: [0, 8]}
common: --net {main} --steps 2
rows:
  unguided: {title: alone, options: ""}
  pair: {title: autoguidance, options: "--gnet {guide}", weights: [1.5, 3]}
  icg: {title: random class, options: --guidance-method icg, weights: [2]}
  sims: {title: SIMS, options: "--gnet {sims}", weights: [2]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny_snapshot(folder / "main")
    tiny_snapshot(folder / "guide", seed=1)
    write_folder(folder / "real", some_files(12))
    (folder / "rows.yaml").write_text(ROWS)
    words = ["ref", "--data", folder / "real", "--dest", folder / "ref.npz", "--metrics", "fd_random"]
    assert CliRunner().invoke(calculate_metrics.main, [str(word) for word in words]).exit_code == 0
    return folder


def run(place, command, outdir, *more, code=0, main="main"):
    words = [command, "--outdir", outdir, "--rows-file", place / "rows.yaml"]
    words += ["--network", f"main={place / main}", "--network", f"guide={place / 'guide'}", *more]
    if command in ("tune", "report", "run"):
        words += ["--ref", place / "ref.npz", "--real", place / "real", "--device", "cpu"]
    done = CliRunner().invoke(compare_guidance.main, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def measured(place):
    told = run(place, "tune", place / "out")
    assert "sims is skipped: it needs --network sims=PATH" in told
    run(place, "report", place / "out", "--fresh", place / "real", "--seed", f"0,{NUM}")
    run(place, "table", place / "out")
    return place / "out"


def points(file):
    return json.loads(file.read_text())["points"]


def test_rows_are_tuned_on_some_seeds_and_reported_on_others_at_the_best_weight(measured):
    tuned, reported = (points(measured / stage / "pair.json") for stage in ("tune", "report"))
    assert [(p["weight"], p["first_seed"]) for p in tuned] == [(1.5, 1000000), (3, 1000000)]
    best = min(tuned, key=lambda p: p["results"]["fd_random"])
    assert [(p["weight"], p["first_seed"]) for p in reported] == [(best["weight"], 0), (best["weight"], NUM)]
    assert {"commit", "torch", "hardware", "elapsed_sec"} <= set(reported[0])
    unguided = points(measured / "report" / "unguided.json")
    assert [p["weight"] for p in unguided] == [None, None]
    assert unguided[0]["results"] != reported[0]["results"]


def test_scores_are_those_of_calculate_metrics(place, measured, tmp_path):
    words = ["gen", "--net", place / "main", "--steps", 2, "--guidance-method", "icg", "--guidance", 2, "--num", NUM]
    words += [
        "--ref",
        place / "ref.npz",
        "--seed",
        NUM,
        "--batch",
        3,
        "--record",
        tmp_path / "r.json",
        "--device",
        "cpu",
    ]
    assert CliRunner().invoke(calculate_metrics.main, [str(word) for word in words]).exit_code == 0
    expected = json.loads((tmp_path / "r.json").read_text())["results"]["fd_random"]["min"]
    assert points(measured / "report" / "icg.json")[1]["results"]["fd_random"] == pytest.approx(expected, rel=1e-4)


def test_what_was_measured_is_not_measured_again_and_what_is_missing_is(place, measured, tmp_path, monkeypatch):
    for stage in ("tune", "report"):
        for file in (measured / stage).iterdir():
            (tmp_path / stage).mkdir(exist_ok=True)
            (tmp_path / stage / file.name).write_text(file.read_text())
    before = points(tmp_path / "tune" / "pair.json")
    record = {**json.loads((tmp_path / "tune" / "pair.json").read_text()), "points": before[:1]}
    (tmp_path / "tune" / "pair.json").write_text(json.dumps(record))
    drawn = []
    monkeypatch.setattr(measure, "prepare", lambda request, device: drawn.append(request) or PREPARE(request, device))
    run(place, "tune", tmp_path)
    again = points(tmp_path / "tune" / "pair.json")
    assert [request.guidance.weight for request in drawn] == [3]
    assert again[0] == before[0]
    assert again[1]["results"] == before[1]["results"]


PREPARE = measure.prepare


def test_the_table_has_real_images_first_then_the_nearest(place, measured):
    record = json.loads((measured / "comparison.json").read_text())
    assert record["rows"][0]["name"] == "real"
    record["rows"][0]["points"][0]["results"]["fd_random"] = 1e6  # first all the same
    lines = score_table(record).splitlines()
    assert lines[0].startswith("| 8 images each | w | of | evaluations |")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0][0] == "other real pictures"
    assert {row[0] for row in cells[1:]} == {"alone", "autoguidance", "random class"}
    distances = [float(row[4]) for row in cells[1:]]
    assert distances == sorted(distances)
    (pair,) = (row for row in cells if row[0] == "autoguidance")
    assert pair[2:4] == ["1.5, 3", "1 main + 1 guide"]
    assert all(0 <= float(cell) <= 1 for row in cells for cell in row[6:9])
    assert lines[0].endswith("| multiply-adds per image | best trade-off |")
    adds = {row[0]: row[9] for row in cells}
    assert adds["other real pictures"] == ""
    assert (
        float(adds["autoguidance"]) == float(adds["random class"]) == pytest.approx(2 * float(adds["alone"]), rel=0.01)
    )


def test_the_cost_and_gain_of_a_student_are_reported(place, measured, tmp_path):
    tiny.make_dataset(tmp_path / "data", 16)
    words = ["--net", place / "main", "--gnet", place / "guide", "--guidance", 3, "--steps", 4, "--interval", "0.2,20"]
    words += ["--data", tmp_path / "data", "--outdir", tmp_path / "run", "--batch", 16, "--duration", 32]
    done = CliRunner().invoke(distill.main, [str(word) for word in [*words, "--workers", 0, "--device", "cpu"]])
    assert done.exit_code == 0, done.output
    rows = (place / "rows.yaml").read_text() + '  student: {title: distilled, options: "--net {student}"}\n'
    (tmp_path / "rows.yaml").write_text(rows)
    student = ["--network", f"student={tmp_path / 'run' / 'network-snapshot-0000000-0.100.safetensors'}"]
    student += ["--rows-file", tmp_path / "rows.yaml"]
    shutil.copytree(measured, tmp_path / "out")
    run(place, "report", tmp_path / "out", *student, "--seed", f"0,{NUM}")
    run(place, "cost", tmp_path / "out", *student, "--rows", "unguided,pair,student", "--batch", 2, "--device", "cpu")
    told = run(place, "table", tmp_path / "out", *student)
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    adds = {name: cost["multiply_adds"] for name, cost in record["costs"]["rows"].items()}
    assert adds["unguided"] == adds["student"] == pytest.approx(adds["pair"] / 2)
    assert record["student"]["training"]["nimg"] == 32
    assert cost_table(record) in told
    assert "The student saw 32 images" in told
    assert "guides with weight 3 in steps" in told
    elsewhere = ["--network", f"student={place / 'main'}", "--rows-file", tmp_path / "rows.yaml"]
    assert "main is not a distilled network" in run(place, "table", tmp_path / "out", *elsewhere, code=1)


def test_other_networks_rows_and_untuned_weights_are_refused(place, measured, tmp_path):
    assert "was measured with other settings (files.main" in run(place, "tune", measured, main="guide", code=1)
    assert "pair is not tuned at weight 1.5 yet" in run(place, "report", tmp_path, code=1)
    assert "has no scores yet" in run(place, "table", tmp_path, code=1)
    assert "no row has the name 'pear'; did you mean 'pair'?" in run(place, "tune", tmp_path, "--rows", "pear", code=1)
    assert "the file nowhere does not exist" in run(place, "tune", tmp_path, "--network", "sims=nowhere", code=2)
    (measured / "report" / "icg.json").rename(tmp_path / "icg.json")
    (measured / "report" / "icg.json").write_text("{")
    assert "icg.json is damaged" in run(place, "table", measured, code=1)
    (tmp_path / "icg.json").rename(measured / "report" / "icg.json")


def test_the_sheet_has_a_line_for_each_row(place, tmp_path):
    run(place, "sheet", tmp_path, "--images", 2, "--device", "cpu")
    assert (tmp_path / "index.html").read_text().count('class="slider"') == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "P"
        sizes = sheet.size
    run(place, "sheet", tmp_path, "--images", 2, "--rows", "pair", "--device", "cpu", "--dest", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as one:
        assert one.width == sizes[0]
        assert (sizes[1] - 8) == 3 * (one.height - 8)


def test_every_row_of_the_project_can_be_asked_for(place, tmp_path):
    files = {
        name: str(place / "main") for name in ("main", "guide", "uncond", "joint", "sims", "student", "classifier")
    }
    comparison = load_comparison(ROWS_FILE)
    assert {name for row in comparison.rows.values() for name in row.needs} == set(files)
    for row in comparison.rows.values():
        assert len(row.weights) in (0, 5)
        for weight in row.weights or (None,):
            request = row.request(weight, files)
            assert request.guidance.weight == (weight or 1)
        assert row.cost(files)
    methods = set()
    for row in comparison.rows.values():
        methods.add(row.request(row.weights[0] if row.weights else None, files).guidance.method)
    assert {"cfg", "loss", "classifier", "cfg-plus-autoguidance", "higs"} <= methods


def test_a_comparison_has_its_detector_and_two_ranges_of_a_thousand_images():
    comparison = load_comparison(ROWS_FILE)
    assert comparison.metric == "fd_lite0"
    assert (comparison.tune.images, comparison.report.images, len(comparison.report.seeds)) == (1000, 1000, 2)
    ranges = [range(seed, seed + 1000) for seed in (*comparison.tune.seeds, *comparison.report.seeds)]
    assert sum(len(one) for one in ranges) == len({seed for one in ranges for seed in one})


def test_a_comparison_may_say_only_what_differs_from_the_default(tmp_path):
    text = "{extends: default, about: Mine., metric: fd_random, common: '--net {main} --steps 3'}"
    (tmp_path / "mine.yaml").write_text(text)
    mine, default = load_comparison(tmp_path / "mine.yaml"), load_comparison(ROWS_FILE)
    assert (mine.about, default.about) == ("Mine.", "")
    assert (mine.metric, mine.report, list(mine.rows)) == ("fd_random", default.report, list(default.rows))
    assert mine.rows["unguided"].options == "--net {main} --steps 3"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("metric: [fd_random]", "metric must be str; got list"),
        ("about: 5", "about must be str; got 5"),
        ("metrics: fid", "unknown key 'metrics'; did you mean 'metric'"),
        ("tune: {images: yes, seeds: [0]}", "tune.images must be int; got True"),
        ("tune: {images: 8.5, seeds: [0]}", "tune.images must be int; got 8.5"),
        ("tune: {images: 2, seeds: [0]}", "tune needs 6 images or more"),
        ("tune: {images: 8, seeds: '12'}", "tune.seeds must be a list of int; got '12'"),
        ("tune: {images: 8, seeds: []}", "tune needs 6 images or more, and seeds from 0"),
        ("tune: {images: 8}", "tune.seeds is missing"),
        ("tune: [8]", "tune must be a mapping"),
        ("rows: [a]", "rows must be a mapping"),
        ("rows: {a: text}", "rows.a must be a mapping"),
        ("rows: {a: {title: x, options: 5}}", "rows.a.options must be str; got 5"),
        ("rows: {a: {title: x, options: '', weights: '12'}}", "rows.a.weights must be a list of float; got '12'"),
        ("rows: {a: {title: x, options: '', weights: [.nan]}}", "rows.a.weights must be a list of float"),
        ("rows: {a: {title: x, options: '', weight: 2}}", "unknown key 'rows.a.weight'; did you mean 'weights'"),
        ("rows: {../a: {title: x, options: ''}}", "the name becomes a file name"),
        ("rows: {no: {title: x, options: ''}}", "rows must be a mapping"),
        ("rows: {a: {title: x, options: '\"'}}", "rows.a: options are No closing quotation"),
        ("rows: {a: {title: x, options: '{'}}", "rows.a: options are"),
        ("rows: {a: {title: x, options: '{}'}}", "rows.a: options have {}, which is not a name in braces"),
        ("rows: {a: {title: x, options: '{main.x}'}}", "options have {main.x}, which is not a name in braces"),
        ("rows: {a: {title: x, options: '{main!r}'}}", "options have {main}, which is not a name in braces"),
    ],
)
def test_a_wrong_part_of_a_comparison_is_named(tmp_path, change, reason):
    (tmp_path / "rows.yaml").write_text(f"extends: default\n{change}\n")
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        load_comparison(tmp_path / "rows.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'rows.yaml'} is not a comparison: ")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tune/pair.json", "", "Delete it to measure this row again"),
        ("tune/pair.json", "[" * 100_000, "Delete it to measure this row again"),
        ("tune/pair.json", '{"asked": {}}', "points must be a list"),
        ("tune/pair.json", '{"asked": 5, "points": []}', "asked must be a mapping"),
        ("tune/pair.json", '{"asked": {}, "points": [{"weight": "2"}]}', "points[0].weight must be"),
        (
            "tune/pair.json",
            '{"asked": {}, "points": [{"weight": 2, "first_seed": 0, "results": {"a": "x"}}]}',
            "results.a",
        ),
        ("report/pair.json", '{"asked": {"options": 5}, "points": []}', "was measured with other settings"),
    ],
)
def test_a_damaged_record_is_named(place, measured, tmp_path, file, content, reason):
    shutil.copytree(measured, tmp_path / "out")
    (tmp_path / "out" / file).write_text(content)
    told = run(place, "report", tmp_path / "out", "--rows", "pair", code=1)
    assert f"{file} " in told
    assert reason in told


def test_a_damaged_record_of_all_rows_is_named(place, measured, tmp_path):
    for content in ("", "5", '{"rows": []}', '{"num_images": 8, "rows": [{"title": "a"}]}'):
        (tmp_path / "comparison.json").write_text(content)
        with pytest.raises(ValueError, match=r"comparison\.json "):
            load_collected(tmp_path / "comparison.json")
        (tmp_path / "cost.json").write_text(content)
        with pytest.raises(ValueError, match=r"cost\.json "):
            load_costs(tmp_path / "cost.json")
    assert load_collected(measured / "comparison.json")["num_images"] == NUM


def test_two_files_under_one_name_are_refused(place, tmp_path):
    told = run(place, "tune", tmp_path, "--network", f"main={place / 'guide'}", code=1)
    assert "--network names main twice" in told


def test_a_folder_of_records_that_cannot_be_written_is_refused_before_the_work(place, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "is a file" in run(place, "tune", tmp_path / "file" / "out", code=2)


@pytest.mark.parametrize(
    "text",
    ["rows: {a: {title: x}}", "extends: other", "{extends: default, metrics: fid}", "{extends: default, tune: 3}"],
)
def test_a_file_that_is_not_a_comparison_is_refused(tmp_path, text):
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not a comparison"):
        load_comparison(tmp_path / "rows.yaml")


def test_one_command_tunes_and_reports_and_goes_on_where_it_stopped(place, measured, tmp_path, monkeypatch):
    told = run(place, "run", tmp_path, "--fresh", place / "real")
    assert "best trade-off" in told
    record, apart = (json.loads((folder / "comparison.json").read_text()) for folder in (tmp_path, measured))
    for one, other in zip(record["rows"], apart["rows"], strict=True):
        assert one["name"] == other["name"]
        assert [point["results"] for point in one["points"]] == [point["results"] for point in other["points"]]
        assert [point["results"] for point in one["tuning"]] == [point["results"] for point in other["tuning"]]
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    (tmp_path / "report" / "icg.json").unlink()
    drawn = []
    monkeypatch.setattr(measure, "prepare", lambda request, device: drawn.append(request) or PREPARE(request, device))
    assert run(place, "run", tmp_path).endswith(told.partition("| 8 images each")[2])
    assert {request.guidance.method for request in drawn} == {"icg"}


def test_one_command_skips_rows_that_the_networks_cannot_generate(place, tmp_path):
    rows = tmp_path / "rows.yaml"
    odd = "  odd: {title: odd, options: --guidance-method slg --slg-blocks nowhere, weights: [2]}\n"
    rows.write_text(ROWS + odd)
    told = run(place, "run", tmp_path, "--rows-file", rows, "--rows", "unguided,odd")
    assert "odd is skipped: " in told
    assert "nowhere" in told
    assert [row["name"] for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]] == ["unguided"]
    assert "no row is left" in run(place, "run", tmp_path, "--rows-file", rows, "--rows", "odd", code=1)


# ---- trade-offs


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 5), (2, 3), (3, 4), (4, 1)], [0, 1, 3]),
        ([(2, 2), (1, 1), (3, 0)], [1, 2]),
        ([(1, 1), (1, 2), (1, 1)], [0, 2]),
        ([(1, 2), (1, 1)], [1]),
        ([], []),
    ],
)
def test_the_front_holds_what_nothing_beats(points, expected):
    assert front(points) == expected
    for k in range(len(points)):
        beaten = any(q != points[k] and q[0] <= points[k][0] and q[1] <= points[k][1] for q in points)
        assert beaten == (k not in expected)


def test_rows_on_a_front_are_marked():
    def row(name, distance, coverage, adds):
        results = {"fd_random": distance, "fd_random.coverage": coverage}
        points = [{"weight": None, "results": results}]
        return {"name": name, "title": name, "asked": {"metric": "fd_random"}, "points": points, "multiply_adds": adds}

    rows = [row("real", 0.1, 1.0, None), row("a", 1.0, 0.5, 10.0), row("b", 2.0, 0.9, 5.0), row("c", 3.0, 0.4, 20.0)]
    rows.append(row("d", 0.5, 0.4, None))  # its cost is not known
    assert front_marks({"rows": rows}) == {"a": "coverage, cost", "b": "coverage, cost", "d": "coverage"}
