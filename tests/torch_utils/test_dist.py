"""Ranks act together: what one knows all know, and where one fails none waits for ever."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edm2kit.torch_utils import dist
from tests.support import ROOT

_TWO_RANKS = """
import json, sys
import torch
from edm2kit.torch_utils import dist

def message(error):
    try:
        dist.raise_together(error)
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"

def shout(text):
    if text == "fail":
        raise OSError("rank 0 alone met this")
    return {"rank": dist.rank(), "text": text}

def failing():
    try:
        dist.on_rank0(shout, "fail")
    except (ValueError, OSError) as caught:
        return f"{type(caught).__name__}: {caught}"

with dist.session("cpu") as device:
    rank = dist.rank()
    dist.print0("only once")
    dist.warn0("only once too")
    dist.barrier()
    found = {
        "device": str(device), "rank": rank, "world": dist.world_size(),
        "sum": dist.all_reduce_sum_(torch.tensor([1.0, rank])).tolist(),
        "any": [dist.any_rank(False), dist.any_rank(rank == 1), dist.any_rank(True)],
        "broadcast": dist.broadcast_object({"from": rank}),
        "gather": dist.gather_objects(f"r{rank}"),
        "calm": message(None),
        "one failed": message(OSError("disk full on rank 1") if rank == 1 else None),
        "both failed": message(KeyError(rank)),
        "on_rank0": dist.on_rank0(shout, "hello"),
        "on_rank0 failed": failing(),
    }
    store = torch.distributed.distributed_c10d._get_default_store()
    before = store.num_keys()
    for _ in range(20):
        dist.barrier()
        dist.broadcast_(torch.zeros(3), source=0)
        dist.send_to_rank0(torch.zeros(3), 1, like=torch.zeros(3))
        dist.any_rank(False), dist.gather_objects(rank), dist.gather_on_rank0(rank), dist.on_rank0(shout, "hello")
    found["new keys"] = store.num_keys() - before
    store.set(f"planted by {rank}", "")
    found["new keys with a planted one"] = store.num_keys() - before
    json.dump(found, open(f"{sys.argv[1]}/{rank}.json", "w"))
assert not torch.distributed.is_initialized()
dist.exit_process(0)
"""


_FAILING = """
import sys, threading
import click, torch
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils import dist

@click.command(cls=cli.Command)
@click.argument("how")
def main(how):
    with dist.session("cpu"):
        if how == "alike":
            raise ValueError("no such file: data.zip")
        if how == "apart":
            raise ValueError(f"rank {dist.rank()} lacks memory")
        if how in ("lonely", "broken"):
            # as with nccl, whose farewell waits for the other ranks
            torch.distributed.destroy_process_group = threading.Event().wait
            if dist.rank() == 1:
                raise (ValueError("image 7 is damaged") if how == "lonely" else KeyError("a defect"))
            dist.barrier()
        dist.on_rank0(open, "/nowhere/at/all")

