"""Output that nobody can read: a full disk behind it, or a pipe whose reader has gone, costs one line at most."""

import json
import subprocess
import sys

import pytest

from tests.support import ROOT, house
from tests.support.tiny import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")

# one process for all commands, as importing them takes seconds
SCRIPT = """
import importlib, json, os, sys, tempfile

def run(module, words, kind):
    print(end="", flush=True)
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            read, target = os.pipe()
            os.close(read)
            if kind == "full":
                target = os.open("/dev/full", os.O_WRONLY)
            os.dup2(target, 1)
            os.dup2(errors.fileno(), 2)
            sys.argv = [module.split(".")[-1], *words]
            leave(importlib.import_module(module).main)
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
found = [run(*job) for job in jobs]
print(json.dumps(found))
"""
FULL = "Error: standard output cannot be written (No space left on device)\n"


def outcomes(jobs: list[tuple[str, list[str], str]]) -> list[tuple[int, str]]:
    """Exit codes and standard error of commands whose standard output is "full" or "closed"."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout)]


def test_every_command_says_so_in_one_line():
    modules = sorted(house.commands(ROOT))
    words = [(module, ["--help"]) for module in modules]
    words += [("edm2kit.cli.metrics", ["list"]), ("edm2kit.cli.dataset", ["check", "--help"])]
    words += [("edm2kit.cli.flops", ["edm2-img64-s"])]
    found = outcomes([(module, list(said), kind) for module, said in words for kind in ("full", "closed")])
    named = [(*job, *outcome) for job, outcome in zip([one for one in words for _ in "ab"], found, strict=True)]
    assert [one for one in named[::2] if one[2:] != (1, FULL)] == []
    assert [one for one in named[1::2] if one[2:] != (1, "")] == []


@pytest.mark.parametrize(("kind", "said"), [("full", FULL), ("closed", "")])
def test_help_without_torch(kind, said):
    code = "import os, sys\nfrom edm2kit.cli import help_pages\nsys.argv = ['train.py', '--help']\n"
    code += "read, write = os.pipe()\nos.close(read)\n"
    code += f"os.dup2(os.open('/dev/full', 1) if {kind == 'full'} else write, 1)\nhelp_pages.answer('train')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, said)
