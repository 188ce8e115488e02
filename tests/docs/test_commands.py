"""Every command in a document names a script, a subcommand, options and presets that exist."""

import importlib
import importlib.util
import re
import shlex

import click
import pytest

from edm2kit.cli.doctor import doctor
from edm2kit.cli.presets import boxed_presets, load_presets
from edm2kit.training.config import preset_names
from tests.docs.support import code_blocks
from tests.support import ROOT, house

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").glob("*.md"),
    *(ROOT / "experiments").rglob("*.md"),
]


def command_lines(text):
    """(script, words) of each line of a shell block that runs a Python file of the project."""
    for block in code_blocks(text, "(bash|sh|shell)?"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition("  #")[0], comments=True)
            scripts = [k for k, word in enumerate(words) if word.endswith(".py") and (ROOT / word).exists()]
            if scripts and words[0] in ("python", "torchrun"):
                yield words[scripts[0]], words[scripts[0] + 1 :]


def click_command(script):
    """The click command of a script, or None if it has none (pytest files, say)."""
    if (name := house.command_of_file(ROOT / script)) is not None:
        return importlib.import_module(name).main
    spec = importlib.util.spec_from_file_location("script_of_a_document", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command = getattr(module, "main", None)
    return command if isinstance(command, click.Command) else None


def problems(script, words):
    """What does not exist, as texts."""
    command = click_command(script)
    if command is None:
        return []
    if words[:1] == ["doctor"]:
        command = doctor
    elif isinstance(command, click.Group):
        if not words or words[0] not in command.commands:
            return [] if not words or words[0] == "--help" else [f"{script} has no subcommand {words[0]}"]
        command = command.commands[words[0]]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    found = [f"{script} has no option {word}" for word in words if re.match(r"--?[a-zA-Z]", word) and word not in known]
    if "--preset" in words:
        preset = words[words.index("--preset") + 1]
        if preset not in {*preset_names(), *boxed_presets(), *load_presets()}:
            found.append(f"there is no preset {preset}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    lines = list(command_lines(page.read_text(encoding="utf-8")))
    assert [problem for script, words in lines for problem in problems(script, words)] == []


def test_a_wrong_command_is_found():
    lines = [
        "python generate.py --nett x --preset edm2-img512-y \\",
        "  --seeds 0",
        "python scripts/dataset_tool.py pack",
    ]
    text = "\n".join(["```", *lines, "```", ""])
    assert [problem for line in command_lines(text) for problem in problems(*line)] == [
        "generate.py has no option --nett",
        "there is no preset edm2-img512-y",
        "scripts/dataset_tool.py has no subcommand pack",
    ]
