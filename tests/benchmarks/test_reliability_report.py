"""The reliability page says what the records say, also what is missing or broken."""

import math

import numpy as np

from benchmarks import reliability_report as report
from benchmarks.checks import _ratio
from benchmarks.soak import Sample, slope_per_hour, summary
from tests.faults.__main__ import corrected

MADE = {"provenance": {"hardware": "a CPU", "torch": "2.13", "python": "3.11"}, "load_average": 3.0}


def family(faults: int, problems: list | None = None, **kinds: dict) -> dict:
    return {"faults": faults, "kinds": kinds, "problems": problems or [], "seed": 0}


def test_faults_are_counted_by_command_and_by_kind_and_missing_ones_are_named():
    problem = {"number": 17, "variant": "folder", "kind": "kill", "problems": ["hangs: somewhere"]}
    families = {
        "train": family(200, kill={"equal": 120}, stop={"equal": 80}),
        "generate": family(30, [problem], kill={"equal": 28, "broken": 1, "refused": 1}),
    }
    text = report.faults_text({"families": families, **MADE})
    assert text.startswith("230 random faults")
    assert "| kill | 150 | 148 | 1 | 1 |" in text
    assert "| train | 200 | 200 | 0 | 0 |" in text
    assert "Fewer than 200 faults so far: generate (30), dataset convert, encode (none)" in text
    assert "- generate, fault 17 (folder, kill): hangs: somewhere" in text


def test_a_mended_fault_is_counted_by_its_second_outcome_and_still_told():
    problem = {"number": 17, "variant": "folder", "kind": "kill", "problems": ["hangs"]}
    before = family(2, [problem], kill={"equal": 1, "broken": 1})
    after = corrected(before, family(1, kill={"equal": 1}))
    assert after["kinds"] == {"kill": {"equal": 2}}
    assert (after["problems"], after["mended"], after["faults"]) == ([], [problem], 2)
    assert "1 of these faults broke a promise when they were tried first" in report.faults_text(
        {"families": {"train": after}, **MADE}
    )
    assert corrected(before, family(1, [problem], kill={"broken": 1}))["problems"] == [problem]


def test_damaged_inputs_are_counted_by_parser_and_those_with_few_are_named():
    parsers = {
        name: {"inputs": inputs, "read": 2, "refused": inputs - 2, "failed": 0, "slowest_sec": 0.0123}
        for name, inputs in {"zip": 1_000_000, "labels": 70}.items()
    }
    text = report.security_text({"fuzz": {"parsers": parsers, **MADE}})
    assert text.startswith("1,000,070 inputs")
    assert "| zip | 1,000,000 | 2 | 999,998 | 0 | 0.01 s |" in text
    assert text.endswith("Fewer than 1,000,000 inputs so far: labels.")
    del parsers["labels"]
    assert "Fewer than" not in report.security_text({"fuzz": {"parsers": parsers, **MADE}})


def test_growth_is_the_slope_after_the_first_quarter():
    seconds = np.arange(0, 3600, 10.0)
    slope, error = slope_per_hour(seconds, 100 + 2.5 * seconds / 3600)
    assert math.isclose(slope, 2.5, rel_tol=1e-6)
    assert error < 1e-6
    samples = [Sample(second, 50.0 + min(second, 900) / 900, 20, 4) for second in seconds]  # it fills its caches first
    row = summary("rank 0", samples)
    assert (row["slope_mb_per_hour"], row["median_mb"], row["files"]) == (0.0, 51.0, [20])
    soak = {
        "ranks": 2, "length_sec": 3600.0, "goal_mb_per_hour": 1.0, "warm_share": 0.25, "processes": [row],
        "events": {"images": 1000, "snapshots": 4, "sample_sheets": 2}, **MADE,
    }  # fmt: skip
    assert "| rank 0 | 51 MB | +0.00 ± 0.00 MB | reached | 0.00 MB | 20 |" in report.soak_text(soak)
    growing = {**soak, "processes": [{**row, "slope_mb_per_hour": 1.5}]}
    assert "| +1.50 ± 0.00 MB | **missed** |" in report.soak_text(growing)


def test_the_cost_of_checks_is_a_sum_of_shares_with_its_goal():
    record = {
        "parameters": 2e6, "batch": 8, "resolution": 32, "pairs": 3, "goal": 0.01, "total": 0.012,
        "shares": {"a": 0.002, "b": 0.01}, "ratios": {"wall time": _ratio({"with": [2, 3, 4], "without": [2, 2, 4]})},
        **MADE,
    }  # fmt: skip
    text = report.checks_text(record)
    assert "1%: **missed**" in text
    assert "| together | **1.20%** |" in text
    assert "ratio 1.0000 ± " in text
