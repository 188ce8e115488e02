"""edm2kit-metrics list and explain."""

import json

from click.testing import CliRunner

from edm2kit.cli.metrics import main
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.registry import METRICS


def run(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def card(path, num, value):
    found = {"min": value, "mean": value, "values": {"selection 0": value}}
    ends = {"selection 0": [value - 0.1, value + 0.1]}
    content = {"results": {"fid": found}, "intervals": {"fid": ends}, "num_images": num}
    path.write_text(json.dumps(content))
    return path


def test_explain_says_what_differs_and_which_way_it_moves_the_score(tmp_path):
    first, second = card(tmp_path / "a.json", 30, 2.5), card(tmp_path / "b.json", 20, 3.5)
    code, shown = run("explain", first, second)
    assert code == 0
    lines = shown.splitlines()
    assert lines[:2] == ["fid: 2.5 and 3.5; intervals apart", "num_images: 30 -> 20"]
    assert "fewer images give a larger Frechet distance" in lines[2]
    assert "arXiv 1911.07023" in lines[2]
    assert "Nothing that decides a score differs." in run("explain", first, first)[1]


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "no.json").write_text("[]")
    code, shown = run("explain", tmp_path / "no.json", tmp_path / "no.json")
    assert code == 1
    assert "not a score card" in shown


def test_the_list_names_every_detector_and_metric():
    _, shown = run("list")
    for name in [*DETECTORS, *METRICS, "fdr"]:
        assert f"\n  {name} " in shown
    assert "not FID; compares only with itself" in shown
