"""The harness: contenders take turns, ratios pair runs of the same round, records are read back as written."""

import importlib.machinery
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Comparison, Work
from benchmarks.tables import comparison_table


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a contender says so."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return spend


def test_contenders_take_turns_and_warm_up_is_not_counted():
    order = []
    seconds = harness.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=2, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_prepare_is_called_before_each_run_and_is_not_timed(clock):
    order = []
    ways = {way: (lambda way=way: (order.append(way), clock(1.0))) for way in ("plain", "fast")}
    job = Comparison("prepared", ways, prepare=lambda: (order.append("prepare"), clock(100.0)))
    record = harness.measure(job, runs=1, warmup=0)
    assert order == ["prepare", "plain", "prepare", "fast"]
    assert [row["median_sec"] for row in record["contenders"].values()] == [1, 1]


def test_ratios_are_taken_round_by_round_so_that_a_drifting_machine_does_not_count(clock):
    pace = iter([1, 1, 10, 10, 3, 3])
    job = Comparison("drift", {"plain": lambda: clock(4 * next(pace)), "fast": lambda: clock(2 * next(pace))})
    row = harness.measure(job, runs=3, warmup=0)["contenders"]["fast"]
    assert (row["ratio"], row["ratio_range"]) == (2, [2, 2])
    assert row["median_sec"] == 6


def test_a_contender_that_does_a_part_counts_as_often_as_there_are_parts(clock):
    job = Comparison("parts", {"plain": lambda: clock(3.0), "whole": lambda: clock(6.0)}, times={"plain": 8})
    record = harness.measure(job, runs=2, warmup=0)
    assert record["contenders"]["plain"]["median_sec"] == 24
    assert record["contenders"]["whole"]["ratio"] == 4
    assert record["times"] == {"plain": 8}


def test_work_is_reported_per_second_and_as_a_share_of_the_ceiling(clock, monkeypatch):
    monkeypatch.setattr(harness, "ceiling", lambda name, device: 100.0)
    job = Comparison("work", {"plain": lambda: clock(2.0)}, work=Work(50, "bytes", "memory_copy"))
    row = harness.measure(job, runs=1, warmup=0)["contenders"]["plain"]
    assert (row["per_sec"], row["share_of_ceiling"]) == (25, 0.25)


def test_a_record_is_read_back_as_it_was_written(clock, tmp_path):
    job = Comparison(
        "kept", {"plain": lambda: clock(1.0)}, goals={"plain": 1.0}, errors={"plain": 1e-6}, error_kind="norm"
    )
    record = harness.measure(job, runs=1, warmup=0)
    harness.save(record, tmp_path)
    assert harness.load(tmp_path) == [record]
    assert "| kept | plain | 1.00 s | 1 | 1: reached | 1.0e-06 |" in comparison_table([record])


def test_a_record_names_a_command_that_a_person_can_paste(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/ema.py", "--only", "8", "--out", "a folder"])
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    main.__spec__ = importlib.machinery.ModuleSpec("benchmarks.ema", None)
    assert harness.command() == "python -m benchmarks.ema --only 8 --out 'a folder'"
    main.__spec__ = None
    assert harness.command() == "python /somewhere/benchmarks/ema.py --only 8 --out 'a folder'"


def test_ceilings_are_positive_and_measured_once(monkeypatch):
    runs = []
    monkeypatch.setitem(harness.CEILINGS, "tiny", lambda device: [(lambda: runs.append(1), 8)])
    monkeypatch.setattr(harness, "_measured", {})
    assert harness.ceiling("tiny") > 0
    harness.ceiling("tiny")
    assert len(runs) == 9


def test_the_fastest_way_is_the_ceiling(clock, monkeypatch):
    ways = [(lambda: clock(4.0), 8), (lambda: clock(1.0), 8), (lambda: clock(2.0), 8)]
    monkeypatch.setitem(harness.CEILINGS, "tiny", lambda device: ways)
    monkeypatch.setattr(harness, "_measured", {})
    assert harness.ceiling("tiny") == 8


def test_both_kinds_of_products_do_the_work_that_they_are_credited_with():
    for run, amount in harness.CEILINGS["matmul_fp32"](torch.device("cpu")):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 2 * amount


def test_a_way_in_another_precision_has_a_ceiling_of_its_own(clock, monkeypatch):
    monkeypatch.setattr(harness, "ceiling", lambda name, device: {"slow": 100.0, "fast": 200.0}[name])
    ways = {"plain": lambda: clock(2.0), "half": lambda: clock(1.0)}
    job = Comparison("work", ways, work=Work(50, "multiply-adds", "slow"), ceilings={"half": "fast"})
    rows = harness.measure(job, runs=1, warmup=0)["contenders"]
    assert [row["share_of_ceiling"] for row in rows.values()] == [0.25, 0.25]


def test_the_relative_error_is_a_norm():
    assert harness.relative_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) == pytest.approx(0.02)
