"""The training loop: label dropout hits the stated fraction of images, whatever the batch, and changes nothing else."""

import math
import re
import threading

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.data import batches
from edm2kit.data.batches import MicroBatch
from edm2kit.data.dataset import ImageDataset
from edm2kit.models.encoders import make_encoder
from edm2kit.models.networks import NETWORKS
from edm2kit.snapshots.file_format import Header
from edm2kit.torch_utils import dist
from edm2kit.training import checkpoint, loop
from edm2kit.training.checkpoint import damage, list_checkpoints, named_tensors
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from edm2kit.training.loop import Trainer, drop_labels
from tests.support import tiny
from tests.support.fake_gpu import DEVICE, FakeGPU

NUM = 2000
# kernels of a training step of EDM2-S with 32 images: lower the number when a step gets leaner, and do not raise it
STEP_LAUNCHES = 5114
LABELS = torch.eye(4)[torch.arange(NUM) % 4]


@pytest.mark.parametrize("off", [(), ("status",), ("snapshot",), ("checkpoint",)])
def test_an_interval_of_0_turns_it_off_even_at_the_end(tmp_path, off):
    data = tiny.make_dataset(tmp_path / "data")
    config = tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=32)
    command = ["--config", config, "--data", data, "--outdir", tmp_path / "run", "--samples", 0, "--device", "cpu"]
    for name in off:
        command += [f"--{name}", 0]
    done = CliRunner().invoke(train.main, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    files = [path.name for path in (tmp_path / "run").rglob("*")]
    found = {
        "snapshot": any(name.startswith("network-snapshot") for name in files),
        "checkpoint": any(name.startswith("training-state") for name in files),
        "status": "gradient_norm" in "".join(p.read_text() for p in (tmp_path / "run").rglob("*.jsonl")),
    }
    assert found == {name: name not in off for name in found}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_empty_rows_is_binomial(share):
    dropped = drop_labels(LABELS, range(NUM), share, seed=0)
    empty = dropped.sum(dim=1) == 0
    assert abs(empty.sum().item() - share * NUM) < 4 * math.sqrt(NUM * share * (1 - share))
    assert torch.equal(dropped[~empty], LABELS[~empty])
    assert dropped.dtype == LABELS.dtype


def test_the_ends_are_all_and_none():
    assert torch.equal(drop_labels(LABELS, range(NUM), 0.0, seed=0), LABELS)
    assert drop_labels(LABELS, range(NUM), 1.0, seed=0).count_nonzero() == 0


def test_an_image_does_not_depend_on_its_batch_but_on_position_and_seed():
    whole = drop_labels(LABELS, range(NUM), 0.5, seed=0)
    assert torch.equal(drop_labels(LABELS[700:710], range(700, 710), 0.5, seed=0), whole[700:710])
    assert not torch.equal(drop_labels(LABELS, range(NUM), 0.5, seed=1), whole)
    assert not torch.equal(drop_labels(LABELS, range(1, NUM + 1), 0.5, seed=0), whole)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="--label-dropout must be between 0 and 1"):
        TrainConfig(label_dropout=share)


def test_train_py_drops_labels_in_the_loss_and_keeps_the_noise(tmp_path, monkeypatch):
    data, seen = tiny.make_dataset(tmp_path / "data"), {}

    class Watching(loop.EDM2Loss):
        def terms(self, net, images, labels, rng=None):
            terms = super().terms(net, images, labels, rng)
            seen.setdefault(run, []).append((labels, terms.sigma))
            return terms

    monkeypatch.setattr(loop, "EDM2Loss", Watching)
    config = tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=32)
    for run, more in (("plain", []), ("dropped", ["--label-dropout", "0.5"])):
        command = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0, "--outdir", tmp_path / run]
        done = CliRunner().invoke(train.main, [str(word) for word in [*command, *more]])
        assert done.exit_code == 0, done.output
    assert len(seen["plain"]) == len(seen["dropped"]) == 2
    for k, ((labels, sigma), (dropped, same)) in enumerate(zip(seen["plain"], seen["dropped"], strict=True)):
        assert torch.equal(sigma, same)
        assert torch.equal(dropped, drop_labels(labels, range(16 * k, 16 * k + 16), 0.5, seed=0))
        assert 0 < (dropped.sum(dim=1) == 0).sum() < 16


def trainer_on(device, preset, encoder, **changes):
    """A trainer of a preset with images of 64x64, without data."""
    config = config_from_dict({**read_yaml(preset_path(preset)), **changes}, preset)
    architecture = NETWORKS[config.network_kind].full_architecture(
        img_resolution=64,
        img_channels=4 if encoder == "vae" else 3,
        label_dim=1000,
        sigma_data=0.5,
        network=config.network,
    )
    spec = make_encoder({"kind": encoder}).spec()
    header = Header(architecture, spec, 0, None, None, "float16", "run", {}, network=config.network_kind)
    with device:
        return Trainer(config, header, make_encoder(spec), device)


