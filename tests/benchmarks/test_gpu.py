"""The GPU measurements: refused without a GPU, resumed, held to their time; and, on tiny networks, run through."""

import json
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, gpu_items, harness
from benchmarks.half_plain import HalfPlainNetwork, HalfPlainTraining
from benchmarks.plain import PlainNetwork, PlainTraining
from tests.support import golden


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
    assert "guided-img512-s-bf16" in refused.output


def test_the_real_items_fit_into_the_time_that_is_promised():
    listed = gpu_items.items(gpu_items.gpu_setting())
    assert sum(limit for limit, _ in listed.values()) <= 25 * 60
    for preset in ("img512-xs", "img512-s", "img64-s"):
        for precision in ("fp16", "bf16"):
            assert {f"training-{preset}-{precision}", f"evaluation-{preset}-{precision}"} <= set(listed)


def test_items_run_in_processes_and_a_second_run_resumes(tmp_path):
    out = tmp_path / "gpu.json"
    first = invoke("--toy", "--only", "ceilings", "--out", out)
    assert first.exit_code == 0, first.output
    measured = json.loads(out.read_text())["items"]["ceilings"]
    assert measured["numbers"]["memory_copy"] > 0
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
    found = gpu.run_item("ceilings", tmp_path / "gpu.json", 30, toy=True)
    assert found == {"numbers": {"fast": 1.0}, "error": "it took longer than 30 s"}


def test_an_item_without_time_left_waits_for_the_next_run(tmp_path):
    out = tmp_path / "gpu.json"
    began = time.monotonic()
    done = invoke("--toy", "--minutes", 0, "--only", "ceilings", "--out", out)
    assert done.exit_code == 0
    assert time.monotonic() - began < 5
    assert "no time was left" in json.loads(out.read_text())["items"]["ceilings"]["error"]


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
    limit_sec, run = gpu_items.items(gpu_items.toy_setting())[name]
    *_, last = run()
    assert limit_sec > 0
    assert all(value >= 0 for value in last["numbers"].values())
    if "contenders" in last:
        assert next(iter(last["contenders"])) == "plain"
        assert list(last["contenders"])[-1] == "compiled"
        assert all(row["error"] is None or 0 < row["error"] < 0.1 for row in last["contenders"].values())  # bfloat16
    if name.startswith("guided"):
        assert last["numbers"]["guided over unguided"] > 1
