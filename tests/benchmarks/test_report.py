"""The documents say what the records say."""

import json
import subprocess

from click.testing import CliRunner

from benchmarks import harness, report, scaling_report
from benchmarks.plots import ema_points, growth_plot
from benchmarks.tables import comparison_table
from edm2kit.experiments.documents import is_current
from tests.support import tiny

PROVENANCE = {"commit": "0123456789abcdef", "python": "3.11", "torch": "2.13", "numpy": "2", "hardware": "a CPU"}


def comparison(job: str, goal: float | None = None, **notes: object) -> dict:
    plain = {"median_sec": 2.0, "ratio": 1.0, "ratio_range": [1.0, 1.0], "goal": None, "error": None}
    fast = {"median_sec": 0.5, "ratio": 4.0, "ratio_range": [3.5, 4.5], "goal": goal, "error": 1e-6}
    contenders = {"plain": plain, "fast": {**fast, "share_of_ceiling": 0.4}}
    command = f"python benchmarks/{job}.py"
    return {"job": job, "contenders": contenders, "notes": notes, "command": command, "provenance": PROVENANCE}


def test_the_documents_are_current():
    records = report.read_records(harness.RECORDS)
    for name, text in report.documents(records).items():
        assert is_current(report.DOCS / name, {report.PART: text}), (
            f"docs/{name} is older than its records: run python -m benchmarks.report"
        )
    assert (harness.RECORDS / report.PLOT_NAME).exists() == ("growth" in records)


def test_the_plot_of_growing_cost_is_shown_once_there_is_one():
    assert "growth.png" not in report.performance_text({})
    assert "![" in report.performance_text({"growth": comparison("growth")}).split("### How cost grows")[1]


def test_goals_stand_beside_results():
    text = comparison_table([comparison("reached", 3.5), comparison("unmet", 4.5), comparison("free")])
    rows = {row.split(" | ")[0]: row for row in text.splitlines() if "| fast |" in row}
    assert "| **4.00** (3.50 to 4.50) | 3.5: reached | 1.0e-06 | 40% |" in rows["| reached"]
    assert "4.5: **missed** by 11%" in rows["| unmet"]
    assert "| **4.00** (3.50 to 4.50) |  | 1.0e-06" in rows["| free"]


def test_a_goal_beyond_what_the_machine_computes_is_reported():
    record = comparison("unmet", 4.5) | {"work": {"unit": "multiply-adds"}}
    record["contenders"]["plain"]["share_of_ceiling"] = 0.25
    assert "4.5: **missed** by 11%, would be 112% of the ceiling" in comparison_table([record])
    record["contenders"]["plain"]["share_of_ceiling"] = 0.2
    assert "4.5: **missed** by 11% |" in comparison_table([record])
    record["contenders"]["plain"]["share_of_ceiling"], record["work"]["unit"] = 0.5, "bytes"  # a cache may beat a copy
    assert "4.5: **missed** by 11% |" in comparison_table([record])


def test_what_a_way_exceeds_is_not_called_a_ceiling():
    record = comparison("unmet", 4.5) | {"work": {"unit": "multiply-adds"}}
    record["contenders"]["plain"]["share_of_ceiling"] = 1.25
    assert "4.5: **missed** by 11% |" in comparison_table([record])


def test_a_goal_in_another_precision_is_compared_with_the_ceiling_of_that_precision():
    record = comparison("unmet", 4.5) | {"work": {"unit": "multiply-adds"}}
    plain, fast = record["contenders"].values()
    plain |= {"share_of_ceiling": 0.5, "per_sec": 50.0}  # the ceiling is 100 for float32, and 500 for the other
    fast |= {"share_of_ceiling": 0.4, "per_sec": 200.0}
    assert "4.5: **missed** by 11% |" in comparison_table([record])
    fast["share_of_ceiling"] = 1.0
    assert "would be 112% of the ceiling" in comparison_table([record])


def test_what_was_not_measured_is_named_with_its_command():
    everything = report.missing_text({})
    assert set(report.benchmarks()) >= {"growth", "memory", "scaling", "gpu"}
    for name in report.benchmarks():
        assert f"- `{name}`: " in everything
    assert "`bash benchmarks/gpu.sh`" in everything
    assert "memory" not in report.missing_text({"memory": {"command": "python -m benchmarks.memory"}})