def test_a_step_on_a_gpu_waits_for_nothing_and_launches_few_kernels():
    batch = MicroBatch(torch.zeros(32, 8, 64, 64), torch.zeros(32, 1000), torch.arange(32))
    with FakeGPU() as gpu:
        trainer = trainer_on(DEVICE, "edm2-img512-s", "vae", batch_size=32, precision="fp16", loss_scaling=100.0)
        trainer.step(iter([batch]), 1)
        gpu.clear()
        trainer.step(iter([batch]), 1)
    assert gpu.mixed == gpu.waits == []
    assert gpu.num_launches <= STEP_LAUNCHES, gpu.launches.most_common()
    gpu.clear()
    with gpu:
        trainer.stats.collect()
    assert len(gpu.waits) == 1


def test_gradients_are_views_of_one_buffer_in_the_layout_of_their_parameters():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 2, 1)).to(memory_format=torch.channels_last)
    flat = loop._flatten_gradients_(net)
    net(torch.ones(1, 3, 4, 4)).sum().backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    assert [part.data_ptr() for part in loop._joined(gradients)] == [flat.data_ptr()]
    assert all(gradient.stride() == p.stride() for gradient, p in zip(gradients, net.parameters(), strict=True))
    assert flat.square().sum().item() == pytest.approx(sum(gradient.square().sum().item() for gradient in gradients))
    assert len(loop._joined([torch.ones(2), torch.ones(3)[:2]])) == 2


def test_nonfinite_values_are_replaced_and_counted_without_waiting():
    values = torch.tensor([1.0, math.nan, 0.0, math.inf, -math.inf, -2.0])
    assert loop._replace_nonfinite_(values).item() == 3
    assert values.tolist() == [1, 0, 0, 0, 0, -2]


def test_out_of_memory_on_resume_does_not_blame_the_checkpoint(tmp_path, monkeypatch):
    def load(*args, **settings):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        checkpoint.load_checkpoint(tmp_path / "training-state-0000000016.pt", None, None, None, DEVICE)


# trouble


def tiny_run(folder, data, *more, **changes):
    config = tiny.write_config(folder / "tiny.yaml", **{"checkpoint_every_nimg": 10000, **changes})
    command = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0, "--outdir", folder / "run", *more]
    return CliRunner().invoke(train.main, [str(word) for word in command])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("images"))


def latents(folder, change):
    folder.mkdir()
    for k in range(16):
        values = np.random.default_rng(k).random((8, 8, 8), np.float32)
        change(k, values)
        np.save(folder / f"{k:02d}.npy", values)
    return folder


def test_a_run_whose_gradients_are_never_finite_stops_with_a_diagnosis(tmp_path):
    def spoil(k, values):
        values[0, 0, 0] = math.nan

    data = latents(tmp_path / "data", spoil)
    done = tiny_run(tmp_path, data, "--cond", "false", duration_nimg=320)
    assert done.exit_code == 1
    assert "in 10 steps in a row, most gradients were not finite" in done.output
    assert re.search(r"16 images of the last step .* \d\d\.npy at sigma \d", done.output)
    assert f"dataset_tool.py check --source {data}" in done.output
    assert not list((tmp_path / "run").glob("network-snapshot-*"))
    assert not list_checkpoints(tmp_path / "run")


def test_a_run_too_short_for_that_fails_if_all_of_its_steps_were_lost(tmp_path):
    data = latents(tmp_path / "data", lambda k, values: values.fill(math.nan))
    done = tiny_run(tmp_path, data, "--cond", "false", duration_nimg=64)
    assert done.exit_code == 1
    assert "in 4 steps in a row, most gradients were not finite" in done.output
    assert not list((tmp_path / "run").glob("network-snapshot-*"))


def test_a_resumed_run_fails_if_all_of_its_last_steps_were_lost(tmp_path, monkeypatch):
    data = latents(tmp_path / "data", lambda k, values: None)
    assert tiny_run(tmp_path, data, "--cond", "false", duration_nimg=32).exit_code == 0
    accumulate = loop.Trainer._accumulate

    def spoiled(trainer, batch):
        accumulate(trainer, batch._replace(raw=batch.raw * math.nan))

    monkeypatch.setattr(loop.Trainer, "_accumulate", spoiled)
    done = tiny_run(tmp_path, data, "--cond", "false", duration_nimg=64)
    assert done.exit_code == 1
    assert "in 2 steps in a row, most gradients were not finite" in done.output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["training-state-0000000032.pt"]


