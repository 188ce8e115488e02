"""The commands on a GPU, from pictures to a score, as people run them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import ROOT, tiny


def run(script, *arguments, code=0, env=None, ranks=1):
    done = subprocess.run(
        tiny.command(script, *arguments, ranks=ranks),
        capture_output=True, text=True, env={**tiny.environment(), **(env or {})}, timeout=240,
    )  # fmt: skip
    assert done.returncode == code, f"{script} {arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def train(tmp_path, name="run", code=0, env=None, ranks=1, changes=None, options=()):
    data = tmp_path / "data"
    if not data.exists():
        tiny.make_dataset(data)
    config = tiny.write_config(tmp_path / f"{name}.yaml", **(changes or {}))
    return run(
        "train.py", "--outdir", tmp_path / name, "--config", config, "--data", data, "--samples", 4, "--device", "cuda",
        *options, code=code, env=env, ranks=ranks,
    )  # fmt: skip


def weights(folder):
    from safetensors.torch import load_file

    newest = sorted(folder.glob("network-snapshot-*-0.100.safetensors"))[-1]
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(newest).items())])


def losses(folder):
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("compiling", ["off", "on"])
def test_training_and_generating(precision, compiling, tmp_path):
    train(tmp_path, options=["--precision", precision, "--compile", compiling])
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert list((tmp_path / "run").glob("samples-*.png"))
    run("generate.py", "--net", tmp_path / "run", "--seeds", "0-5", "--outdir", tmp_path / "out", "--device", "cuda")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6


def test_training_on_a_gpu_begins_like_training_on_a_cpu(tmp_path):
    train(tmp_path, "gpu", options=["--precision", "fp32"])
    run(
        "train.py", "--outdir", tmp_path / "cpu", "--config", tmp_path / "gpu.yaml", "--data", tmp_path / "data",
        "--samples", 0, "--device", "cpu", "--precision", "fp32",
    )  # fmt: skip
    gpu, cpu = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert len(gpu) == len(cpu)
    assert gpu[0] == pytest.approx(cpu[0], rel=0.2)  # noise comes from another generator


def test_deterministic_runs_and_a_resumed_one_have_the_same_bits(tmp_path):
    for name in ("one", "two"):
        train(tmp_path, name, options=["--deterministic"])
    assert torch.equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    train(tmp_path, "three", changes={"duration_nimg": 80}, options=["--deterministic"])
    train(tmp_path, "three", options=["--deterministic", "--duration", "160"])
    assert torch.equal(weights(tmp_path / "one"), weights(tmp_path / "three"))


def test_a_batch_that_does_not_fit_is_halved_or_refused_in_one_line(tmp_path):
    """The process may use a hundredth of the GPU's memory; the network is larger than that."""
    program = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(0.01); "
        "from edm2kit.cli.train import main; main(sys.argv[1:])"
    )
    data = tiny.make_dataset(tmp_path / "data", size=64)
    network = {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": []}
    config = tiny.write_config(tmp_path / "c.yaml", network=network, batch_size=256, duration_nimg=512)
    line = [sys.executable, "-c", program, "--config", config, "--data", data, "--samples", 0, "--device", "cuda"]
    results = {}
    for size in ("256", "auto"):
        done = subprocess.run(
            [str(word) for word in [*line, "--outdir", tmp_path / size, "--batch-gpu", size]],
            capture_output=True, text=True, env=tiny.environment(), timeout=240, cwd=ROOT,
        )  # fmt: skip
        results[size] = done
        print(size, done.returncode, done.stdout[-1500:], done.stderr[-1500:])
    assert results["256"].returncode == 1
    assert "Traceback" not in results["256"].stderr
    assert "--batch-gpu" in results["256"].stderr
    assert results["auto"].returncode == 0


def test_a_group_of_one_rank_trains_over_nccl(tmp_path):
    """torch's DistributedDataParallel with NCCL; a second rank would need a second GPU."""
    program = (
        "import os, sys, torch; from edm2kit.torch_utils import dist; "
        "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv.pop(1), RANK='0', WORLD_SIZE='1'); "
        "torch.cuda.set_device(0); torch.distributed.init_process_group('cpu:gloo,cuda:nccl'); "
        "import edm2kit.training.loop as loop; from unittest import mock; make = loop._distribute\n"
        "def distribute(net, device):\n"
        "    with mock.patch.object(dist, 'world_size', lambda: 2): return make(net, device)\n"
        "loop._distribute = distribute\n"
        "from edm2kit.cli.train import main; main(sys.argv[1:])"
    )
    data, config = tiny.make_dataset(tmp_path / "data"), tiny.write_config(tmp_path / "c.yaml")
    words = ["-c", program, _free_port(), "--config", config, "--data", data, "--samples", 4, "--device", "cuda"]
    for compiling in ("off", "on"):
        done = subprocess.run(
            [sys.executable, *map(str, words), "--outdir", str(tmp_path / compiling), "--compile", compiling],
            capture_output=True, text=True, env=tiny.environment(), timeout=240, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert np.isfinite(losses(tmp_path / compiling)).all()


def test_two_ranks_on_one_gpu(tmp_path):
    """Over gloo, which takes tensors on a GPU too; NCCL refuses two ranks on one GPU."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport torch\n"
        "init = torch.distributed.init_process_group\n"
        "def gloo(backend, **arguments): return init('cpu:gloo,cuda:gloo', **arguments)\n"
        "torch.distributed.init_process_group = gloo\n"
        "from edm2kit.cli.train import main\nmain(sys.argv[1:])\n"
    )
    data, config = tiny.make_dataset(tmp_path / "data"), tiny.write_config(tmp_path / "c.yaml")
    found_here = {**tiny.environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name, more in (("plain", []), ("sharded", ["--shard", "true"])):
        words = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, "--config", config,
            "--data", data, "--samples", 4, "--device", "cuda:0", "--outdir", tmp_path / name, *more,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, env=found_here, timeout=240
        )
        assert done.returncode == 0, name + done.stdout[-2000:] + done.stderr[-3000:]
        assert np.isfinite(losses(tmp_path / name)).all()


def test_more_ranks_than_gpus_are_refused_in_one_line(tmp_path):
    done = train(tmp_path, code=1, ranks=torch.cuda.device_count() + 1)
    assert f"this machine has {torch.cuda.device_count()} GPU(s)" in done.stderr


PRESET = ["--preset", "cifar10-autoguidance", "--seeds", "0-15", "--device", "cuda"]


def images(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]).astype(int)


def test_the_first_command_makes_pictures_and_faster_ways_make_the_same(tmp_path):
    made = {}
    ways = {
        "fp32": ["--precision", "fp32"],
        "graphs": ["--precision", "fp32", "--compile", "graphs"],
        "compiled": ["--precision", "fp32", "--compile", "on"],
        "fp16": ["--precision", "fp16"],
        "bf16": ["--precision", "bf16"],
        "auto": [],
        "batches of 3": ["--precision", "fp32", "--batch", 3],
    }
    for way, options in ways.items():
        run("generate.py", *PRESET, "--outdir", tmp_path / way, *options)
        made[way] = images(tmp_path / way)
    differences = {way: np.abs(pictures - made["fp32"]).mean() for way, pictures in made.items()}
    print(differences)
    assert differences["graphs"] < 0.05
    assert differences["compiled"] < 0.05
    assert differences["batches of 3"] < 0.05
    assert differences["fp16"] < 1
    assert differences["bf16"] < 4


def test_scores_on_a_gpu_are_those_of_a_cpu(tmp_path):
    run("generate.py", *PRESET[:2], "--seeds", "0-63", "--device", "cuda", "--outdir", tmp_path / "images")
    run("generate.py", *PRESET[:2], "--seeds", "64-127", "--device", "cuda", "--outdir", tmp_path / "others")
    found = {}
    for place in ("cpu", "cuda"):
        reference, record = tmp_path / f"{place}.npz", tmp_path / f"{place}.json"
        others, lite = tmp_path / "others", ["--device", place, "--metrics"]
        run("calculate_metrics.py", "ref", "--data", others, "--dest", reference, *lite, "fd_lite0")
        run(
            "calculate_metrics.py", "calc", "--images", tmp_path / "images", "--ref", reference, "--real", others,
            "--num", 64, "--record", record, *lite, "fd_lite0,fd_lite0.kid,fd_lite0.precision,fd_lite0.recall",
        )  # fmt: skip
        results = json.loads(record.read_text())["results"]
        found[place] = {name: result["mean"] for name, result in results.items()}
    print(found)
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, value in found["cpu"].items():
        one_image = 1.5 / 64 if name.endswith(("precision", "recall")) else 1e-4  # may cross a border by rounding
        assert found["cuda"][name] == pytest.approx(value, rel=1e-3, abs=one_image), name


def _free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
