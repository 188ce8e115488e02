"""Processes that Slurm's srun or an mpirun started without torchrun: which of them belong together, and where."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from edm2kit.torch_utils import dist

_MOST_NODES = 1 << 20
_ALONE = "to run each process on its own, set WORLD_SIZE=1"


@contextlib.contextmanager
def as_torchrun() -> Iterator[None]:
    """Inside, this process has the environment variables that torchrun would give it. Raises as `torchrun_variables`.

    Variables that are set already keep their values.
    """
    added = torchrun_variables()
    if added.get("RANK") == "0":
        dist.print0(f"One job of {added['WORLD_SIZE']} processes, as started by srun or mpirun ({_ALONE})")
    added = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def torchrun_variables() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, from what srun or mpirun have set.

    {} if neither started this process, or if there is only one. Raises ValueError, with what to set, if they do not
    say enough.
    """
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:  # first: its daemons are tasks of srun themselves
        return _of_mpi("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                       "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun -x MASTER_ADDR=HOST")  # fmt: skip
    if "PMI_SIZE" in env and "MPI_LOCALRANKID" in env:  # MPICH and Intel MPI
        return _of_mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
                       "mpiexec -genv MASTER_ADDR HOST")  # fmt: skip
    if "SLURM_PROCID" in env:
        return _of_slurm()
    if "PMI_SIZE" in env and env["PMI_SIZE"] != "1":
        raise ValueError(
            f"a launcher that is not known here started {env['PMI_SIZE']} processes. Use torchrun or srun, or set "
            f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; {_ALONE}"
        )
    return {}


def _of_mpi(rank: str, size: str, local_rank: str, local_size: str, option: str) -> dict[str, str]:
    count, local_count = dist.env_int(size, 1), dist.env_int(local_size, 1)
    if count == 1:
        return {}
    if count > local_count and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"mpirun started {count} processes on several machines, which do not know where to meet. Set MASTER_ADDR "
            f"to the machine of process 0 ({option}), and MASTER_PORT if 29500 is not free there; {_ALONE}"
        )
    return {
        "RANK": str(dist.env_int(rank, 0)),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(dist.env_int(local_rank, 0)),
        "LOCAL_WORLD_SIZE": str(local_count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def _of_slurm() -> dict[str, str]:
    env = os.environ
    in_step = "SLURM_STEP_ID" in env or "SLURM_STEP_NUM_TASKS" in env
    if not in_step and env.get("ENVIRONMENT") == "BATCH":
        return {}  # the script of sbatch itself, which has the variables of the job, but runs once
    count = dist.env_int("SLURM_STEP_NUM_TASKS", dist.env_int("SLURM_NTASKS", 1))
    if count == 1:
        return {}
    rank, node = dist.env_int("SLURM_PROCID", 0), dist.env_int("SLURM_NODEID", 0)
    nodes = dist.env_int("SLURM_STEP_NUM_NODES", dist.env_int("SLURM_NNODES", 1))
    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))
    if min(count, nodes, *per_node) < 1:
        raise ValueError(
            f"Slurm's variables say that no task runs on a machine (SLURM_NTASKS {count}, SLURM_NNODES {nodes}, "
            f"SLURM_TASKS_PER_NODE {per_node[:4]}); correct them, or {_ALONE}"
        )
    local_count = per_node[node] if node < len(per_node) else -(-count // nodes)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    if nodes > 1 and not hosts and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"srun started {count} tasks on {nodes} machines without SLURM_JOB_NODELIST, so they do not know where to "
            f"meet. Set MASTER_ADDR to the machine of task 0; {_ALONE}"
        )
    # below the ports that systems give to outgoing connections, and different for jobs that share a machine
    port = 20000 + (dist.env_int("SLURM_JOB_ID", 0) * 31 + dist.env_int("SLURM_STEP_ID", 0)) % 10000
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(dist.env_int("SLURM_LOCALID", rank % local_count)),
        "LOCAL_WORLD_SIZE": str(local_count),
        "MASTER_ADDR": first_host(hosts) if nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm_hides_other_gpus() -> bool:
    """Whether Slurm shows each process a GPU of its own (srun --gpus-per-task=1), which is number 0 to all of them."""
    per_task = os.environ.get("SLURM_GPUS_PER_TASK") or "gres/gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    return bool(per_task) and torch.cuda.device_count() == 1


def tasks_per_node(text: str) -> list[int]:
    """The number of tasks on each machine in Slurm's short form, such as "4(x2),3" for 4, 4, 3."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * min(int(repeats or 1), _MOST_NODES - len(counts))
    return counts


def first_host(hosts: str) -> str:
    """The first name in Slurm's short form of machine names, such as "rack2-node[03-05,9],gpu1" for rack2-node03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")
