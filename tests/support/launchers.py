"""Stand-ins for Slurm, MPI, torchrun, containers and wandb: one program under many names, for the pages' commands.

Each call appends its name, arguments and environment to the file $STAND_IN_LOG. What starts processes starts at most
$STAND_IN_TASKS of them (1 unless set), with the variables that the original sets. `python` and `edm2kit-train` end with
the next exit code in the file $STAND_IN_CODES, if any; with STAND_IN_REAL=1, `python` is the real one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NAMES = (
    "sbatch", "srun", "scontrol", "torchrun", "mpirun", "mpiexec", "docker", "apptainer", "wandb", "python",
    "edm2kit-train",
)  # fmt: skip
WITH_VALUE = {"-np", "-n", "-x", "-genv", "--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node",
              "--cpus-per-task", "--volume", "--workdir", "--user", "--gpus", "--tag"}  # fmt: skip
KEPT = ("SLURM_", "SRUN_", "WANDB_", "GLOO_", "NCCL_", "LOCAL_DATA", "WORLD_SIZE", "MASTER_")


def install(folder: Path) -> None:
    """Make `folder` with the programs, to be put at the start of PATH."""
    folder.mkdir()
    for name in NAMES:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        program.chmod(0o755)


def parsed(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options that come first, by name without dashes, and the rest."""
    options, rest = {}, list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        if not equals and name in WITH_VALUE:
            value = rest.pop(0)
            if name == "-genv":
                value += f"={rest.pop(0)}"
        options[name.lstrip("-")] = value
    return options, rest


def start(command: list[str], count: int, variables: dict[str, str]) -> int:
    """Run `command` in several tasks at once, with "{task}" in `variables` replaced; the largest exit code."""
    count = min(count, int(os.environ.get("STAND_IN_TASKS", "1")))
    tasks = []
    for task in range(count):
        own = {name: value.format(task=task, count=count) for name, value in variables.items()}
        tasks.append(subprocess.Popen(command, env={**os.environ, **own}))
    return max(task.wait() for task in tasks)


def sbatch(words: list[str]) -> int:
    given, (script, *arguments) = parsed(words)
    lines = re.findall(r"^#SBATCH (--\S+)$", Path(script).read_text(), re.MULTILINE)
    options, nothing = parsed([*lines, *(f"--{name}={value}" for name, value in given.items())])
    assert not nothing, nothing
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    job = {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "ENVIRONMENT": "BATCH",
    }
    asked = Path(os.environ["STAND_IN_LOG"]).with_suffix(".requeue")
    while True:
        asked.unlink(missing_ok=True)
        code = subprocess.run(["bash", script, *arguments], env={**os.environ, **job}).returncode
        if not asked.exists() or "requeue" not in options:
            return code


def scontrol(words: list[str]) -> int:
    assert words == ["requeue", os.environ["SLURM_JOB_ID"]], words
    Path(os.environ["STAND_IN_LOG"]).with_suffix(".requeue").touch()
    return 0


def srun(words: list[str]) -> int:
    options, command = parsed(words)
    per_node = int(options.get("ntasks-per-node", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    nodes = int(options.get("nodes", os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "{count}",
        "SLURM_STEP_NUM_NODES": "1",  # all stand-ins of tasks are here
        "SLURM_STEP_TASKS_PER_NODE": "{count}",
        "SLURM_PROCID": "{task}",
        "SLURM_LOCALID": "{task}",
        "SLURM_NODEID": "0",
    }
    return start(command, int(options.get("ntasks", nodes * per_node)), step)


def torchrun(words: list[str]) -> int:
    at = next(k for k, word in enumerate(words) if word.endswith(".py"))
    return start(["python", *words[at:]], 1, {})


def mpirun(words: list[str]) -> int:
    options, command = parsed(words)
    assert options.keys() & {"np", "n"}
    return start(command, 1, {})


def docker(words: list[str]) -> int:
    what, *words = words
    options, rest = parsed(words)
    if what == "build":
        assert options == {"tag": "edm2kit"}
        assert rest == ["."]
        return 0
    assert (what, rest.pop(0)) == ("run", "edm2kit")
    return start(rest, 1, {})


def apptainer(words: list[str]) -> int:
    what, *words = words
    options, rest = parsed(words)
    if what == "build":
        assert rest == ["edm2kit.sif", "docker-daemon:edm2kit:latest"]
        return 0
    assert (what, options, rest.pop(0)) == ("exec", {"nv": ""}, "edm2kit.sif")
    return start(rest, 1, {})


def training(words: list[str]) -> int:
    codes = Path(os.environ.get("STAND_IN_CODES", ""))
    left = codes.read_text().split() if codes.is_file() else []
    if left:
        codes.write_text(" ".join(left[1:]))
    return int(left[0]) if left else 0


PROGRAMS = {
    "sbatch": sbatch,
    "srun": srun,
    "scontrol": scontrol,
    "torchrun": torchrun,
    "mpirun": mpirun,
    "mpiexec": mpirun,
    "docker": docker,
    "apptainer": apptainer,
    "wandb": lambda words: 0,
    "python": training,
    "edm2kit-train": training,
}

if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(json.dumps({"program": program, "words": arguments, "env": kept}) + "\n")
    if program == "python" and os.environ.get("STAND_IN_REAL") == "1":
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.exit(PROGRAMS[program](arguments))
