"""The GPU measurements: refused without a GPU, resumed, held to their time; and, on tiny networks, run through."""

import dataclasses
import json
import math

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, gpu_items, harness
from benchmarks.half_plain import HalfPlainNetwork, HalfPlainTraining
from benchmarks.plain import PlainNetwork, PlainTraining
from tests.support import golden
from tests.support.fake_gpu import DEVICE, FakeGPU


def invoke(*arguments):
    return CliRunner().invoke(gpu.main, [str(a) for a in arguments])


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    refused = invoke("--out", tmp_path / "gpu.json")
    assert refused.exit_code == 1
    assert len(refused.output.strip().splitlines()) == 1
    assert "PyTorch finds none" in refused.output
    assert not list(tmp_path.iterdir())


def test_an_unknown_item_is_named_with_those_there_are(tmp_path):
    refused = invoke("--toy", "--only", "training", "--out", tmp_path / "gpu.json")
    assert refused.exit_code == 1
    assert "'training'" in refused.output
    assert "sampling-img512-s-bf16" in refused.output


def test_each_item_fits_into_a_call_of_nine_minutes_whatever_compiling_takes():
    listed = gpu_items.items(gpu_items.gpu_setting())
    for measured in ({}, {"compile": {"numbers": {"evaluation: compile s": 900.0, "training: compile s": 2000.0}}}):
        compile_sec = gpu_items.compile_seconds(measured)
        assert all(0 < item.limit_sec(compile_sec) <= 9 * 60 for item in listed.values())


def test_time_limits_follow_from_what_compiling_takes_here():
    item = gpu_items.items(gpu_items.gpu_setting())["sampling-img512-s-fp16"]
    slow, fast = ({"compile": {"numbers": {"evaluation: compile s": seconds}}} for seconds in (60.0, 20.0))
    difference = item.limit_sec(gpu_items.compile_seconds(slow)) - item.limit_sec(gpu_items.compile_seconds(fast))
    assert difference == 1.5 * 2 * 40  # two networks


def test_every_goal_has_its_rows():
    listed = gpu_items.items(gpu_items.gpu_setting())
    for preset in ("img512-xs", "img512-s", "img64-s"):
        for precision in ("fp16", "bf16"):
            assert {f"{kind}-{preset}-{precision}" for kind in ("training", "sampling", "evaluation")} <= set(listed)
    assert {"detectors", "vae", "memory-img512-xxl"} <= set(listed)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("ceilings", "vae") else pytest.mark.slow)
        for name in gpu_items.items(gpu_items.dry_setting(DEVICE))
    ],
)
def test_every_item_runs_at_full_size_on_a_stand_in_for_a_gpu(name):
    with FakeGPU() as gpu:
        *_, last = gpu_items.items(gpu_items.dry_setting(DEVICE))[name].run()
    assert gpu.mixed == []
    if name.startswith(("training", "sampling", "evaluation", "four-images")):
        expected = {"plain", "default", "compiled"} | (set() if name.startswith("training") else {"CUDA graphs"})
        assert expected <= set(last["contenders"])


def test_items_run_in_processes_and_a_second_run_resumes(tmp_path):
    out = tmp_path / "gpu.json"
    first = invoke("--toy", "--only", "ceilings", "--out", out)
    assert first.exit_code == 0, first.output
    measured = json.loads(out.read_text())["items"]["ceilings"]
    assert measured["numbers"]["memory_copy: bytes/s"] > 0
    second = invoke("--toy", "--only", "ceilings", "--out", out)
    assert "ceilings: complete, skipped" in second.output
    assert json.loads(out.read_text())["items"]["ceilings"] == measured
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_records_of_toys_and_of_machines_are_not_mixed(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"toy": False, "items": {}, "provenance": {"hardware": "a card"}}))
    refused = invoke("--toy", "--out", out)
    assert refused.exit_code == 1
    assert "was measured on a card. Move it" in refused.output


