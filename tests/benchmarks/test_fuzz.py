"""The record of damaged files adds up over calls."""

import json

from click.testing import CliRunner

from benchmarks.fuzz import main


def test_calls_add_to_the_record_with_other_seeds(tmp_path):
    arguments = ["--parser", "words", "--inputs", "20", "--out", str(tmp_path), "--add"]
    for calls in (1, 2, 3):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "fuzz.json").read_text())["parsers"]["words"]
        assert (found["inputs"], found["seed"]) == (20 * calls, calls - 1)
        assert found["read"] + found["refused"] + found["failed"] == found["inputs"]
    CliRunner().invoke(main, arguments[:-1])
    assert json.loads((tmp_path / "fuzz.json").read_text())["parsers"]["words"]["inputs"] == 20


def test_a_call_without_time_feeds_one_input_and_ends(tmp_path):
    arguments = ["--parser", "words", "--inputs", "1000", "--max-sec", "0", "--out", str(tmp_path)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert json.loads((tmp_path / "fuzz.json").read_text())["parsers"]["words"]["inputs"] == 1
