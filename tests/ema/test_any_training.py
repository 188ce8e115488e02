"""Post-hoc EMA for any training: exact profiles whatever the update interval, and rebuilt lengths that are right."""

import functools
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from edm2kit.cli import phema
from edm2kit.ema.any_training import PowerEMA, load_parameters_
from edm2kit.ema.power_function import std_to_exp
from edm2kit.snapshots.file_format import read_header, read_tensors
from edm2kit.snapshots.loading import load_snapshot
from tests.docs.support import page

BATCH = 16


@functools.cache
def measured_std(std: float, interval: int, steps: int = 10_000) -> float:
    """The relative standard deviation that the weights of an average really have.

    The parameters are the time and its square, so that the averages are the first two moments of the profile.
    """
    moments = torch.zeros(2, dtype=torch.float64)
    ema = PowerEMA([moments], stds=[std])
    for step in range(interval, steps + 1, interval):
        t = step / steps
        moments.copy_(torch.tensor([t, t**2]))
        ema.update(step * BATCH)
    mean, square = ema.averages[0]["0"].tolist()
    return (square - mean**2) ** 0.5


INTERVALS = (1, 10, 100)


@pytest.mark.parametrize("std", [0.05, 0.1])
@pytest.mark.parametrize("interval", INTERVALS)
def test_the_profile_has_its_length_whatever_the_update_interval(std, interval):
    assert measured_std(std, interval) == pytest.approx(std, rel=0.01 if interval == 100 else 1e-3)


def test_the_page_has_the_measured_lengths():
    text = page("docs/any-model.md")
    for std in (0.05, 0.1):
        row = re.search(rf"^\| {std:.3f} \|(.*)\|$", text, re.MULTILINE)
        shown = [float(cell) for cell in row[1].split("|")]
        assert shown == [pytest.approx(measured_std(std, interval), abs=5e-6) for interval in INTERVALS]


def test_an_average_is_the_weighted_sum_of_what_was_added():
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    times = np.array([2, 3, 7, 8, 20])
    parameter = torch.zeros(1, dtype=torch.float64)
    ema = PowerEMA({"w": parameter}, stds=[0.08])
    for value, time in zip(values, times, strict=True):
        parameter.fill_(value)
        ema.update(int(time))
    power = float(std_to_exp(0.08)) + 1
    mass = np.diff(np.concatenate([[0], (times / times[-1]) ** power]))  # of the profile, since the update before
    assert float(ema.state(0)["w"]) == pytest.approx(float(np.dot(mass, values.numpy())), abs=1e-12)


def train(ema_of, folder, steps=64, every=8, interval=1, **options):
    """A run whose weights are smooth functions of time; a snapshot every `every` steps."""
    ema = PowerEMA(ema_of, **options)
    tensors = list(ema.parameters.values())
    history = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for k, tensor in enumerate(tensors):
                tensor.copy_(torch.linspace(0, 3, tensor.numel()).add(k).mul(4 * step / steps).sin().view_as(tensor))
        history.append([tensor.detach().clone() for tensor in tensors])
        if step % interval == 0:
            ema.update(step * BATCH)
        if step % every == 0:
            ema.save(folder)
    return ema, history


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def rebuild(folder, dest, std):
    words = ["--indir", folder, "--outdir", dest, "--outstd", std, "--dtype", "fp32"]
    done = CliRunner().invoke(phema.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    (path,) = dest.glob("*.safetensors")
    return path


@pytest.mark.parametrize("interval", [1, 4])
def test_the_command_rebuilds_a_length_that_was_not_tracked(tmp_path, interval):
    model = net()
    train(model, tmp_path / "ema", interval=interval)
    path = rebuild(tmp_path / "ema", tmp_path / "out", 0.15)
    direct = PowerEMA(model, stds=[0.15])
    _, history = train(model, tmp_path / "again", interval=interval)
    for step, values in enumerate(history, 1):
        if step % interval == 0:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), values, strict=True):
                    parameter.copy_(value)
            direct.update(step * BATCH)
    assert read_header(path).ema_std == 0.15
    load_parameters_(model, path)
    for name, expected in direct.state(0).items():
        error = (dict(model.named_parameters())[name] - expected).abs().max()
        assert error < 0.01, name  # of values in [-1, 1]


