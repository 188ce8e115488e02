"""The command lines of the documents: found in their shell blocks, and parsed by the real click commands."""

import contextlib
import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from functools import cache

import click

from edm2kit.cli.doctor import doctor
from tests.docs.support import code_blocks
from tests.support import ROOT, house

FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"),
                *(ROOT / "experiments").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])  # fmt: skip
PAGES = [str(file.relative_to(ROOT)) for file in FILES if code_blocks(file.read_text(encoding="utf-8"), "(bash|sh)?")]


@dataclass(frozen=True)
class ShellLine:
    """One command of a page: its words, variables filled in, and the text as it stands there."""

    page: str
    text: str
    words: tuple[str, ...]

    @property
    def program(self) -> tuple[str, ...]:
        """The words without torchrun and its options, if it starts with them."""
        if self.words[0] != "torchrun":
            return self.words
        start = next(k for k, word in enumerate(self.words) if word.endswith(".py"))
        return ("python", *self.words[start:])

    @property
    def start(self) -> tuple[str, ...]:
        """The words that say what runs: a script, a module or an installed command."""
        return self.program[: len(self.program) - len(self.arguments)]

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the click command gets."""
        start = 1 if self.program[0] != "python" else 3 if self.program[1] == "-m" else 2
        return self.program[start:]


def shell_lines(page: str) -> list[ShellLine]:
    """Every command in the shell blocks of a page; assignments of variables hold for what follows on the page."""
    found, variables = [], {}
    for block in code_blocks((ROOT / page).read_text(encoding="utf-8"), "(bash|sh)?"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                text = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), part)
                words = shlex.split(text, comments=True)
                while words and re.match(r"\w+=", words[0]):
                    name, _, value = words.pop(0).partition("=")
                    variables[name] = value
                if words and words[0] != "export":
                    found.append(ShellLine(page, " ".join(part.partition("  #")[0].split()), tuple(words)))
    return found


@cache
def console_scripts() -> dict[str, str]:
    """The modules of the installed commands by name."""
    return house.console_commands(ROOT)


@cache
def click_command(program: tuple[str, ...]) -> click.Command | None:
    """The command that the first words of a line run; None if they do not run a click command of the project.

    Raises AssertionError if a file or module does not exist.
    """
    if program[0] in console_scripts():
        return importlib.import_module(console_scripts()[program[0]]).main
    if program[0] != "python":
        return None
    if program[1] == "-m":
        if not program[2].startswith("edm2kit."):
            return None
        return importlib.import_module(program[2]).main
    file = ROOT / program[1]
    assert file.is_file(), f"{program[1]} does not exist"
    if (name := house.command_of_file(file)) is not None:
        return importlib.import_module(name).main
    spec = importlib.util.spec_from_file_location("script_of_a_document", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command = getattr(module, "main", None)
    return command if isinstance(command, click.Command) else None


def parse(line: ShellLine) -> bool:
    """Let click parse a line without running it; False if it is not a click command. Raises click.UsageError."""
    command = click_command(line.start)
    if command is None:
        return False
    arguments, parent, name = list(line.arguments), None, line.program[1]
    if arguments[:1] == ["doctor"]:
        command, arguments = doctor, arguments[1:]
    while isinstance(command, click.Group):
        parent = command.make_context(name, arguments, parent=parent)
        name, command, arguments = command.resolve_command(parent, [*parent._protected_args, *parent.args])
    with contextlib.suppress(click.exceptions.Exit):  # --help and the like have printed their text
        command.make_context(name, arguments, parent=parent)
    return True
