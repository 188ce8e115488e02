"""What people wait for: the commands that are timed exist, and the page says what was measured."""

import pytest

from benchmarks import end_to_end, harness, report
from benchmarks.end_to_end import Row
from tests.support import ROOT, house

PROVENANCE = {"commit": "0" * 40, "python": "3.11", "torch": "2.13", "numpy": "2", "hardware": "a CPU"}


def test_a_goal_is_reached_from_its_own_side():
    assert Row("seconds", 0.9, "s", 1.0).is_reached
    assert not Row("pace", 0.9, "images/s", 1.0, more_is_better=True).is_reached


def test_what_others_are_compared_with_has_no_goal():
    rows = [vars(Row("`import torch`, for comparison", 1.2, "s", None)) | {"is_reached": True}]
    text = report.waits_text({"rows": rows, "provenance": PROVENANCE})
    assert "| `import torch`, for comparison | 1.2 s |  |  |" in text


def test_every_console_command_is_timed():
    files = {ROOT / file for file in end_to_end.COMMANDS}
    assert {house.command_of_file(file) for file in files} == house.commands(ROOT)
    assert {f"edm2kit.cli.{name}" for name in end_to_end.MODULES} == house.commands(ROOT)


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match="no disk"):
        end_to_end._seconds_of(["-c", "raise SystemExit('no disk')"])


@pytest.mark.slow
def test_pictures_are_converted_by_the_real_command(tmp_path):
    row = end_to_end.conversion(tmp_path, 4)
    assert row.value > 0
    assert (tmp_path / "photos.zip").is_file()


def test_the_page_shows_each_row_with_its_goal_and_the_machine():
    rows = [vars(Row("a", 2.0, "s", 1.0)) | {"is_reached": False}, vars(Row("b", 1.0, "s", 1.0)) | {"is_reached": True}]
    record = {"job": "end_to_end", "rows": rows, "command": "", "provenance": PROVENANCE, "cpu": "EPYC (avx2)"}
    text = report.performance_text({"end_to_end": record})
    assert "| a | 2 s | 1 s: **missed** |  |" in text
    assert "| b | 1 s | 1 s: reached |  |" in text
    assert "a CPU, EPYC (avx2), torch 2.13" in text


def test_the_processor_is_named_with_its_instructions():
    assert harness.cpu()
