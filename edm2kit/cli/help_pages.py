"""`--help` of the commands from a file, without importing torch, which takes more than a second.

`edm2kit/configs/help.json` holds what click knows of each command; `python scripts/write_documents.py` writes it, and a
test compares it with the commands.
"""

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

FILE = Path(__file__).parent.parent / "configs" / "help.json"
CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}

Sections = Sequence[tuple[str, Sequence[tuple[str, str]]]]  # (title, (options, their help) of each line)


def answer(name: str) -> None:
    """Print the help of the command `name` and exit, if this process was asked for nothing else."""
    words = sys.argv[1:]
    if not words or words[-1] not in CONTEXT["help_option_names"]:
        return
    pages = json.loads(FILE.read_text(encoding="utf-8"))["pages"]
    page = pages.get(" ".join([name, *words[:-1]]))
    if page is not None:
        program = " ".join([Path(sys.argv[0]).name, *words[:-1]])
        click.echo(text_of(page, program))
        sys.exit(0)


def text_of(page: dict[str, Any], program: str) -> str:
    """The help of a page, as wide as the terminal, of a command that is called `program`."""
    command = _Stored(page)
    return command.get_help(click.Context(command, info_name=program, **CONTEXT))


def page_of(command: Any, context: click.Context) -> dict[str, Any]:
    """What `text_of` needs of a command of `click_types`."""
    subcommands = getattr(command, "commands", {})
    return {
        "usage": command.collect_usage_pieces(context),
        "text": command.help,
        "epilog": command.epilog,
        "sections": command.help_sections(context),
        "commands": {name: [subcommands[name].help, subcommands[name].short_help] for name in sorted(subcommands)},
    }


def pages_of(commands: dict[str, Any]) -> dict[str, Any]:
    """The content of the file, for commands by name."""
    pages = {}
    for name, command in commands.items():
        context = click.Context(command, info_name=name, **command.context_settings)
        pages[name] = page_of(command, context)
        for sub, subcommand in getattr(command, "commands", {}).items():
            inner = click.Context(subcommand, info_name=sub, parent=context, **subcommand.context_settings)
            pages[f"{name} {sub}"] = page_of(subcommand, inner)
    return {"click": importlib.metadata.version("click"), "pages": pages}


def write_sections(formatter: click.HelpFormatter, sections: Sections) -> None:
    """Write options under their titles."""
    for title, lines in sections:
        with formatter.section(title):
            formatter.write_dl([(option, text) for option, text in lines], col_max=26)


class _Stored(click.Group):
    """A command of which only the help is known."""

    def __init__(self, page: dict[str, Any]) -> None:
        commands = {
            name: click.Command(name, help=text, short_help=short) for name, (text, short) in page["commands"].items()
        }
        super().__init__(help=page["text"], epilog=page["epilog"], commands=commands)
        self.page = page

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return self.page["usage"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_sections(formatter, self.page["sections"])
        self.format_commands(ctx, formatter)
