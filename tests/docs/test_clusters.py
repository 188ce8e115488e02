"""docs/clusters.md: every command runs at tiny size, with stand-ins for Slurm, MPI, torchrun and containers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.distributed.run import parse_args

from edm2kit.cli import generate, train
from edm2kit.training.checkpoint import list_checkpoints
from tests.docs.support import code_blocks, page
from tests.support import ROOT, launchers, tiny
from tests.support.house import dependencies

PAGE, SCRIPT = "docs/clusters.md", "scripts/train.slurm"
COMMANDS = {"train.py": train.main, "edm2kit-train": train.main, "generate.py": generate.main}
# what the page trains, and the smallest thing of the kind
TINY = {
    "--preset": "--config",
    "edm2-img64-s": "tiny.yaml",
    "edm2-img64-xs": "tiny.yaml",
    "img64.zip": "images",
    "128Mi": "32",
}


class Cluster:
    """A folder with the stand-ins' programs, in which shell code runs as a user of the checkout would run it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "checkout", folder / "log.jsonl"
        self.bin, self.codes = folder / "bin", folder / "codes"
        launchers.install(self.bin)
        self.folder.mkdir()
        for name in ("scripts", "Dockerfile", "train.py", "generate.py"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "img64.zip").write_bytes(b"pictures")
        (folder / "tmp").mkdir()
        self.temporary = folder / "tmp"

    def run(self, code: str, *, codes: str = "", **variables: str) -> subprocess.CompletedProcess:
        self.codes.write_text(codes)
        environment = {name: value for name, value in tiny.environment().items() if not name.startswith("SLURM_")}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "TMPDIR": str(self.temporary)}
        environment |= {"STAND_IN_LOG": str(self.log), "STAND_IN_CODES": str(self.codes), **variables}
        line = ["bash", "-eu", "-o", "pipefail", "-c", code]
        return subprocess.run(line, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=400)

    def calls(self, *programs: str) -> list[dict]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [call for call in found if not programs or call["program"] in programs]


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def test_every_command_of_the_page_runs(cluster, tmp_path, monkeypatch):
    blocks = code_blocks(page(PAGE))
    assert "..." not in "".join(blocks)
    for block in blocks:
        done = cluster.run(block)
        assert done.returncode == 0, block + done.stdout + done.stderr
    programs = {call["program"] for call in cluster.calls()}
    assert programs == set(launchers.NAMES) - {"scontrol"}  # the script calls that one after a stop
    for call in cluster.calls("torchrun"):
        assert parse_args(call["words"]).training_script == "train.py"
    # the commands that all of them end in
    asked = []
    for call in cluster.calls("python", "edm2kit-train"):
        words = [call["program"], *call["words"]] if call["program"] == "edm2kit-train" else call["words"]
        asked.append(tuple(words))
    assert len(set(asked)) >= 6
    tiny.make_dataset(cluster.folder / "images")
    tiny.write_config(cluster.folder / "tiny.yaml", duration_nimg=16)
    monkeypatch.chdir(cluster.folder)
    run = SimpleNamespace(define_metric=lambda *a, **b: None, log=lambda record: None, finish=lambda **a: None)
    fake = SimpleNamespace(init=lambda **settings: run, Image=lambda pixels: None, __spec__="found")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for program, *words in dict.fromkeys(asked):
        small = [TINY.get(word, "images" if word.endswith("/img64.zip") else word) for word in words]
        small += ["--device", "cpu", *(["--samples", "0"] if "--config" in small else ["--steps", "2"])]
        done = CliRunner().invoke(COMMANDS[program], small)
        assert done.exit_code == 0, (program, small, done.output)


def test_the_page_shows_the_script_as_it_is():
    (shown,) = code_blocks(page(PAGE), "shell")
    assert shown == (ROOT / SCRIPT).read_text()


def test_a_run_that_stopped_is_queued_again_until_it_is_complete(cluster):
    done = cluster.run(f"sbatch {SCRIPT} --data img64.zip --outdir 'runs/my run'", codes="75 75 0")
    assert done.returncode == 0, done.stderr
    assert [call["words"] for call in cluster.calls("scontrol")] == [["requeue", "1234"]] * 2
    tasks = cluster.calls("python")
    assert [call["words"] for call in tasks] == [["train.py", "--data", "img64.zip", "--outdir", "runs/my run"]] * 3
    assert tasks[0]["env"]["SRUN_CPUS_PER_TASK"] == "8"


@pytest.mark.parametrize("code", [1, 2, 137, 143])
def test_a_run_that_failed_is_not_queued_again(cluster, code):
    done = cluster.run(f"sbatch {SCRIPT} --data img64.zip --outdir runs/s", codes=str(code))
    assert done.returncode == code
    assert not cluster.calls("scontrol")


def test_options_of_sbatch_come_before_those_of_the_script(cluster):
    done = cluster.run(f"sbatch --nodes=3 --ntasks-per-node=1 {SCRIPT}", STAND_IN_TASKS="9")
    assert done.returncode == 0, done.stderr
    numbers = [call["env"]["SLURM_STEP_NUM_TASKS"] for call in cluster.calls("python")]
    assert numbers == ["3"] * 3


def test_data_are_copied_to_the_disk_of_each_machine(cluster):
    done = cluster.run(f"LOCAL_DATA=1 sbatch {SCRIPT} --data img64.zip --outdir runs/s")
    assert done.returncode == 0, done.stderr
    copy = cluster.temporary / "img64.zip"
    assert copy.read_bytes() == b"pictures"
    (call,) = cluster.calls("python")
    assert call["words"] == ["train.py", "--data", str(copy), "--outdir", "runs/s"]
    copying = cluster.calls("srun")[0]["words"]
    assert copying[:2] == ["--ntasks=2", "--ntasks-per-node=1"]
    missing = cluster.run(f"LOCAL_DATA=1 sbatch {SCRIPT} --data nothing.zip --outdir runs/s")
    assert missing.returncode == 1
    assert len(cluster.calls("python")) == 1


@pytest.mark.slow
def test_two_tasks_stop_are_queued_again_and_reach_the_bits_of_torchrun(cluster, tmp_path):
    data, config = tiny.make_dataset(tmp_path / "data"), tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=48)
    words = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0]
    script = [SCRIPT, *words, "--outdir", tmp_path / "run", "--max-time", "0.001s"]
    line = " ".join(map(str, ["sbatch", "--nodes=1", "--ntasks-per-node=2", *script]))
    done = cluster.run(line, STAND_IN_TASKS="2", STAND_IN_REAL="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("One job of 2 processes") == 3
    assert [f"at {nimg} images" in done.stdout for nimg in (16, 32, 48)] == [True] * 3
    assert len(cluster.calls("scontrol")) == 2
    straight = tiny.run("train.py", *words, "--outdir", tmp_path / "straight", ranks=2)
    assert straight.returncode == 0, straight.stderr
    a, b = (torch.load(list_checkpoints(tmp_path / name)[-1], weights_only=True) for name in ("run", "straight"))
    for part in ("net", "ema"):
        assert str(a[part]) == str(b[part])
    assert sorted(p.name for p in (tmp_path / "run").glob("network*")) == sorted(
        p.name for p in (tmp_path / "straight").glob("network*")
    )


def test_the_container_is_made_of_files_and_extras_that_exist():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    assert re.match(r"(#.*\n)*FROM python:3\.1[123]-slim\n", text)
    assert "://" not in text
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"edm2kit", "pyproject.toml", "constraints.txt", "train.py"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    (extras,) = re.findall(r'"\.\[(.+?)\]"', text)
    assert set(extras.split(",")) <= dependencies(ROOT).keys()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
