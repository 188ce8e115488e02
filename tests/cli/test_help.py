"""What --help of every command and subcommand looks like."""

import importlib

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli import doctor
from edm2kit.cli.click_types import Command, Group
from edm2kit.guidance.registry import all_options
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


def groups():
    found = {}
    for module in sorted(house.commands(ROOT)):
        main = importlib.import_module(module).main
        if isinstance(main, click.Group):
            found[module.split(".")[-1]] = main
    return found


@pytest.mark.parametrize("name", groups())
def test_a_group_lists_its_commands_with_complete_sentences(name):
    group = groups()[name]
    shown = "".join(CliRunner().invoke(group, ["--help"]).output.split())  # however lines are broken, also at hyphens
    for command in group.commands.values():
        sentence = command.short_help or command.help.partition("\n\n")[0].partition(". ")[0]
        assert "".join(sentence.split()) in shown, command.name


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_stand_in_brackets_alone_and_arguments_need_no_line(name):
    lines = CliRunner().invoke(COMMANDS[name], ["--help"]).output.splitlines()
    assert "[default: (" not in " ".join(" ".join(lines).split())
    arguments = [one for one in COMMANDS[name].params if isinstance(one, click.Argument)]
    for argument in arguments:
        assert (argument.metavar or argument.name) not in [line.strip() for line in lines]


def test_options_of_methods_without_a_value_say_what_is_done_then():
    shown = CliRunner().invoke(COMMANDS["generate"], ["--help-guidance", "pag"]).output
    assert "[default: the deepest of the encoder and the middle]" in " ".join(shown.split())
    for owner, option in all_options():
        if option.default is not None or owner == "loss":
            continue  # what a loss needs depends on its kind
        assert "[default: " in option.help or option.help.endswith("; required"), option.name