def test_a_lora_alone_is_averaged_and_put_back(tmp_path):
    peft = pytest.importorskip("peft")
    base = net()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    ema, _ = train(model, tmp_path / "ema", steps=16)
    assert len(ema.parameters) == 4
    assert all("lora_" in name for name in ema.parameters)
    path = rebuild(tmp_path / "ema", tmp_path / "out", 0.1)
    frozen = base[0].base_layer.weight.clone()
    load_parameters_(model, path)
    assert torch.equal(base[0].base_layer.weight, frozen)
    for name, tensor in read_tensors(path):
        torch.testing.assert_close(dict(model.named_parameters())[name].data, ema.state(1)[name])
        torch.testing.assert_close(tensor, ema.state(1)[name])


def test_averages_are_float32_where_parameters_are_not(tmp_path):
    model = net().to(torch.bfloat16)
    ema, _ = train(model, tmp_path, steps=8)
    assert {average.dtype for average in ema.averages[0].values()} == {torch.float32}
    (path, _) = sorted(tmp_path.iterdir())
    load_parameters_(model, path)
    assert model[0].weight.dtype == torch.bfloat16


def test_swapping_in_is_undone_even_after_an_error(tmp_path):
    model = net()
    ema, _ = train(model, tmp_path, steps=8)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def evaluate_and_fail():
        with ema.swapped_in(0):
            seen.append(model[0].weight.clone())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_and_fail()
    assert torch.equal(seen[0], ema.state(0)["0.weight"])
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_a_resumed_training_continues_bit_for_bit(tmp_path):
    model = net()
    ema, _ = train(model, tmp_path, steps=8)
    resumed = PowerEMA(model)
    resumed.load_state_dict(ema.state_dict())
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    for one in (ema, resumed):
        one.update(9 * BATCH)
    assert resumed.run_id == ema.run_id
    assert all(torch.equal(resumed.averages[1][name], ema.averages[1][name]) for name in ema.parameters)
    with pytest.raises(ValueError, match=r"has the EMA lengths \['0.05', '0.1'\], not \[0.07\]"):
        PowerEMA(model, stds=[0.07]).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="does not fit these parameters"):
        PowerEMA(nn.Linear(2, 2)).load_state_dict(ema.state_dict())


def test_sharded_parameters_stay_sharded(tmp_path):
    """Parameters of torch.distributed.tensor, as fully_shard makes them, on a mesh of one."""
    import torch.distributed as group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    group.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = torch.arange(6.0).reshape(3, 2)
        sharded = nn.Parameter(distribute_tensor(plain.clone(), mesh, [Shard(0)]))
        for tensor, folder in ((sharded, "sharded"), (nn.Parameter(plain.clone()), "plain")):
            ema = PowerEMA({"w": tensor})
            ema.update(1)
            with torch.no_grad():
                tensor.mul_(2)
            ema.update(3)
            ema.save(tmp_path / folder)
        files = [sorted((tmp_path / folder).iterdir()) for folder in ("sharded", "plain")]
        for ours, expected in zip(*files, strict=True):
            assert torch.equal(dict(read_tensors(ours))["w"], dict(read_tensors(expected))["w"])
        load_parameters_({"w": sharded}, files[0][0])
        assert torch.equal(sharded.full_tensor(), dict(read_tensors(files[0][0]))["w"])
    finally:
        group.destroy_process_group()


def test_mistakes_are_refused(tmp_path):
    model = net()
    ema = PowerEMA(model)
    with pytest.raises(ValueError, match="averages exist only after the first update"):
        ema.save(tmp_path)
    ema.update(16)
    with pytest.raises(ValueError, match="update at time 16, but the last one was at 16"):
        ema.update(16)
    with pytest.raises(ValueError, match="nothing to average"):
        PowerEMA(net().requires_grad_(False))
    with pytest.raises(ValueError, match=r"must be above 0 and at most 0\.2886"):
        PowerEMA(model, stds=[0.5])
    path, _ = ema.save(tmp_path)
    with pytest.raises(ValueError, match="does not fit these parameters"):
        load_parameters_(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="holds parameters of a module"):
        load_snapshot(path)
