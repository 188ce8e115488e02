"""What all commands share: one-line errors, --help in sections, types of option values."""

import contextlib
import io
import itertools
import math
import os
import re
import signal
import sys
import traceback
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edm2kit.cli import help_pages
from edm2kit.cli.output_kinds import OUTPUT_KINDS
from edm2kit.data.image_files import IMAGE_EXTENSIONS
from edm2kit.data.labels import LABELS_FILE
from edm2kit.torch_utils import dist

Decorator = Callable[[Any], Any]  # what click.option returns

OTHER = "Other"  # the last section of --help: options without a section, and --help itself
# options by which commands use less memory, the least costly first
_MEMORY_OPTIONS = {
    "--batch-gpu": "a smaller --batch-gpu (same results)",
    "--batch": "a smaller --batch",
    "--recompute": "--recompute true",
    "--shard": "--shard true with several processes",
    "--precision": "--precision bf16 or fp16",
}
_PATH_WORD = re.compile("PATH|DIR|FILE|ZIP|NPZ|YAML|URL|SNAPSHOT")
_MAX_NUMBERS = 4_000_000  # in a list of ranges, which is held in memory
_MAX_SEC = 1e9  # 31 years
_UNIT_SEC = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SUFFIX = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class _Base(help_pages.Sentences):
    """A command whose --help comes in sections with defaults, and that ends its process through `dist.exit_process`.

    `sections` are the titles to list first, in their order; other sections follow in the order of their options.
    `unlisted` are parameters that --help leaves out.
    """

    def __init__(
        self,
        name: str | None,
        *,
        sections: Sequence[str] = (),
        unlisted: Sequence[str] = (),
        context_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, context_settings={**help_pages.CONTEXT, **(context_settings or {})}, **kwargs)
        self.sections = sections
        self.unlisted = unlisted

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # a variable of the shell without a value; "" would be this folder
        paths = {option for p in self.params if _takes_path(p) for option in p.opts}
        for option, value in itertools.pairwise(part for arg in args for part in arg.split("=", 1)):
            if option in paths and not value:
                raise click.UsageError(f"{option} is empty; give a path", ctx)
        arguments = [p for p in self.params if isinstance(p, click.Argument) and _takes_path(p)]
        for before, word in itertools.pairwise(["", *args]):
            if arguments and not word and not before.startswith("-"):
                raise click.UsageError(f"{arguments[0].metavar or arguments[0].name} is empty; give a path", ctx)
        return super().parse_args(ctx, [_at_home(arg) for arg in args])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _prepare_standard_streams()
        try:
            return super().main(*args, **kwargs)
        except SystemExit as leaving:
            if isinstance(leaving.code, int | None):
                dist.exit_process(leaving.code or 0)
            raise
        except OSError as error:  # in --help, or in the last words of a command
            if os.environ.get("EDM2_TRACEBACK") == "1" or not kwargs.get("standalone_mode", True):
                raise
            if dist.output_error(probe=True) is None:
                with contextlib.suppress(OSError):
                    click.echo(f"Error: {dist.one_line(str(error))}", err=True)
            dist.exit_process(1)
        except Exception:
            if not dist.had_group():
                raise
            # a process that ends the usual way would first wait for the other ranks, which wait for it
            traceback.print_exc()
            dist.exit_process(1)

    def help_sections(self, ctx: click.Context) -> help_pages.Sections:
        """The options that --help lists, by section."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in self.sections}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is None or not line[1] or parameter.name in self.unlisted:  # arguments have no help
                continue
            title = getattr(parameter, "section", OTHER)
            sections.setdefault(title, []).append(line)
        last = sections.pop(OTHER, [])
        filled = [(title, lines) for title, lines in sections.items() if lines]
        return [*filled, (OTHER if filled else "Options", last)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        help_pages.write_sections(formatter, self.help_sections(ctx))


def _takes_path(parameter: click.Parameter) -> bool:
    """Whether the value of a parameter is a path, or may be one, by its type or by what --help calls it."""
    return isinstance(parameter.type, click.Path) or bool(_PATH_WORD.search(parameter.metavar or ""))


def _prepare_standard_streams() -> None:
    """Nothing is lost, and no work fails, because a stream is closed (cron, `2>&-`) or cannot show a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # a file opened later would take its number, and what is printed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _at_home(argument: str) -> str:
    """An argument such as ~/set.zip, --data=~/set.zip or hf:~/set with the home folder, as shells write only some."""
    found = re.fullmatch(r"((?:.*=)?(?:[a-z_]{2,}:)?)(~/.*)", argument, re.DOTALL)
    return found[1] + os.path.expanduser(found[2]) if found else argument