@pytest.mark.parametrize("part", ["_accumulate", "_sanitize_gradients"])
def test_an_error_within_a_step_leaves_a_checkpoint_from_which_the_run_continues_bit_for_bit(
    images, tmp_path, monkeypatch, part
):
    (tmp_path / "whole").mkdir()
    assert tiny_run(tmp_path / "whole", images, duration_nimg=64).exit_code == 0
    work, calls = getattr(loop.Trainer, part), []

    def fail(trainer, *arguments):
        calls.append(part)
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        work(trainer, *arguments)

    monkeypatch.setattr(loop.Trainer, part, fail)
    done = tiny_run(tmp_path, images, duration_nimg=64)
    assert done.exit_code == 1
    assert "State saved at 32 images. Run the same command to resume." in done.output
    assert tiny_run(tmp_path, images, duration_nimg=64).exit_code == 0
    states = [torch.load(path / "run" / "training-state-0000000064.pt") for path in (tmp_path, tmp_path / "whole")]
    for part in ("net", "optimizer", "ema"):
        theirs = dict(named_tensors(states[1][part]))
        for name, tensor in named_tensors(states[0][part]):
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("part", ["step", "update"])
def test_a_state_that_is_half_way_through_a_step_is_not_saved(images, tmp_path, monkeypatch, part):
    owner = {"step": torch.optim.Adam, "update": loop.PowerFunctionEMA}[part]
    work, calls = getattr(owner, part), []

    def fail(*arguments, **settings):
        calls.append(part)
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return work(*arguments, **settings)

    monkeypatch.setattr(owner, part, fail)
    done = tiny_run(tmp_path, images, duration_nimg=64)
    assert done.exit_code == 1
    assert "State saved" not in done.output
    assert not list_checkpoints(tmp_path / "run")


def test_one_absurd_image_does_not_freeze_adam(tmp_path):
    def spoil(k, values):
        if k == 3:
            values[0, 0, 0] = 1e25

    done = tiny_run(tmp_path, latents(tmp_path / "data", spoil), "--cond", "false", duration_nimg=16, batch_size=4)
    assert done.exit_code == 0, done.output
    assert "non-finite gradients set to 0" in done.output
    assert damage(list_checkpoints(tmp_path / "run")[-1]) is None


@pytest.mark.parametrize(
    ("part", "message"),
    [("net", "the weights are not finite"), ("optimizer", "Adam's moments are"), ("ema", "the EMA weights are")],
)
def test_a_state_that_is_not_finite_is_neither_saved_nor_trained_on(images, tmp_path, monkeypatch, part, message):
    step = loop.Trainer.step

    def spoiled_step(trainer, *arguments):
        step(trainer, *arguments)
        if trainer.nimg == 32:
            parameter = next(trainer.net.parameters())
            average = next(trainer.ema.averages[0].parameters())
            tensor = {"net": parameter, "optimizer": trainer.optimizer.state[parameter]["exp_avg_sq"], "ema": average}
            tensor[part].data.view(-1)[0] = math.inf

    monkeypatch.setattr(loop.Trainer, "step", spoiled_step)
    done = tiny_run(tmp_path, images, checkpoint_every_nimg=16, max_lost_steps=0)
    assert done.exit_code == 1
    assert message in done.output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["training-state-0000000016.pt"]
    assert "The last good checkpoint is" in done.output


@pytest.mark.parametrize("setting", [{"ref_lr": math.inf}, {"P_mean": math.nan}, {"adam_betas": (0.9, math.nan)}])
def test_settings_that_are_not_finite_are_refused(setting):
    with pytest.raises(ValueError, match="must be finite"):
        TrainConfig(**setting)


def test_an_unreadable_image_ends_the_run_with_a_checkpoint(images, tmp_path, monkeypatch):
    read, calls = ImageDataset.read, []

    def damaged(self, indices):
        if (tmp_path / "run" / "config.yaml").exists():  # the run has started
            calls.append(indices)
        if len(calls) > 4:
            raise ValueError("img00000040.png: is cut short")
        return read(self, indices)

    monkeypatch.setattr(ImageDataset, "read", damaged)
    done = tiny_run(tmp_path, images, batch_size=4, duration_nimg=480)
    assert done.exit_code == 1
    assert "img00000040.png" in done.output
    assert len(list_checkpoints(tmp_path / "run")) == 1
    assert "state saved" in done.output


def test_a_disk_that_does_not_answer_ends_the_run_with_a_checkpoint(images, tmp_path, monkeypatch):
    read, calls, answer = ImageDataset.read, [], threading.Event()

    def stuck(self, indices):
        if threading.current_thread() is not threading.main_thread():  # the run has started
            calls.append(indices)
        if len(calls) > 4:
            answer.wait()
        return read(self, indices)

    monkeypatch.setattr(ImageDataset, "read", stuck)
    monkeypatch.setattr(batches, "LOOK_SEC", 0.02)
    # the limit only holds for the batch that never comes, however slow the machine is
    monkeypatch.setattr(dist, "timeout_sec", lambda *default: 0.05 if len(calls) >= 4 else 1800.0)
    done = tiny_run(tmp_path, images, batch_size=4, duration_nimg=480)
    answer.set()
    assert done.exit_code == 1
    assert f"{images}: no images have been read for 0 s; its disk may not answer" in done.output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["training-state-0000000016.pt"]


def test_a_failed_snapshot_ends_the_run_with_a_checkpoint(images, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_snapshot", fail)
    done = tiny_run(tmp_path, images, duration_nimg=32)
    assert done.exit_code == 1
    assert "No space left" in done.output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["training-state-0000000032.pt"]


def test_a_log_that_cannot_be_written_does_not_end_the_run(images, tmp_path):
    (tmp_path / "run" / "stats.jsonl").mkdir(parents=True)
    done = tiny_run(tmp_path, images, duration_nimg=32, status_every_nimg=16)
    assert done.exit_code == 0, done.output
    assert "could not be written" in done.output
