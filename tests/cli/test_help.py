"""What --help of every command and subcommand looks like."""

import importlib
import importlib.metadata
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli import help_pages
from edm2kit.cli.click_types import Command, Group
from tests.support import ROOT, house
from tests.support.tiny import environment


def all_commands():
    """Every command without subcommands, by the words that start it."""
    found = {}
    for module in sorted(house.commands(ROOT)):
        main = importlib.import_module(module).main
        name = module.split(".")[-1]
        if isinstance(main, click.Group):
            found |= {f"{name} {sub}": command for sub, command in main.commands.items()}
        else:
            found[name] = main
    return found


COMMANDS = all_commands()


def options_of(command):
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_every_option_is_explained(name):
    command = COMMANDS[name]
    assert isinstance(command, Command | Group)
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) < 80
    words = " ".join(done.output.split())
    for option in options_of(command):
        assert option.help, option.name
        assert not option.help.endswith("."), f"{option.name}: a phrase, not a sentence"
        if option.hidden or option.name in command.unlisted:
            assert not any(f" {text} " in words for text in option.opts), option.name
        else:
            assert any(f" {text} " in words or f" {text}," in words for text in option.opts), option.name


@pytest.mark.parametrize("name", COMMANDS)
def test_options_with_a_default_show_it(name):
    shown = " ".join(CliRunner().invoke(COMMANDS[name], ["--help"]).output.split())
    for option in options_of(COMMANDS[name]):
        default = option.default
        if option.hidden or option.is_flag or callable(default) or not isinstance(default, str | int | float):
            continue
        if default != "":
            assert f"[default: {default}" in shown, option.name


STORED = json.loads(help_pages.FILE.read_text(encoding="utf-8"))
QUICK = {
    "generate.py": ["generate"], "train.py": ["train"], "calculate_metrics.py": ["metrics", "metrics calc"],
    "reconstruct_phema.py": ["phema"], "scripts/dataset_tool.py": ["dataset", "dataset convert"],
}  # fmt: skip


def live_help(name):
    """What the command of a page prints (CliRunner would set the width)."""
    first, *rest = name.split()
    command = importlib.import_module(f"edm2kit.cli.{first}").main
    context = click.Context(command, info_name=first, **command.context_settings)
    for word in rest:
        command = command.commands[word]
        context = click.Context(command, info_name=word, parent=context, **command.context_settings)
    return command.get_help(context)


@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_stored_help_is_that_of_the_commands(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    groups = {name.split()[0] for name in COMMANDS}
    assert set(STORED["pages"]) == {*COMMANDS, *groups}
    for name, page in STORED["pages"].items():
        expected, found = live_help(name), help_pages.text_of(page, name)
        if importlib.metadata.version("click") == STORED["click"]:
            assert found == expected, f"{name}: run python scripts/write_documents.py"
        else:  # another click words defaults in another way
            options = [[line.split()[0] for line in text.splitlines() if " --" in line] for text in (found, expected)]
            assert options[0] == options[1]


_RUN = """
import contextlib, io, json, runpy, sys
found = []
for file, *words in json.loads(sys.argv[1]):
    sys.argv = [file, *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
    found.append((text.getvalue(), "torch" in sys.modules))
print(json.dumps(found))
"""


def test_help_of_the_main_commands_does_not_import_torch():
    calls = [[file, *page.split()[1:]] for file, pages in QUICK.items() for page in pages]
    line = [sys.executable, "-c", _RUN, json.dumps(calls)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for (file, *words), (text, has_torch) in zip(calls, json.loads(done.stdout), strict=True):
        assert text.startswith(" ".join(["Usage:", file.split("/")[-1], *words]))
        assert text.count("\n") > 5
        assert not has_torch, file
