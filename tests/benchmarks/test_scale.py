"""Benchmarks of scale at toy size: what they measure is what they say."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import growth, memory, scaling
from benchmarks.step_model import Links, Machine, TrainingJob, step_time
from benchmarks.trainers import Clock


def test_a_clock_adds_up_calls_by_name(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr("benchmarks.trainers.time.perf_counter", lambda: next(now))

    class Worker:
        def work(self, amount):
            return amount + 1

    worker, clock = Worker(), Clock()
    clock.watch(worker, "work", "working")
    assert [worker.work(1), worker.work(2)] == [2, 3]
    assert clock.seconds == {"working": 3.0}


def test_one_process_times_its_steps_and_their_phases():
    found = scaling.time_steps(steps=1, batch=1, channels=16)
    assert sum(found["phases_sec"].values()) == pytest.approx(found["step_sec"], rel=0.1)
    assert set(found["phases_sec"]) == {"compute and communication", "cleaning", "update", "averages", "normalising"}
    assert "overlap" not in found


def test_the_model_is_checked_against_what_it_has_not_seen():
    # a machine that is just what the model thinks
    machine = Machine(1e9, 1e9, Links(2, 1e8, 1e8, 0), overlap=0, pass_sec=0.3)
    quarter, half, whole = (step_time(TrainingJob(10**6, 1e6, n), machine, 1) for n in (2, 4, 8))
    both = step_time(TrainingJob(10**6, 1e6, 16), machine, 2)
    found = {"pair": {"all_reduce_bytes_per_sec": 1e8}}
    for way, time in (("quarter", quarter), ("half", half)):
        found[way] = {"step_sec": time.total, "phases_sec": {"compute and communication": time.compute}}
        found[way] |= {"parameters": 10**6, "multiply_adds": 1e6}
    measured = {"alone": whole.total, "ranks": 2 * both.total}
    answers = scaling.check_model(measured, found, 8)
    assert answers["alone"]["error"] == pytest.approx(0)
    assert answers["ranks"]["error"] == pytest.approx(-0.5)
    assert answers["ranks"]["communication_sec"] == pytest.approx(0.04)


def test_two_ranks_are_held_against_the_slower_of_two_processes():
    process = {"parameters": 1, "multiply_adds": 1}
    process |= {"overlap": {}, "all_reduce_bytes_per_sec": 1e9}

    def seconds(*found):
        return [{**process, "step_sec": v, "phases_sec": {"compute and communication": v - 0.1}} for v in found]

    ways = {"quarter": [seconds(0.4)] * 2, "half": [seconds(0.6)] * 2, "alone": [seconds(1.0)] * 2}
    pair = seconds(1.9, 2.0)
    pair[0]["blocks"] = {"independent": [1.0, 1.8], "ranks": [2.0, 1.0]}
    pair[1]["blocks"] = {"independent": [1.7, 1.0], "ranks": [1.9, 2.0]}
    record = scaling.summary({**ways, "pair": [pair, pair]}, 8, 64)
    assert record["efficiency_range"] == [pytest.approx(0.85), pytest.approx(0.9)]
    assert record["step_sec"]["ranks"] == 2.0
    assert record["blocks"] == 4


def test_memory_of_a_process_is_measured_and_forecast():
    found = memory.peak_memory({"recompute": True}, channels=32, batch=2, resolution=16)
    assert found["forecast_bytes"] == found["state_bytes"] + found["activation_bytes"]
    assert found["state_bytes"] == found["parameters"] * 24
    assert found["measured_bytes"] >= 0  # this process has been larger before


def test_growth_is_measured_along_every_axis(tmp_path):
    done = CliRunner().invoke(growth.main, ["--toy", "--runs", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "growth.json").read_text())
    for axis, values in growth.TOY_AXES.items():
        assert [row[axis] for row in record["axes"][axis]] == list(values)
        assert all(row["training_images_per_sec"] > 0 for row in record["axes"][axis])
    narrow, wide = (row["multiply_adds"] for row in record["axes"]["channels"])
    assert narrow < wide
