"""Two machines, rehearsed on one: network namespaces with a cable between them, and a host name each.

Needs root on Linux. Each test prints a line for the record in docs/clusters.md.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edm2kit.training.checkpoint import list_checkpoints
from tests.support import ROOT, tiny

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")

# after the step that ends at 96 images: end without a word, or lose the network
TROUBLE = """
import os, signal, subprocess, sys
from edm2kit.cli import train
from edm2kit.training.loop import Trainer
step = Trainer.step
def step_then_trouble(self, *arguments):
    step(self, *arguments)
    if self.nimg == 96:
        {trouble}
Trainer.step = step_then_trouble
train.main(sys.argv[1:])
"""
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
UNPLUGGED = 'subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)'


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """The names of two namespaces whose eth0 are the ends of one cable."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = (f"edm2-a{os.getpid()}", f"edm2-b{os.getpid()}")
    ends = (f"ea{os.getpid()}", f"eb{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_machine(machines: tuple[str, str], node: int, line: list[str], **variables: str) -> subprocess.Popen:
    """Start a command on one of the machines, as srun would."""
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "node[0-1]",
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(node),
        "MASTER_ADDR": ADDRESSES[0],  # node0 is not in a name service here
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": str(ROOT),
    }
    named = ["unshare", "--uts", "sh", "-c", f'hostname node{node}; exec "$@"', "sh", *line]
    return subprocess.Popen(
        ["ip", "netns", "exec", machines[node], *named],
        env={**tiny.environment(), **slurm, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: list[subprocess.Popen], limit_sec: float = 400) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each."""
    found = []
    for process in processes:
        said, errors = process.communicate(timeout=limit_sec)
        found.append((process.returncode, said, errors))
    return found


def options(folder: Path, run: str) -> list[str]:
    if not (folder / "data").exists():
        tiny.make_dataset(folder / "data")
        tiny.write_config(folder / "tiny.yaml")
    words = ["--config", folder / "tiny.yaml", "--data", folder / "data", "--outdir", folder / run]
    return [*map(str, words), "--device", "cpu", "--samples", "0"]


def train(folder: Path, run: str, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *options(folder, run), *more]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(list_checkpoints(run_dir)[-1], weights_only=True)["net"]


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = final_state(one), final_state(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of two processes on one machine."""
    folder = tmp_path_factory.mktemp("one_machine")
    done = tiny.run("train.py", *options(folder, "run"), ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_machines_train_what_one_does(machines, two_ranks):
    started = time.monotonic()
    found = ended([on_machine(machines, node, train(two_ranks, "two")) for node in (0, 1)])
    assert [code for code, *_ in found] == [0, 0], found
    assert "One job of 2 processes" in found[0][1]
    assert_same_bits(two_ranks / "run", two_ranks / "two")
    print(f"two machines: the same bits as one, {time.monotonic() - started:.0f} s")


def test_torchrun_on_each_machine_trains_the_same(machines, two_ranks):
    tasks = []
    for node in (0, 1):
        torchrun = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        torchrun += ["--master-addr", ADDRESSES[0], "--master-port", "29500"]
        words = [str(ROOT / "train.py"), *options(two_ranks, "torchrun")]
        line = [sys.executable, "-m", "torch.distributed.run", *torchrun, *words]
        tasks.append(on_machine(machines, node, line))
    found = ended(tasks)
    assert [code for code, *_ in found] == [0, 0], found
    assert_same_bits(two_ranks / "run", two_ranks / "torchrun")


def test_without_an_interface_they_refuse_and_name_it(machines, two_ranks):
    ((code, _, errors),) = ended([on_machine(machines, 0, train(two_ranks, "none"), GLOO_SOCKET_IFNAME="")])
    assert code == 1
    assert re.search("name of this one, node0, .* Set GLOO_SOCKET_IFNAME, .*here: eth0", errors), errors


@pytest.mark.parametrize("trouble", [DIES, UNPLUGGED], ids=["a machine that dies", "a cable that is pulled"])
def test_a_lost_machine_is_named_and_the_run_resumes_to_the_same_bits(machines, two_ranks, tmp_path, trouble):
    run = f"lost{len(trouble)}"
    code = [sys.executable, "-c", TROUBLE.format(trouble=trouble), *options(two_ranks, run), "--timeout", "30s"]
    started = time.monotonic()
    tasks = [on_machine(machines, 0, train(two_ranks, run, "--timeout", "30s")), on_machine(machines, 1, code)]
    (first, _, errors), (second, _, errors_there) = ended(tasks)
    took = time.monotonic() - started
    assert (first, second) == (1, -signal.SIGKILL if trouble is DIES else 1)
    lines = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, errors
    if trouble is UNPLUGGED:
        assert "rank 1" in lines[0]
        assert f"{ADDRESSES[0]}, port 20000, where the ranks find each other, does not answer" in errors_there
    ip("-n", machines[1], "link", "set", "eth0", "up")
    found = ended([on_machine(machines, node, train(two_ranks, run)) for node in (0, 1)])
    assert [code for code, *_ in found] == [0, 0], found
    assert "Resuming at 96 images" in found[0][1]  # which the other machine saved
    assert_same_bits(two_ranks / "run", two_ranks / run)
    print(f"{lines[0]} (after {took:.0f} s); resumed at 96 images, the same bits at the end")
