"""`--help`, and what is wrong with the words of a command line, without importing torch, which takes over a second.

`edm2kit/configs/help.json` holds what click knows of each command; `python scripts/write_documents.py` writes it, and a
test compares it with the commands. Values of options are checked by the commands themselves.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

_LONGEST_SENTENCE = 200  # of a group's list of commands
_PACKAGE = Path(__file__).parent.parent
FILE = _PACKAGE / "configs" / "help.json"
CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}

Sections = Sequence[tuple[str, Sequence[tuple[str, str]]]]  # (title, (options, their help) of each line)


def answer(name: str) -> None:
    """Print the help of the command `name`, or what is wrong with the words of this process's command line, and exit.

    Returns if the command itself is needed.
    """
    if any(variable.startswith("_") and variable.endswith("_COMPLETE") for variable in os.environ):
        return  # a shell asks for completions, and the types of values are not known here
    if None in (sys.stdout, sys.stderr):
        return  # closed streams (cron, `2>&-`), which commands prepare first
    try:
        os.getcwd()
    except OSError:  # libraries of torch would end the process for this, and say nothing of it
        click.echo("Error: the current folder does not exist any more; change to another one", err=True)
        sys.exit(1)
    pages = json.loads(FILE.read_text(encoding="utf-8"))["pages"]
    words, separate = sys.argv[1:], " ".join([name, *sys.argv[1:2]])
    try:
        with contextlib.suppress(_CommandIsNeeded):
            if separate in pages and not pages[name]["commands"]:  # such as train.py doctor
                stored_command(separate, pages).main(words[1:], prog_name=f"{Path(sys.argv[0]).name} {words[0]}")
            stored_command(name, pages).main(words)
    except OSError as error:  # click leaves in silence if the reader of a pipe has gone
        with contextlib.suppress(OSError):
            click.echo(f"Error: standard output cannot be written ({error.strerror})", err=True)
        os._exit(1)  # Python would try to write the rest again


def stored_command(name: str, pages: dict[str, Any]) -> click.Command:
    """The command of a page, with its subcommands: it knows its help and its options, and does nothing."""
    page = pages[name]
    if not page["commands"]:
        return _StoredCommand(name, page)
    group = _StoredGroup(name, page)
    for sub in page["commands"]:
        group.add_command(_StoredCommand(sub, pages[f"{name} {sub}"]))
    return group


def pages_of(commands: dict[str, Any]) -> dict[str, Any]:
    """The content of the file, for commands of `click_types` by name."""
    pages = {}
    for name, command in commands.items():
        context = click.Context(command, info_name=name, **command.context_settings)
        pages[name] = _page_of(command, context)
        for sub, subcommand in getattr(command, "commands", {}).items():
            inner = click.Context(subcommand, info_name=sub, parent=context, **subcommand.context_settings)
            pages[f"{name} {sub}"] = _page_of(subcommand, inner)
    return {"click": importlib.metadata.version("click"), "pages": pages}


def _page_of(command: Any, context: click.Context) -> dict[str, Any]:
    return {
        "usage": command.collect_usage_pieces(context),
        "text": command.help,
        "short": command.short_help,
        "epilog": command.epilog,
        "sections": command.help_sections(context),
        "parameters": [_settings_of(parameter) for parameter in command.params],
        "commands": sorted(getattr(command, "commands", {})),
    }


def _settings_of(parameter: click.Parameter) -> dict[str, Any]:
    """What `_stored` makes a parameter of that takes the same words."""
    settings: dict[str, Any] = {"required": True} if parameter.required else {}
    if parameter.nargs != 1:
        settings["nargs"] = parameter.nargs
    if isinstance(parameter, click.Argument):
        return {"argument": parameter.name, "metavar": parameter.metavar, **settings}
    assert isinstance(parameter, click.Option)
    names = list(parameter.opts)
    if parameter.secondary_opts:
        names = ["/".join(pair) for pair in zip(parameter.opts, parameter.secondary_opts, strict=True)]
    for name in ("multiple", "is_flag", "is_eager"):
        if getattr(parameter, name):
            settings[name] = True
    if not parameter.is_flag and isinstance(parameter.flag_value, str):
        settings |= {"is_flag": False, "flag_value": parameter.flag_value}  # the value of the option without one
    return {"option": names, **settings}


def _stored(settings: dict[str, Any]) -> click.Parameter:
    """A parameter of which only the words are known; its values stay texts."""
    settings = dict(settings)
    if "argument" in settings:
        return click.Argument([settings.pop("argument")], type=click.UNPROCESSED, **settings)
    if not settings.get("is_flag"):
        settings["type"] = click.UNPROCESSED
    if settings.get("is_eager"):  # it prints something, or decides which values others may have
        settings["callback"] = _leave_to_the_command
    return click.Option(settings.pop("option"), **settings)


def _leave_to_the_command(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        raise _CommandIsNeeded


def write_sections(formatter: click.HelpFormatter, sections: Sections) -> None:
    """Write options under their titles."""
    for title, lines in sections:
        with formatter.section(title):
            formatter.write_dl([(option, text) for option, text in lines], col_max=26)


class Sentences(click.Command):
    """A command whose line in the list of its group is a complete sentence, wrapped instead of cut."""

    def get_short_help_str(self, limit: int = _LONGEST_SENTENCE) -> str:
        return super().get_short_help_str(_LONGEST_SENTENCE)


class _CommandIsNeeded(Exception):
    """What is stored cannot answer."""


class _Stored(Sentences):
    """A command of which only the help and the options are known."""

    def __init__(self, name: str, page: dict[str, Any]) -> None:
        texts = {"help": page["text"], "short_help": page["short"], "epilog": page["epilog"]}
        parameters = [_stored(settings) for settings in page["parameters"]]
        super().__init__(name, context_settings=CONTEXT, params=parameters, **texts)
        self.page = page

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return self.page["usage"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_sections(formatter, self.page["sections"])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # somebody may have added a guidance method with options of its own since the file was written
            if _is_in_the_sources(error.option_name):
                raise _CommandIsNeeded from error
            raise


class _StoredCommand(_Stored):
    def invoke(self, ctx: click.Context) -> Any:
        raise _CommandIsNeeded


class _StoredGroup(_Stored, click.Group):
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def _is_in_the_sources(option: str) -> bool:
    """Whether a text in a file of the package could be the name of this option."""
    words = option.lstrip("-").split("-")
    name = re.compile(rf"""["'](--)?{"[-_]".join(map(re.escape, words))}[/"']""")
    return any(name.search(file.read_text(encoding="utf-8")) for file in _PACKAGE.rglob("*.py"))
