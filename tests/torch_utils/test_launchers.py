"""srun and mpirun start one job, as torchrun does, not one job per process."""

import contextlib
import os
import socket

import pytest
from click.testing import CliRunner

from edm2kit.cli import generate
from edm2kit.torch_utils import dist, heartbeat, launchers

PREFIXES = ("SLURM_", "OMPI_", "PMI_", "MPI_", "MASTER_")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
OF_MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
# task 5 of 7 on the second of two machines, as srun sets it
OF_SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "ENVIRONMENT": "BATCH",  # srun passes on what the script of sbatch has
}


@pytest.fixture(autouse=True)
def started_by(monkeypatch):
    """Set what a launcher sets, and nothing of others."""
    for name in os.environ:
        if name.startswith(PREFIXES) or name in (*VARIABLES, "ENVIRONMENT"):
            monkeypatch.delenv(name)

    def set_all(variables: dict[str, str], **changes: str | None) -> None:
        for name, value in {**variables, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_all


def found() -> tuple[str, ...]:
    variables = launchers.torchrun_variables()
    return tuple(variables.get(name, "") for name in VARIABLES)


def test_srun(started_by):
    started_by(OF_SRUN)
    port = str(20000 + (1234 * 31 + 2) % 10000)
    assert found() == ("5", "7", "1", "3", "gpu003", port)


def test_srun_on_one_machine_meets_at_the_loopback_address(started_by):
    started_by(OF_SRUN, SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="7", SLURM_NODEID="0")
    assert found()[:5] == ("5", "7", "1", "7", "127.0.0.1")


def test_only_the_basic_variables_of_slurm_are_enough(started_by):
    started_by({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"})
    assert found() == ("1", "2", "1", "2", "127.0.0.1", "20000")


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": "0"},  # the script of sbatch itself
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 inside a larger job
        {"SLURM_PROCID": None},  # a shell of salloc
    ],
)
def test_a_single_process_of_a_larger_job_stays_alone(started_by, changes):
    started_by(OF_SRUN, **changes)
    assert found() == ("",) * 6


@pytest.mark.parametrize("variables", [OF_MPIRUN, OF_MPICH])
def test_mpirun_on_one_machine(started_by, variables):
    # the daemons of mpirun are tasks of srun
    started_by({**OF_SRUN, **variables})
    assert found() == ("3", "4", "1", "4", "127.0.0.1", "29500")


@pytest.mark.parametrize("variables", [OF_MPIRUN, OF_MPICH])
def test_mpirun_on_several_machines_needs_their_meeting_place(started_by, variables):
    local = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"} if variables is OF_MPIRUN else {"MPI_LOCALNRANKS": "2"}
    started_by(variables, **local)
    with pytest.raises(ValueError, match=r"started 4 processes on several machines.* Set MASTER_ADDR .*WORLD_SIZE=1"):
        found()
    started_by({}, MASTER_ADDR="node7", MASTER_PORT="1717")
    with launchers.as_torchrun():
        seen = tuple(os.environ[name] for name in VARIABLES)
    assert seen == ("3", "4", "1", "2", "node7", "1717")
    assert "WORLD_SIZE" not in os.environ


def test_an_unknown_launcher_is_refused(started_by):
    started_by({"PMI_RANK": "0", "PMI_SIZE": "2"})
    with pytest.raises(ValueError, match="a launcher that is not known here started 2 processes"):
        found()
    done = CliRunner().invoke(generate.main, ["--net", "x", "--outdir", "y"])
    assert done.exit_code == 1
    assert len(done.output.strip().splitlines()) == 1


def test_numbers_that_are_none_name_their_variable(started_by):
    started_by(OF_SRUN, SLURM_PROCID="five")
    with pytest.raises(ValueError, match="environment variable SLURM_PROCID is 'five'"):
        found()


@pytest.mark.parametrize(
    ("text", "counts"), [("4(x2),3", [4, 4, 3]), ("1", [1]), ("", []), ("8(x3)", [8, 8, 8]), ("2,1(x2)", [2, 1, 1])]
)
def test_tasks_per_node(text, counts):
    assert launchers.tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[007-012,015]", "node007"),
        ("rack[2-3]-gpu[05,07].local,login", "rack2-gpu05.local"),
        ("a1,b[1-2]", "a1"),
    ],
)
def test_first_host(hosts, first):
    assert launchers.first_host(hosts) == first


def test_torchrun_comes_first(started_by, monkeypatch):
    started_by(OF_SRUN, WORLD_SIZE="1", RANK="0")
    with dist.session("cpu"):
        assert dist.world_size() == 1


def test_a_port_in_use_is_named(started_by, monkeypatch):
    # it waits for 20 s
    monkeypatch.setattr(heartbeat, "watching", lambda *arguments: contextlib.nullcontext(lambda *limit: []))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        started_by({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
        with (
            pytest.raises(ValueError, match=f"port {port} is in use on this machine; set MASTER_PORT"),
            dist.session("cpu"),
        ):
            pass
    assert not dist.had_group()