class Command(_Base):
    """A command whose ValueError and OSError become one line and exit code 1; equal errors of ranks are printed once.

    Set EDM2_TRACEBACK=1 to see the full traceback instead.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if os.environ.get("EDM2_TRACEBACK") == "1":
                raise
            lost = isinstance(error, OSError) and error.filename is None and dist.output_error(probe=True)
            if lost or isinstance(error, dist.ReportedElsewhere):
                raise click.exceptions.Exit(1) from error  # which `dist.exit_process` or the other rank explains
            raise click.ClickException(dist.one_line(str(error))) from error
        except Exception as error:
            if os.environ.get("EDM2_TRACEBACK") == "1" or not dist.is_out_of_memory(error):
                raise
            raise click.ClickException(self._out_of_memory(str(error))) from error

    def _out_of_memory(self, reason: str) -> str:
        """The message for an out-of-memory error, with the options that help."""
        own = {option for parameter in self.params for option in parameter.opts}
        helpful = [text for option, text in _MEMORY_OPTIONS.items() if option in own]
        if "--batch-gpu" in own:
            helpful.remove(_MEMORY_OPTIONS["--batch"])  # this one is the batch of all processes, part of the result
        advice = f" To use less: {', '.join(helpful)}." if helpful else ""
        first_line = (reason.splitlines() or [""])[0]
        return f"out of memory ({first_line}).{advice}"


class Group(_Base, click.Group):
    """A group of such commands."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, as Ctrl-C does, so that temporary files are removed.

    Only the first signal interrupts; later SIGTERMs are ignored until the block has ended. Up to Python 3.12 an
    exception inside `Thread.join` marks a running thread as finished: the process would exit while the thread writes.
    """
    former = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if Ctrl-C is ignored, as under nohup
        former[signal.SIGINT] = signal.default_int_handler

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signal.SIGINT in former:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt

    try:
        for handled in former:
            signal.signal(handled, interrupt)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def section(title: str, *options: Decorator) -> Decorator:
    """Several click options as one decorator; --help lists them in this order, under `title`."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
            command.__click_params__[-1].section = title
        return command

    return decorate


