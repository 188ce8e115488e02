"""--batch-gpu auto: what fits, a rehearsal, one retry; and --compile in training."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.models import compilation
from edm2kit.torch_utils import dist
from edm2kit.training import micro_batches
from edm2kit.training import run as run_module
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.config import AUTO, TrainConfig, parse_batch_gpu
from edm2kit.training.loop import Trainer
from edm2kit.training.micro_batches import free_memory, largest_divisor
from edm2kit.training.run import prepare_run
from tests.support import tiny

CPU = torch.device("cpu")
SMALLEST = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("images"))


def config(images, **changes) -> TrainConfig:
    return TrainConfig(**{**tiny.TINY, "data": str(images), **changes})


def train_tiny(folder, images, *more, **changes):
    path = tiny.write_config(folder / "tiny.yaml", **changes)
    words = ["--config", path, "--data", images, "--device", "cpu", "--samples", 0, "--outdir", folder / "run", *more]
    done = CliRunner().invoke(train.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(list_checkpoints(folder / "run")[-1], weights_only=True)["net"]


# ---- which size


@pytest.mark.parametrize(("text", "expected"), [("auto", AUTO), ("32", 32), ("1Ki", 1024)])
def test_batch_gpu_is_a_number_or_auto(text, expected):
    assert parse_batch_gpu(text) == expected


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="or auto"):
        parse_batch_gpu("most")
    with pytest.raises(ValueError, match="a number of images or auto"):
        TrainConfig(batch_gpu="most")


@pytest.mark.parametrize(
    ("number", "limit", "expected"), [(256, 100, 64), (96, 95, 48), (16, 99, 16), (7, 6, 1), (8, 0, 1)]
)
def test_micro_batches_of_equal_size_fill_the_share(number, limit, expected):
    assert largest_divisor(number, limit) == expected


def test_free_memory_of_the_host_is_shared_by_its_processes(monkeypatch):
    alone = free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(alone / 4, rel=0.2)


def test_what_fits_is_chosen_from_the_forecast_and_the_free_memory(images, tmp_path, monkeypatch):
    run = prepare_run(config(images), tmp_path / "run")
    forecast = run_module.make_forecast(run.config, dict(run.header.architecture), 16, 1).memory
    chosen = {}
    for fraction in (2.0, 0.6, 0.3, 0.0):
        free = int((forecast.state + fraction * forecast.activations) / micro_batches.USABLE) + 16
        monkeypatch.setattr(micro_batches, "free_memory", lambda device, free=free: free)
        chosen[fraction] = prepare_run(config(images, batch_gpu=AUTO), tmp_path / "run").micro_batches
    assert chosen == {2.0: [16], 0.6: [8, 8], 0.3: [4] * 4, 0.0: [1] * 16}


def test_a_resumed_run_keeps_its_micro_batches_whatever_is_free_now(images, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "fitting_size", lambda *arguments: 8)
    train_tiny(tmp_path, images, "--batch-gpu", "auto", duration_nimg=32)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["micro_batches"] == [8, 8]
    monkeypatch.setattr(run_module, "fitting_size", lambda *arguments: 16)
    done = train_tiny(tmp_path, images, "--batch-gpu", "auto", duration_nimg=64)
    assert "8+8 images each" in done.output


# ---- rehearsal


@pytest.fixture
def on_a_gpu(images, tmp_path, monkeypatch):
    """A run with --batch-gpu auto whose trainer rehearses with as many images as `fitting` holds at most."""
    fitting, tried = [16], []

    def rehearse(trainer, size, reserved_bytes=0):
        tried.append(size)
        assert reserved_bytes > 0
        if size > fitting[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Trainer, "rehearse", rehearse)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run = prepare_run(config(images, batch_gpu=AUTO), tmp_path / "run")
    trainer = Trainer(run.config, run.header, run.encoder, CPU)
    return run, trainer, fitting, tried


def test_what_fits_is_kept(on_a_gpu):
    run, trainer, _, tried = on_a_gpu
    assert run._rehearsed(trainer) == [16]
    assert tried == [16]


def test_out_of_memory_halves_the_micro_batch_and_says_so(on_a_gpu, capsys):
    run, trainer, fitting, tried = on_a_gpu
    fitting[0] = 8
    assert run._rehearsed(trainer) == [8, 8]
    assert tried == [16, 8]
    assert "16 images per forward pass do not fit (CUDA out of memory. Tried to allocate 2 GiB); trying 8" in (
        capsys.readouterr().err
    )


def test_there_is_one_retry(on_a_gpu):
    run, trainer, fitting, tried = on_a_gpu
    fitting[0] = 4
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run._rehearsed(trainer)
    assert tried == [16, 8]


def test_a_rehearsal_leaves_no_trace(images, tmp_path):
    def trained(rehearse):
        run = prepare_run(config(images, duration_nimg=48), tmp_path / str(rehearse))
        trainer = Trainer(run.config, run.header, run.encoder, CPU)
        order = run_module.GlobalOrder(len(run.dataset), 0)
        batches = run_module.training_batches(run.dataset, order, 0, 16, rank=0, world_size=1, workers=0)
        for _ in range(3):
            if rehearse:
                trainer.rehearse(5, 100)
                assert all(parameter.grad is None for parameter in trainer.net.parameters())
            trainer.step(batches, 1)
        batches.close()
        return trainer.net.state_dict(), trainer.stats.collect()

    (plain, stats), (rehearsed, same_stats) = trained(False), trained(True)
    assert all(torch.equal(rehearsed[name], value) for name, value in plain.items())
    assert stats == same_stats


# ---- --compile


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile's graphs, run by eager code."""
    logging.disable()
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    logging.disable(logging.NOTSET)