main()
"""


def launch(script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run `script` as two ranks under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes under torchrun found, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "run.py").write_text(_TWO_RANKS)
    done = launch(folder / "run.py", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], done


def test_each_rank_knows_its_place(ranks):
    assert [(found["rank"], found["world"], found["device"]) for found in ranks[0]] == [(0, 2, "cpu"), (1, 2, "cpu")]


def test_what_one_knows_all_know(ranks):
    for found in ranks[0]:
        assert found["sum"] == [2, 1]
        assert found["any"] == [False, True, True]
        assert found["broadcast"] == {"from": 0}
        assert found["gather"] == ["r0", "r1"]
        assert found["on_rank0"] == {"rank": 0, "text": "hello"}


def test_where_one_fails_all_raise(ranks):
    first, second = ranks[0]
    assert first["calm"] is second["calm"] is None
    assert first["one failed"] == "ValueError: disk full on rank 1"
    assert second["one failed"] == "OSError: disk full on rank 1"
    assert (first["both failed"], second["both failed"]) == ("KeyError: 0", "KeyError: 1")
    assert first["on_rank0 failed"] == "OSError: rank 0 alone met this"
    assert second["on_rank0 failed"] == "ValueError: rank 0 alone met this"


def test_ranks_that_meet_again_and_again_leave_nothing_in_their_store(ranks):
    # 140 meetings; the heartbeat of each rank has a key of its own, which may be new among them
    for found in ranks[0]:
        assert found["new keys"] <= 2
        assert found["new keys with a planted one"] > found["new keys"]


@pytest.mark.parametrize(
    ("how", "lines"),
    [
        ("alike", {"Error: no such file: data.zip"}),
        ("apart", {"Error: rank 0 lacks memory", "Error: rank 1 lacks memory"}),
        ("on rank 0", {"Error: [Errno 2] No such file or directory: '/nowhere/at/all'"}),
    ],
)
def test_an_error_that_ranks_share_is_told_once(tmp_path, how, lines):
    (tmp_path / "fail.py").write_text(_FAILING)
    done = launch(tmp_path / "fail.py", how)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert sorted(told) == sorted(lines)


@pytest.mark.parametrize(("how", "line"), [("lonely", "Error: image 7 is damaged"), ("broken", "KeyError: 'a defect'")])
def test_an_error_on_one_rank_is_printed_although_the_others_wait_for_it(tmp_path, how, line):
    (tmp_path / "fail.py").write_text(_FAILING)
    done = launch(tmp_path / "fail.py", how)  # would not end if the rank waited
    assert done.returncode != 0
    assert line in done.stderr.splitlines()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_out_of_memory(error, expected):
    assert dist.is_out_of_memory(error) is expected


@pytest.mark.parametrize("name", ["SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"])
def test_with_srun_each_process_may_see_its_own_gpu_only(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv(name, "1" if name == "SLURM_GPUS_PER_TASK" else "cpu=4,gres/gpu=1")
    assert dist.pick_device("cuda") == torch.device("cuda:0")
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=r"this machine has 1 GPU\(s\)"):
        dist.pick_device("cuda")


def test_rank_0_speaks_alone(ranks):
    assert ranks[1].stdout.splitlines().count("only once") == 1
    assert ranks[1].stderr.splitlines().count("Warning: only once too") == 1


def test_one_process_needs_no_group(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with dist.session("cpu") as device:
        assert device == torch.device("cpu")
        assert (dist.rank(), dist.world_size(), torch.distributed.is_initialized()) == (0, 1, False)
        dist.barrier()
        assert dist.all_reduce_sum_(torch.ones(2)).tolist() == [1, 1]
        assert (dist.any_rank(True), dist.any_rank(False)) == (True, False)
        assert (dist.broadcast_object("x"), dist.gather_objects("x")) == ("x", ["x"])
        dist.raise_together(None)
        with pytest.raises(OSError, match="mine"):
            dist.raise_together(OSError("mine"))
        dist.print0("hello", 1)
    assert capsys.readouterr().out == "hello 1\n"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert dist.pick_device("auto") == dist.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: not available here; use one of auto, cpu"):
        dist.pick_device("cuda")
    with pytest.raises(ValueError, match="--device tpu: not available"):
        dist.pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.pick_device("auto") == torch.device("cuda:1")
    assert dist.pick_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"--device cuda:2: this machine has 2 GPU\(s\); start one process per GPU"):
        dist.pick_device("auto")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_that_is_not_a_number_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "two")
    with pytest.raises(ValueError, match=f"the environment variable {name} is 'two'; expected a number"):
        dist.env_int(name, 1)
    monkeypatch.setenv(name, "")
    assert dist.env_int(name, 1) == 1


FAULTS = """
import resource, sys, torch
from edm2kit.torch_utils import dist

def large():  # eight tensors of 20 MB, all freed at the end
    return len([torch.zeros(5 << 20) for _ in range(8)])

with dist.session("cpu"):
    for _ in range(3):
        large()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        large()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
@pytest.mark.parametrize(("variables", "keeps"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_that_tensors_free_is_kept_on_a_cpu_unless_the_user_has_settings(variables, keeps):
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**surroundings, **variables}, capture_output=True, text=True, check=True
    )
    # The five calls fill 204,800 pages of 4 KiB. Without the setting, the system provides all of them again. With it,
    # it usually provides none, and occasionally those of one tensor (5,120), if a small block divides the freed memory.
    assert (int(found.stdout) < 204_800 / 10) == keeps
