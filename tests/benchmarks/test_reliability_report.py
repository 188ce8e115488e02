"""The reliability page says what the records say, also what is missing or broken."""

import ctypes
import math

import numpy as np
import pytest

from benchmarks import reliability_report as report
from benchmarks import soak_rank
from benchmarks.checks import _ratio
from benchmarks.soak import InUse, Sample, _read_in_use, slope_per_hour, summary
from benchmarks.soak_rank import in_use
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
    assert "in use by malloc" not in report.soak_text(soak)  # of a record without it


def test_a_soak_shows_what_the_allocators_have_in_use_beside_what_is_held():
    seconds = np.arange(0, 3600, 10.0)
    held = [Sample(second, 60.0 + 3 * second / 3600, 20, 4) for second in seconds]
    looks = [InUse(second, 50.0 + min(second, 900) / 900, round(1000 + 20 * second / 3600)) for second in seconds]
    row = summary("rank 0", held, looks)
    assert (row["slope_mb_per_hour"], row["malloc_mb"]["slope_per_hour"], row["malloc_mb"]["median"]) == (3.0, 0.0, 51)
    assert math.isclose(row["python_blocks"]["slope_per_hour"], 20, rel_tol=0.01)
    assert "malloc_mb" not in summary("rank 0, reader", held)
    soak = {
        "ranks": 2, "length_sec": 3600.0, "goal_mb_per_hour": 1.0, "warm_share": 0.25, "processes": [row],
        "events": {"images": 1000, "snapshots": 4, "sample_sheets": 2}, **MADE, "load_average": 5.1,
        "load_range": [1.2, 8.7],
    }  # fmt: skip
    text = report.soak_text(soak)
    assert "load average 5, between 1 and 9, because of other work)" in text
    assert "| rank 0 | 51.00 MB | +0.00 ± 0.00 MB | 1,012 | +20 ± 0 |" in text


@pytest.mark.skipif(in_use() is None, reason="mallinfo2 is of glibc 2.33")
def test_what_is_in_use_is_what_was_taken_from_malloc_and_not_given_back():
    before, blocks = in_use()
    large, small = [ctypes.create_string_buffer(50_000) for _ in range(2000)], [object() for _ in range(10_000)]
    held, more_blocks = in_use()
    # other threads of this process take and free memory, too
    assert math.isclose(held - before, 50_000 * len(large), rel_tol=0.1)
    assert more_blocks - blocks > 0.9 * (len(large) + len(small))
    del large, small
    assert in_use()[0] - before < 0.1 * (held - before)


@pytest.mark.skipif(in_use() is None, reason="mallinfo2 is of glibc 2.33")
def test_a_rank_records_what_it_has_in_use_until_it_ends(tmp_path):
    class Ending(Exception):
        pass

    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) > 2 * soak_rank.LOOKS:
            raise Ending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak_rank.time, "sleep", sleep)
        with pytest.raises(Ending):
            soak_rank.record(soak_rank.in_use_path(tmp_path, 1), every_sec=5.0)
    looks = _read_in_use(tmp_path / "in-use-1.jsonl", started=0.0)
    assert (len(looks), sum(slept[: soak_rank.LOOKS])) == (2, pytest.approx(5.0))
    assert all(look.malloc_mb > 1 and look.python_blocks > 1000 for look in looks)
    assert _read_in_use(tmp_path / "in-use-0.jsonl", started=0.0) == []


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
