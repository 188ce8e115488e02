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
    """The fenced blocks of one language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


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
    """Run the `python FILE ...` lines of a shell block in `folder`, all in one process; returns their output.

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
    return done.stdout + done.stderr


_RUNNER = """
import json, os, runpy, sys
commands, root = json.loads(sys.argv[1]), sys.argv[2]
sys.path.append(root)
for program, file, *arguments in commands:
    assert program == "python", program
    print("$", program, file, *arguments, flush=True)
    sys.argv = [file if os.path.exists(file) else os.path.join(root, file), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""
