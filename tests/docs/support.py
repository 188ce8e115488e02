"""Reading code out of Markdown pages."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.tiny import environment


def page(name: str) -> str:
    """A page of the checkout, e.g. "docs/extend.md"."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language (a regular expression), without their fences."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for found, code in blocks if re.fullmatch(language, found)]


def sections(text: str) -> dict[str, str]:
    """The text under each second-level heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def broken_links(file: Path) -> list[str]:
    """Relative links and pictures of a Markdown file that lead to nothing."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    return [f"{file.relative_to(ROOT)}: {target}" for target in local if not (file.parent / target).exists()]


def run_commands(block: str, folder: Path) -> str:
    """Run the `python FILE ...` lines of a shell block in `folder`; returns their output.

    A FILE that `folder` lacks is taken from the checkout. Raises AssertionError, with the output, if one fails.
    """
    lines = [line.partition("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line) for line in lines if line and line[0] != "#"]
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, json.dumps(commands), str(ROOT)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# each command in a process of its own, forked from one that has already loaded what takes long
_RUNNER = """
import json, os, runpy, sys
import click, numpy, PIL.Image, scipy.linalg, torch, torch._dynamo, yaml
commands, root = json.loads(sys.argv[1]), sys.argv[2]
sys.path.append(root)
for program, file, *arguments in commands:
    if program != "python":
        sys.exit(f"not a Python command: {program}")
    print("$", program, file, *arguments, flush=True)
    child = os.fork()
    if child == 0:
        sys.argv = [file if os.path.exists(file) else os.path.join(root, file), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(1)
"""


def run_tests(folder: Path, *modules: str) -> str:
    """Import `modules` in `folder`, then run its test files; returns what pytest printed."""
    code = f"import {', '.join(modules)}, pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