def test_half_precision_is_compared_with_autocast_and_skipped_items_are_reported():
    record = comparison("a", error_bf16=0.0123, error_autocast_bf16=0.0125, skipped={"bf16": "this CPU is too old"})
    text = report.performance_text({"a": record})
    assert (
        "in bf16 differs from float32 by 1.23% (relative norm); the plain network under torch's autocast by 1.25%"
        in text
    )
    # the CPU of the record, which need not be the reader's
    expected = "- bf16 (record `a`, a CPU, torch 2.13, Python 3.11): that CPU is too old"
    assert expected in text.split("### Not measured")[1]
    assert "autocast" not in report.performance_text({"a": comparison("a")})


def test_records_of_one_benchmark_may_have_names_of_their_own():
    for command in ("python -m benchmarks.growth --runs 3", "python benchmarks/growth.py --runs 3"):
        assert "`growth`" not in report.missing_text({"x": {"command": command}})


def test_a_gpu_record_shows_numbers_and_what_failed():
    items = {"training-a": {**comparison("training-a", 2.0), "numbers": {"images/s": 12.3456}}, "b": {"error": "late"}}
    text = report.gpu_text({"items": items, "provenance": {**PROVENANCE, "hardware": "a card"}})
    assert "Measured on a card" in text
    assert "- training-a: images/s 12.35" in text
    assert "- b: late" in text


def test_outdated_documents_are_reported_and_left_alone_by_check(tmp_path):
    for name in report.documents({}):
        (tmp_path / name).write_text("<!-- records: begin -->\nold\n<!-- records: end -->\n")
    words = ["--records", str(tmp_path), "--docs", str(tmp_path)]
    refused = CliRunner().invoke(report.main, [*words, "--check"])
    assert refused.exit_code == 1
    assert f"{', '.join(report.documents({}))}: older than the records" in refused.output
    assert "old" in (tmp_path / "scaling.md").read_text()
    assert CliRunner().invoke(report.main, words).exit_code == 0
    assert CliRunner().invoke(report.main, [*words, "--check"]).exit_code == 0


def test_run_all_runs_every_benchmark_and_names_those_that_fail(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "ran $2"\ncase "$2" in *memory) exit 3;; esac\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**tiny.environment(), "PYTHON": str(tmp_path / "python")}
    script = str(tiny.ROOT / "benchmarks" / "run_all.sh")
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
    ran = [line.removeprefix("ran benchmarks.") for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran == [*(name for name in report.benchmarks() if name != "gpu"), "report"]
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: memory"


def test_a_quick_run_measures_the_speeds_with_three_rounds(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nshift\necho "ran $*"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**tiny.environment(), "PYTHON": str(tmp_path / "python")}
    line = ["bash", str(tiny.ROOT / "benchmarks" / "run_all.sh"), "--quick"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    ran = [line.removeprefix("ran benchmarks.") for line in done.stdout.splitlines() if line.startswith("ran ")]
    with_rounds = ["data", "ema", "inference", "metrics", "sampling", "snapshots", "toy", "training_step"]
    assert sorted(ran) == sorted([*(f"{name} --runs 3" for name in with_rounds), "end_to_end", "report"])


def test_the_plot_copes_with_records_that_are_not_there(tmp_path):
    growth_plot({}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_reconstructions_are_plotted_by_their_number_of_outputs():
    records = {"a": comparison("a", outputs=8), "b": comparison("b", outputs=31), "c": comparison("c")}
    assert ema_points(records) == [("plain", 8, 2.0), ("fast", 8, 0.5), ("plain", 31, 2.0), ("fast", 31, 0.5)]


def test_more_gpus_train_faster_and_less_efficiently():
    cost = {"parameters": 1.5e9, "multiply_adds": 550e9}
    rates = [scaling_report.images_per_sec(cost, ranks) / ranks for ranks in scaling_report.RANKS]
    assert rates == sorted(rates, reverse=True)
    assert scaling_report.images_per_sec(cost, 512) > scaling_report.images_per_sec(cost, 256)


def test_records_are_json_of_moderate_size():
    for path in harness.RECORDS.glob("*.json"):
        assert path.stat().st_size < 200_000
        assert json.loads(path.read_text())["job"]
