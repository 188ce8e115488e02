"""What --help of every command and subcommand looks like."""

import importlib

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli import doctor
from edm2kit.cli.click_types import Command, Group
from tests.support import ROOT, house


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
    return {**found, "train doctor": doctor.doctor}


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
