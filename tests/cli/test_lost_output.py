"""Output that nobody can read: a full disk behind it, or a pipe whose reader has gone, costs one line at most."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from edm2kit.torch_utils import dist
from tests.support import ROOT, house
from tests.support.tiny import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")

# one process for all commands, whose forks need not import anything again
SCRIPT = """
import importlib, json, os, sys, tempfile

def run(module, function, words, kind):
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            read, target = os.pipe()
            os.close(read)
            if kind == "full":
                target = os.open("/dev/full", os.O_WRONLY)
            os.dup2(target, 1)
            os.dup2(errors.fileno(), 2)
            sys.argv = ["command", *words]
            leave(getattr(importlib.import_module(module), function))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        return code, errors.read().decode()

def leave(command):
    code = "the command went on"
    try:
        command()
    except SystemExit as leaving:
        code = leaving.code
    try:
        sys.stdout.flush()  # as an interpreter does at its end, which takes half a second
    except OSError:
        code = 120
    os._exit(code)

jobs = json.loads(sys.argv[1])
for module, *_ in jobs:
    importlib.import_module(module)
found = [run(*job, kind) for job in jobs for kind in ("full", "closed")]
print(json.dumps(found))
"""
FULL = "Error: standard output cannot be written (No space left on device)\n"


def check(jobs: list[tuple[str, str, list[str]]], **variables: str) -> None:
    """Run functions of modules with the words of a command line, their standard output full, then closed."""
    settings = {**environment(), **variables}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = [(*job[:3], *outcome) for job in jobs for outcome in ((1, FULL), (1, ""))]
    names = [job[:3] for job in jobs for _ in ("full", "closed")]
    found = [(*name, *outcome) for name, outcome in zip(names, json.loads(done.stdout), strict=True)]
    assert found == expected


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_of_every_command(unbuffered):
    names = [module.rpartition(".")[2] for module in sorted(house.commands(ROOT))]
    check([("edm2kit.cli.console", name, ["--help"]) for name in names], PYTHONUNBUFFERED=unbuffered)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_commands_print(unbuffered):
    words = {"metrics": [["list"], ["--help"]], "flops": [["edm2-img64-s"]], "dataset": [["check", "--help"]]}
    jobs = [(f"edm2kit.cli.{name}", "main", line) for name, lines in words.items() for line in lines]
    check(jobs, PYTHONUNBUFFERED=unbuffered)


def test_lines_that_a_full_disk_lost_are_not_forgotten():
    code = "import sys\nfrom edm2kit.torch_utils import dist\n"
    code += "dist.print0('lost')\ndist.exit_process(75 * len(sys.argv[1:]))"
    for words, expected in (([], 1), (["stopped"], 75)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code, *words],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment(),
            )
        assert (done.returncode, done.stderr) == (expected, FULL)


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_progress_bar_that_nobody_sees_does_not_end_the_work(kind, monkeypatch):
    read, target = os.pipe()
    os.close(read)
    if kind == "full":
        os.close(target)
        target = os.open("/dev/full", os.O_WRONLY)
    stream = os.fdopen(target, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    with dist.progress_bar(3) as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
    assert bar.n == 3
    with contextlib.suppress(OSError):
        stream.close()