def test_results_found_before_the_time_limit_are_kept(tmp_path, monkeypatch):
    def slow(line, cwd, timeout):
        path = line[line.index("--out") + 1]
        gpu.save({"numbers": {"fast": 1.0}}, gpu.Path(path))
        raise gpu.subprocess.TimeoutExpired(line, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", slow)
    found = gpu.run_item("ceilings", tmp_path / "gpu.json", 30, ["--toy"])
    assert found == {"numbers": {"fast": 1.0}, "error": "it took longer than 30 s"}


def test_without_compiling_other_ways_are_measured_once_and_the_item_stays_incomplete(tmp_path):
    out, name = tmp_path / "gpu.json", "training-img512-xs-bf16"
    line = ["--toy", "--no-compile", "--only", name, "--out", out]
    assert invoke(*line).exit_code == 0
    item = json.loads(out.read_text())["items"][name]
    assert set(item["contenders"]) == {"plain", "default"}
    assert item["error"] == gpu.WITHOUT_COMPILING
    assert "complete" not in item
    assert f"{name}: measured without compiling, skipped" in invoke(*line).output
    setting = dataclasses.replace(gpu_items.toy_setting(), compiled=False)
    assert "compile" not in gpu_items.items(setting)
    assert not any(found.compiled for found in gpu_items.items(setting).values())


def test_an_item_without_time_left_waits_for_the_next_call(tmp_path):
    done = invoke("--toy", "--minutes", 0, "--only", "ceilings", "--out", tmp_path / "gpu.json")
    assert done.exit_code == 0
    assert "ceilings: may take 180 s, more than this call has left" in done.output
    assert "Run the same command again for the rest" in done.output
    assert list(tmp_path.iterdir()) == []


def test_items_that_failed_come_after_those_never_tried(tmp_path, monkeypatch):
    out, tried = tmp_path / "gpu.json", []
    fresh = gpu.read(out, toy=True)
    gpu.save({**fresh, "items": {"ceilings": {"error": "its process ended with exit code 1"}}}, out)

    def run(name, *arguments):
        tried.append(name)
        return {"complete": True}

    monkeypatch.setattr(gpu, "run_item", run)
    done = invoke("--toy", "--minutes", 60, "--out", out)
    assert tried[-1] == "ceilings"
    assert f"{len(tried)} of {len(tried)} items are complete" in done.output


def test_the_memory_item_forecasts_what_it_measures():
    last = list(gpu_items.xxl_memory(gpu_items.toy_setting()))[-1]["numbers"]
    assert last["recompute true: forecast GB"] < last["recompute false: forecast GB"]


def test_the_half_precision_yardstick_is_the_plain_one_at_full_precision():
    arrays = golden.load("network_cond.npz")
    architecture, state = golden.architecture("cond"), golden.part(arrays, "state/")
    x, sigma, labels = (arrays[name] for name in ("x", "sigma", "labels"))
    plain = PlainNetwork(architecture, state)(x, sigma, labels)
    assert torch.equal(HalfPlainNetwork(architecture, state, torch.float32)(x, sigma, labels), plain)
    half = HalfPlainNetwork(architecture, state, torch.bfloat16)(x, sigma, labels)
    assert half.dtype == torch.float32
    assert 1e-4 < harness.relative_error(half, plain) < 0.02
    losses = []
    for training in (
        PlainTraining(architecture, state, (5.0,), -0.4, 1.0),
        HalfPlainTraining(architecture, state, (5.0,), torch.float32),
    ):
        torch.manual_seed(0)
        losses.append(training.step(x, labels, 0.01))
    assert torch.equal(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(gpu_items.items(gpu_items.toy_setting())))
def test_every_item_runs_through_on_tiny_networks(name):
    *_, last = gpu_items.items(gpu_items.toy_setting())[name].run()
    assert all(value >= 0 for value in last["numbers"].values() if not math.isnan(value))
    if "contenders" in last:
        assert next(iter(last["contenders"])) == "plain"
        assert "compiled" in last["contenders"]
        assert all(row["error"] is None or 0 < row["error"] < 0.1 for row in last["contenders"].values())  # bfloat16
    if name.startswith("sampling"):
        assert last["numbers"]["guided over unguided"] > 1
