"""Rebuilt averages: equal to those tracked all along, as near as they say, and refused where they cannot be."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from edm2kit.ema.power_function import std_to_exp
from edm2kit.ema.rebuild import plan_outputs, reconstruct, write_outputs
from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import read_header, snapshot_name
from edm2kit.snapshots.loading import Weights, load_snapshot, open_sources, open_weights
from edm2kit.torch_utils.files import sampled_sha256
from tests.support import fake_published, golden, runs, tiny
from tests.support.runs import STORED, Walk, changed, with_tensors

FREQS, WEIGHT = "unet.emb_fourier.freqs", "unet.out_conv.weight"


@pytest.fixture(scope="module")
def walk() -> Walk:
    return runs.walk(tracked=(0.07, 0.15))


def parameters(state: dict[str, torch.Tensor]) -> torch.Tensor:
    names = [name for name, _ in Precond(**fake_published.ARCHITECTURE).named_parameters()]
    return torch.cat([state[name].double().flatten() for name in names])


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float((parameters(a) - parameters(b)).norm())


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return distance(a, b) / float(parameters(b).norm())


@pytest.mark.parametrize(("std", "level"), [(0.07, 1e-4), (0.15, 8e-4)])
def test_rebuilt_average_is_the_one_tracked_all_along(walk, std, level):
    state, header = reconstruct(walk.snapshots, std)
    truth = walk.averages[std]
    assert relative(state, truth) < level  # 16 times of two lengths; 64 times come 20 times closer
    nearest = min(distance(walk.averages[stored], truth) for stored in STORED)
    assert distance(state, truth) < nearest / 50
    assert all(torch.equal(state[name], truth[name]) for name in state if "fourier" in name)
    assert list(state) == list(truth)
    assert all(value.dtype == torch.float32 and value.shape == truth[name].shape for name, value in state.items())
    assert (header.nimg, header.ema_std, header.dtype) == (256_000, std, "float32")


def test_rebuilt_average_of_an_earlier_time_reads_nothing_later(walk):
    early = [weights for weights in walk.snapshots if weights.header.nimg <= 128_000]
    late = [with_tensors(w, **{WEIGHT: torch.full((3, 8, 3, 3), torch.nan)}) for w in walk.snapshots[len(early) :]]
    state, header = reconstruct([*early, *late], 0.07, 128_000)
    expected, _ = reconstruct(early, 0.07)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert [source["nimg"] for source in header.recipe["inputs"]] == [w.header.nimg for w in early]


@pytest.mark.parametrize("std", STORED)
def test_a_stored_profile_is_returned_unchanged(walk, std):
    state, header = reconstruct(walk.snapshots, std, 64_000)
    [stored] = [w.tensors for w in walk.snapshots if (w.header.nimg, w.header.ema_std) == (64_000, std)]
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert header.recipe["fit"] == {"error": 0, "width": pytest.approx(std), "rounding": pytest.approx(2.3e-8, rel=0.1)}


def test_snapshots_that_list_their_buffers_need_no_network(walk):
    buffers = tuple(name for name in walk.last if "fourier" in name)
    inputs = [changed(weights, network="from elsewhere", buffers=buffers) for weights in walk.snapshots]
    state, header = reconstruct(inputs, 0.07)
    expected, _ = reconstruct(walk.snapshots, 0.07)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert header.buffers == buffers


def profile(t: np.ndarray, end: float, std: float) -> np.ndarray:
    exp = std_to_exp(std)
    return (exp + 1) * t**exp / end ** (exp + 1) * (t <= end)


@pytest.mark.parametrize("std", [0.02, 0.07, 0.15, 0.25])
def test_fit_is_what_the_profiles_integrals_say(walk, std):
    [output] = plan_outputs(walk.snapshots, [std])
    end, step = 256_000, 0.25
    t = np.arange(step / 2, end, step)
    rebuilt = np.zeros_like(t)
    for coefficient, weights in zip(output.coefficients, walk.snapshots, strict=True):
        rebuilt += coefficient * profile(t, weights.header.nimg, weights.header.ema_std)
    wanted = profile(t, end, std)
    error = np.sqrt(((rebuilt - wanted) ** 2).sum() / (wanted**2).sum())
    mean = (rebuilt * t).sum() * step
    width = np.sqrt((rebuilt * (t - mean) ** 2).sum() * step) / end
    assert output.fit.error == pytest.approx(error, rel=1e-3)
    assert output.fit.width == pytest.approx(width, rel=1e-3)
    assert 1e-3 < output.fit.error < 0.2


def test_profile_that_oscillates_has_no_width(walk):
    [output] = plan_outputs(walk.snapshots, [0.002])
    assert output.fit.width is None
    assert output.fit.error > 0.5


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 1), (torch.bfloat16, 8)])
@pytest.mark.parametrize("std", [0.02, 0.05, 0.07])
def test_rounding_is_what_half_precision_inputs_bring(walk, std, dtype, step):
    name = str(dtype).removeprefix("torch.")
    stored = [
        dataclasses.replace(
            changed(weights, dtype=name),
            tensors={k: v.to(dtype) if v.ndim > 1 else v for k, v in weights.tensors.items()},
        )
        for weights in walk.snapshots
    ]
    state, header = reconstruct(stored, std)
    exact, _ = reconstruct(walk.snapshots, std)
    assert relative(state, exact) == pytest.approx(header.recipe["fit"]["rounding"], rel=0.15)
    if std == 0.05:
        assert header.recipe["fit"]["rounding"] == pytest.approx(1.92e-4 * step, rel=0.01)


def test_many_outputs_of_one_pass_equal_each_alone(walk, tmp_path):
    inputs = open_sources([runs.write(tmp_path / "in", walk.snapshots)])
    assert [w.name for w in inputs] == [w.name for w in walk.snapshots]
    outputs = plan_outputs(inputs, [0.03, 0.07, 0.2], [128_000, 256_000], dtype="float32")
    assert [(o.header.nimg, o.header.ema_std) for o in outputs] == [
        (nimg, std) for nimg in (128_000, 256_000) for std in (0.03, 0.07, 0.2)
    ]
    paths, heard = [tmp_path / f"{i}.safetensors" for i in range(6)], []
    write_outputs(inputs, outputs, paths, heard.append)
    assert sum(heard) == sum(value.numel() for value in walk.last.values())
    for path, output in zip(paths, outputs, strict=True):
        header = output.header
        alone, _ = reconstruct(walk.snapshots, header.ema_std, header.nimg)
        snapshot = load_snapshot(path)
        assert relative(snapshot.net.state_dict(), alone) < 3e-7
        assert snapshot.header == header == read_header(path)


def test_header_records_the_recipe(walk, tmp_path):
    inputs = open_sources([runs.write(tmp_path, walk.snapshots, dtype="float16")])
    [output] = plan_outputs(inputs, [0.07])
    write_outputs(inputs, [output], [tmp_path / "out"])
    header = read_header(tmp_path / "out")
    assert (header.nimg, header.ema_std, header.dtype, header.run_id) == (256_000, 0.07, "float16", "walk")
    assert (header.label_names, header.training_config) == (("ant", "bee", "cat", "dog"), {"lr": 1})
    assert header.recipe["inputs"][-1] == {
        "name": "network-snapshot-0000256-0.100.safetensors",
        "nimg": 256_000,
        "ema_std": 0.1,
        "dtype": "float16",
        "content": sampled_sha256(inputs[-1].path),
        "checksum": inputs[-1].checksum(),
    }
    assert len(inputs[-1].checksum()) == 64
    assert header.recipe["coefficients"] == output.coefficients.tolist()
    assert sum(header.recipe["coefficients"]) == pytest.approx(1)
    assert header.recipe["fit"] == dataclasses.asdict(output.fit)
    assert header.commit not in ("", None)


def test_published_pickles_are_inputs_too(walk, tmp_path):
    (tmp_path / "raw").mkdir()
    net, halves = Precond(**fake_published.ARCHITECTURE), []
    for k, weights in enumerate(walk.snapshots[-4:]):
        kimg, std = (2 << 20) * (2 + k // 2) // 1000, weights.header.ema_std
        net.load_state_dict(weights.tensors)
        path = tmp_path / "raw" / f"edm2-x-{kimg:07d}-{std:.3f}.pkl"
        fake_published.write_snapshot(path, net.half(), fake_published.ARCHITECTURE)
        halves.append({name: value.clone() for name, value in net.state_dict().items()})
        net.float()
    inputs = open_sources([tmp_path / "raw"])
    assert [(w.header.nimg >> 20, w.header.ema_std) for w in inputs] == [(4, 0.05), (4, 0.1), (6, 0.05), (6, 0.1)]
    state, header = reconstruct(inputs, 0.07)
    pairs = zip(header.recipe["coefficients"], halves, strict=True)
    truth = {name: 0.0 for name in state}
    for coefficient, half in pairs:
        truth = {name: truth[name] + coefficient * half[name].double() for name in truth}
    assert relative(state, truth) < 1e-6
    assert header.run_id == "edm2-x"


def refused(inputs: list[Weights], reason: str, std: float = 0.07, nimg: int | None = None) -> None:
    with pytest.raises(ValueError, match=reason):
        reconstruct(inputs, std, nimg)


def test_snapshots_of_another_network_or_run_are_refused_by_name(walk):
    *others, last = walk.snapshots
    first = others[0].name
    wider = {**last.header.architecture, "model_channels": 16}
    refused(
        [*others, changed(last, "x", architecture=wider)], f"x and {first} differ in architecture: model_channels is 16"
    )
    refused([*others, changed(last, "x", encoder={"kind": "vae"})], f"x and {first} differ in encoder: kind is vae")
    refused([*others, changed(last, "x", run_id="b")], "x and .* differ in run_id: 'b', not 'walk'")
    lists_and_tuples = {**last.header.architecture, "channel_mult": (1, 2)}
    reconstruct([*others, changed(last, architecture=lists_and_tuples)], 0.07)


def test_snapshots_that_are_no_averages_of_training_are_refused_by_name(walk):
    *others, last = walk.snapshots
    refused([*others, changed(last, "x", ema_std=None)], "x holds no EMA")
    refused([*others, changed(last, "x", nimg=0)], "x holds no EMA")
    refused([*others, changed(last, "x", recipe={"inputs": []})], "x is itself a rebuilt EMA")
    refused([*others, last, changed(last, "x")], f"x and {last.name} are both at 256000 images with EMA length 0.1")
    missing = dataclasses.replace(last, name="x", tensors={k: v for k, v in last.tensors.items() if k != WEIGHT})
    refused([*others, missing], rf"x: weights do not fit .*\(first at {WEIGHT}\)")
    refused([*others, with_tensors(last, extra=torch.zeros(1))], r"first at extra")
    refused([], "no snapshots")


def test_bad_values_are_refused_by_name(walk):
    *others, last = walk.snapshots
    weight, freqs = last.tensors[WEIGHT].clone(), last.tensors[FREQS] + 1
    weight[1, 2] = torch.inf
    refused([*others, changed(with_tensors(last, **{WEIGHT: weight}), "x")], f"x: {WEIGHT} is not finite")
    refused([*others, changed(with_tensors(last, **{FREQS: freqs}), "x")], f"x and .* differ in the buffer {FREQS}")


def test_bad_values_are_refused_even_if_the_first_output_does_not_use_them(walk, tmp_path):
    *others, last = walk.snapshots
    weight = last.tensors[WEIGHT].clone()
    weight[1, 2] = torch.inf
    inputs = [*others, changed(with_tensors(last, **{WEIGHT: weight}), "x")]
    outputs = plan_outputs(inputs, [0.07], [128_000, 256_000])
    assert outputs[0].coefficients[-1] == 0
    with pytest.raises(ValueError, match=f"x: {WEIGHT} is not finite"):
        write_outputs(inputs, outputs, [tmp_path / "0", tmp_path / "1"])
    assert list(tmp_path.iterdir()) == []


def test_times_and_lengths_out_of_reach_are_refused(walk):
    refused(walk.snapshots, "no snapshot at 100000 images; .*16 times are 80000, 96000, 112000, 128000", nimg=100_000)
    refused(walk.snapshots, r"at most 0\.2886; got \[0\.29\]", std=0.29)
    refused(walk.snapshots, r"at most 0\.2886", std=0)
    refused(walk.snapshots[:1], "there is one snapshot up to 16000 images")
    assert reconstruct(walk.snapshots[:1], 0.05)[1].recipe["coefficients"] == [1]


def test_folders_are_refused_with_a_reason(walk, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        open_sources([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="found no training snapshots in "):
        open_sources([tmp_path])
    runs.write(tmp_path, walk.snapshots[:4])
    with pytest.raises(ValueError, match="names that start with 'other'"):
        open_sources([tmp_path], prefix="other")
    with pytest.raises(ValueError, match=r"has the EMA length 0\.2; available: 0\.05, 0\.1"):
        open_sources([tmp_path], stds=[0.05, 0.2])
    assert {w.header.ema_std for w in open_sources([tmp_path], stds=[0.05])} == {0.05}
    whole = (tmp_path / walk.snapshots[0].name).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a complete snapshot"):
        open_sources([tmp_path])


def test_file_cut_short_in_the_middle_of_a_run_is_named_and_nothing_written(walk, tmp_path):
    inputs = open_sources([runs.write(tmp_path / "in", walk.snapshots[-4:])])
    outputs = plan_outputs(inputs, [0.07, 0.08])
    os.truncate(inputs[2].path, inputs[2].path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{inputs[2].name} was truncated"):
        write_outputs(inputs, outputs, [tmp_path / "out" / "a", tmp_path / "out" / "b"])
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_open_without_being_read(walk, tmp_path):
    path = runs.write(tmp_path, walk.snapshots[:1]) / snapshot_name(16_000, 0.05)
    weights = open_weights(path)
    assert weights.header == walk.snapshots[0].header
    assert {name: span.shape for name, span in weights.tensors.items()} == {n: t.shape for n, t in walk.last.items()}
    with pytest.raises(ValueError, match="missing"):
        open_weights(tmp_path / "missing")


PEAK = """
import resource, sys, torch
from edm2kit.ema.rebuild import plan_outputs, write_outputs
from edm2kit.snapshots.loading import open_sources
folder, count = sys.argv[1], int(sys.argv[2])
inputs = open_sources([folder])[-count:]
outputs = plan_outputs(inputs, [0.06, 0.07, 0.08, 0.09])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_outputs(inputs, outputs, [f"{folder}/out/{i}" for i in range(4)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_inputs(tmp_path):
    architecture = {**golden.architecture("uncond"), "model_channels": 128, "channels_per_head": 64}
    net = Precond(**architecture)
    megabytes = sum(p.numel() for p in net.parameters()) * 4 / 1e6
    for k in range(1, 13):
        for std in STORED:
            weights = runs.snapshot(k * 1_000_000, std, net.state_dict())
            runs.write(tmp_path, [changed(weights, architecture=architecture, label_names=None)])
    peaks = {}
    for count in (4, 24):
        command = [sys.executable, "-c", PEAK, str(tmp_path), str(count)]
        done = subprocess.run(command, env=tiny.environment(), cwd=tiny.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout) / 1e3
    assert megabytes > 40
    assert peaks[24] < peaks[4] + 15  # one network more would be 40 and above, mapped files 1000
    assert peaks[24] < megabytes