def test_a_compiled_run_is_resumed_bit_for_bit_and_equals_an_eager_one_up_to_rounding(images, tmp_path, quick_compiler):
    for folder in ("whole", "parts", "eager"):
        (tmp_path / folder).mkdir()
    settings = {"duration_nimg": 64, "checkpoint_every_nimg": 32, "network": SMALLEST}
    train_tiny(tmp_path / "whole", images, "--compile", **settings)
    train_tiny(tmp_path / "parts", images, "--compile", **{**settings, "duration_nimg": 32})
    train_tiny(tmp_path / "parts", images, "--compile", "on", **settings)
    train_tiny(tmp_path / "eager", images, "--compile", "off", **settings)
    whole, parts, eager = (weights(tmp_path / folder) for folder in ("whole", "parts", "eager"))
    for name, value in whole.items():
        assert torch.equal(parts[name], value)
        torch.testing.assert_close(eager[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("repeats_bits", [True, False])
def test_auto_decides_only_where_results_may_differ_by_rounding(images, tmp_path, monkeypatch, repeats_bits):
    asked = []
    monkeypatch.setattr(Trainer, "compile_if_it_pays_", lambda trainer, size, rounds: asked.append((size, rounds)))
    monkeypatch.setattr(dist, "repeats_bits", lambda device: repeats_bits)
    train_tiny(tmp_path, images, "--batch-gpu", 4, duration_nimg=16, network=SMALLEST)
    assert asked == ([] if repeats_bits else [(4, 4)])


def test_bits_are_promised_on_a_cpu_and_if_asked_for(monkeypatch):
    assert dist.repeats_bits(CPU)
    assert not dist.repeats_bits(torch.device("cuda"))
    with dist.deterministic():
        assert dist.repeats_bits(torch.device("cuda"))


_COMPILED = """
import logging
from edm2kit.models import compilation

logging.disable()


def backend(graph, inputs):
    print("compiled a graph", flush=True)
    return graph.forward


compilation.BACKEND = backend
from edm2kit.cli.train import main
main()
"""


@pytest.mark.slow
def test_two_ranks_train_compiled_as_they_do_eagerly(images, tmp_path):
    script = tmp_path / "compiled.py"
    script.write_text(_COMPILED)
    path = tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=64, network=SMALLEST)
    # micro-batches of 4: gradients are exchanged in the second of two backward passes
    words = ["--config", path, "--data", images, "--device", "cpu", "--samples", 0, "--batch-gpu", 4]
    for mode in ("on", "off"):
        done = tiny.run(str(script), *words, "--outdir", tmp_path / mode / "run", "--compile", mode, ranks=2)
        assert done.returncode == 0, done.stderr
        graphs = done.stdout.count("compiled a graph")
        assert graphs == (0 if mode == "off" else 2), "one graph on each rank"
    compiled, eager = weights(tmp_path / "on"), weights(tmp_path / "off")
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)
