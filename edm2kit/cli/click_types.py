"""What all commands share: one-line errors, --help in sections, types of option values."""

import contextlib
import os
import re
import signal
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

from edm2kit.torch_utils import dist

Decorator = Callable[[Any], Any]  # what click.option returns

OTHER = "Other"  # the last section of --help: options without a section, and --help itself
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
_SUFFIX = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class _Base(click.Command):
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
        super().__init__(name, context_settings={**_CONTEXT, **(context_settings or {})}, **kwargs)
        self.sections = sections
        self.unlisted = unlisted

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as leaving:
            if isinstance(leaving.code, int | None):
                dist.exit_process(leaving.code or 0)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in self.sections}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is None or parameter.name in self.unlisted:
                continue
            title = getattr(parameter, "section", OTHER)
            sections.setdefault(title, []).append(line)
        last = sections.pop(OTHER, [])
        filled = [(title, lines) for title, lines in sections.items() if lines]
        last_title = OTHER if filled else "Options"
        filled.append((last_title, last))
        for title, lines in filled:
            with formatter.section(title):
                formatter.write_dl(lines, col_max=26)


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
            if isinstance(error, dist.ReportedElsewhere):
                raise click.exceptions.Exit(1) from error
            raise click.ClickException(str(error)) from error


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
    """Several click options as one decorator; --help lists them in this order, under `title`.

    @click.command(cls=Command)
    @section("Input", click.option("--net"), click.option("--data"))
    @section("Output", click.option("--outdir"))
    def main(net, data, outdir): ...
    """

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
            command.__click_params__[-1].section = title
        return command

    return decorate


def printing_option(name: str, text: Callable[[Any], str], help: str, metavar: str | None = None) -> Decorator:
    """An option that prints `text(value)` and ends the command; a flag unless it has a metavar."""

    def show(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(text(value))
            ctx.exit()

    return click.option(
        name, metavar=metavar, is_flag=metavar is None, is_eager=True, expose_value=False, callback=show, help=help
    )


def device_option() -> Decorator:
    """--device, the same for all commands."""
    return click.option("--device", metavar="NAME", default="auto", help="auto, cuda, mps or cpu")


def given_options(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take those of `names` out of `options` that were given a value on the command line."""
    taken = {name: options.pop(name) for name in names}
    return {name: value for name, value in taken.items() if value is not None}


class Size(click.ParamType):
    """A count such as 4096, 128Ki, 8Mi or 1Gi (powers of 1024), as an int."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi)?", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a count; write for example 4096, 128Ki, 8Mi or 1Gi", param, ctx)
        count = float(match[1]) * _SUFFIX[match[2] or ""]
        if count != int(count):
            self.fail(f"{value!r} is {count}, not a whole number", param, ctx)
        return int(count)


class AtLeast(click.ParamType):
    """An int or a float of at least `low`; --help does not repeat the bound."""

    def __init__(self, kind: type[int] | type[float], low: float) -> None:
        self.kind, self.low = kind, low
        self.name = "n" if kind is int else "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is not {'a whole' if self.kind is int else 'a'} number", param, ctx)
        if not number >= self.low:
            self.fail(f"{value} is not at least {self.low}", param, ctx)
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
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if match is None:
                self.fail(f"{part!r} is neither a number nor a range; write for example 0-63 or 0,5,10-12", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"the range {part.strip()} runs backwards", param, ctx)
            numbers.extend(range(first, last + 1))
        return tuple(numbers)


class Interval(click.ParamType):
    """Two noise levels LO,HI as a pair of floats."""

    name = "lo,hi"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            lo, hi = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of noise levels; write for example 0.28,2.90 or 0.28,inf", param, ctx)
        if not 0 <= lo < hi:
            self.fail(f"{value} runs backwards; expected LO < HI, both from 0", param, ctx)
        return lo, hi


class FloatSeries(click.ParamType):
    """Numbers such as 0.05,0.1 or, with the middle filled in, 0.01,0.02,...,0.25, as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        parts = [part.strip() for part in value.split(",")]
        try:
            if "..." in parts:
                return _filled_in(parts)
            return tuple(_number(part) for part in parts)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _filled_in(parts: Sequence[str]) -> tuple[float, ...]:
    """The numbers that parts such as ["0.01", "0.02", "...", "0.25"] stand for."""
    *before, dots, last = parts
    if len(before) < 2 or dots != "..." or "..." in before:
        raise ValueError("'...' goes between two numbers that set the step and the last one: 0.01,0.02,...,0.25")
    numbers = [_number(part) for part in before]
    end = _number(last)
    start = numbers[-1]
    step = start - numbers[-2]
    gaps = (end - start) / step if step else 0.0
    count = round(gaps)
    if count < 1 or abs(gaps - count) > 1e-6:
        raise ValueError(f"{last} is not reached from {start} in steps of {step:g}")
    for k in range(1, count):
        # rounding keeps 0.03 from becoming 0.030000000000000002 in file names and records
        numbers.append(round(start + step * k, 10))
    return (*numbers, end)