def printing_option(
    name: str, text: Callable[[Any], str], help: str, metavar: str | None = None, hidden: bool = False
) -> Decorator:
    """An option that prints `text(value)` and ends the command; a flag unless it has a metavar."""

    def show(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(text(value))
            ctx.exit()

    return click.option(
        name,
        metavar=metavar,
        is_flag=True if metavar is None else None,  # False would make the value optional
        is_eager=True,
        expose_value=False,
        callback=show,
        help=help,
        hidden=hidden,
    )


def device_option() -> Decorator:
    """--device, the same for all commands."""
    return click.option("--device", metavar="NAME", default="auto", help="auto, cuda, mps or cpu")


def timeout_option() -> Decorator:
    """--timeout, after which no command waits any longer for another process, or a file."""

    def apply(ctx: click.Context, param: click.Parameter, value: float | None) -> None:
        if value is not None:
            ctx.with_resource(dist.waiting_at_most(value))

    return click.option(
        "--timeout",
        metavar="TIME",
        type=Parsed(parse_duration_sec),
        expose_value=False,
        callback=apply,
        help="Longest wait for a process or a file  [default: 30m]",
    )


def numerics_option(name: str, switch: Callable[[], contextlib.AbstractContextManager[None]], help: str) -> Decorator:
    """A flag that switches a setting of torch inside the command; `switch()` makes it and restores it at the end."""

    def apply(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.with_resource(switch())

    return click.option(name, is_flag=True, expose_value=False, callback=apply, help=help)


def tf32_option() -> Decorator:
    """--tf32, without which float32 means float32 (see `dist.session`)."""
    return numerics_option("--tf32", dist.tf32, "Faster float32 on CUDA with errors of 1e-3")


def deterministic_option() -> Decorator:
    """--deterministic: two runs of a command on one machine give the same bits on a GPU, too."""
    return numerics_option("--deterministic", dist.deterministic, "Repeat to the last bit on a GPU, too (slower)")


def numerics_options() -> tuple[Decorator, Decorator]:
    """--tf32 and --deterministic."""
    return tf32_option(), deterministic_option()


def given_options(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take those of `names` out of `options` that were given a value on the command line."""
    taken = {name: options.pop(name) for name in names}
    return {name: value for name, value in taken.items() if value is not None}


class OutputFile(click.Path):
    """A file to write, with others `also` beside it (kinds by suffix); refused if it holds no `kind` of file."""

    def __init__(self, kind: str, also: Mapping[str, str] | None = None) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self.kind, self.also = kind, also or {}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            check_output(path, self.kind)
            for suffix, kind in self.also.items():
                if path.suffix.lower() == suffix:
                    raise ValueError(f"{path} is the name of the {kind} that is written beside it; use another suffix")
                check_output(path.with_suffix(suffix), kind)
        except ValueError as error:
            self.fail(dist.one_line(str(error)), param, ctx)
        return path


class OutputFolder(click.Path):
    """A folder to write to; refused at once if it cannot be created or written."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            check_writable(path)
        except ValueError as error:
            self.fail(dist.one_line(str(error)), param, ctx)
        return path


class Size(click.ParamType):
    """A count such as 4096, 128Ki, 8Mi or 1Gi (powers of 1024), as an int."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(Ki|Mi|Gi)?", str(value).strip())
        if match is None:
            self.fail(f"{value!r:.60} is not a count; write for example 4096, 128Ki, 8Mi or 1Gi", param, ctx)
        count = float(match[1]) * _SUFFIX[match[2] or ""]
        if count != int(count):
            self.fail(f"{value!r:.60} is {count}, not a whole number", param, ctx)
        return int(count)


class AtLeast(click.ParamType):
    """An int or a float from `low` to `high`; --help does not repeat the bounds."""

    def __init__(self, kind: type[int] | type[float], low: float, high: float = math.inf) -> None:
        self.kind, self.low, self.high = kind, low, high
        self.name = "n" if kind is int else "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self.kind(value)
        except ValueError:
            self.fail(f"{value!r:.60} is not {'a whole' if self.kind is int else 'a'} number", param, ctx)
        if not (self.low <= number <= self.high and abs(number) < math.inf):
            bounds = f"at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
            self.fail(f"{value!s:.60} is not {bounds}", param, ctx)
        return number


class Parsed(click.ParamType):
    """A value read by `parse`, a function from text that raises ValueError."""

    name = "value"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_duration_sec(text: str) -> float:
    """Seconds in a duration such as 90s, 45m, 11.5h or 2d. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)([smhd])\s*", text)
    if match is None or not 0 < float(match[1]) * _UNIT_SEC[match[2]] < _MAX_SEC:
        raise ValueError(f"{text!r:.60} is not a time limit; write for example 90s, 45m, 11.5h or 2d")
    return float(match[1]) * _UNIT_SEC[match[2]]


def split_names(text: str) -> list[str]:
    """Names separated by commas; for `Parsed`."""
    return [part.strip() for part in text.split(",")]


class IntRanges(click.ParamType):
    """Numbers and inclusive ranges, such as 0-63 or 0,5,10-12, as a tuple of ints in the order written."""

    name = "ranges"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        numbers: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
            if match is None:
                example = "write for example 0-63 or 0,5,10-12"
                self.fail(f"{part!r:.60} is neither a number nor a range; {example}", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"the range {part.strip()} runs backwards", param, ctx)
            if len(numbers) + last + 1 - first > _MAX_NUMBERS:
                self.fail(f"{value!r:.60} names more than {_MAX_NUMBERS} numbers; give fewer at a time", param, ctx)
            numbers.extend(range(first, last + 1))
        return tuple(numbers)


def check_output(path: Path, kind: str) -> None:
    """Raise ValueError if `path` cannot be written, or holds anything but a file of `kind`, a key of OUTPUT_KINDS.

    Call it before the work: a mistake in a name should neither cost a file nor hours.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or pipe; give the name of a file")
    if path.exists() and os.path.getsize(path):
        try:
            fits = OUTPUT_KINDS[kind](path)
        except (OSError, ValueError, zipfile.BadZipFile):
            fits = False
        if not fits:
            raise ValueError(f"{path} exists and is not a {kind}; delete it, or choose another name")
    check_writable(path.absolute().parent)


def check_without_images(folder: Path) -> None:
    """Raise ValueError if `folder` holds images, other than sheets, or a data set, to which a command would add."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            is_image = entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.name[0] != "."
            if entry.name == LABELS_FILE or (is_image and not OUTPUT_KINDS["contact sheet"](Path(entry.path))):
                raise ValueError(
                    f"{folder} holds other images ({entry.name}); choose a folder of its own for the new ones"
                )


def check_writable(folder: Path) -> None:
    """Raise ValueError if files cannot be written to `folder`, or it cannot be created."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not existing.exists():
        raise ValueError(f"{folder} cannot be created: {existing} is a link to nowhere; remove that link")
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be created: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} is not writable; choose another folder, or change its permissions")
