"""What the command lines share: option types, and errors told in one line."""

import os
import re
from typing import Any

import click

from edm2kit.torch_utils import dist

_SUFFIX = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class _Exiting(click.Command):
    """A command that ends its process through `dist.exit_process`."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as leaving:
            if isinstance(leaving.code, int | None):
                dist.exit_process(leaving.code or 0)
            raise


class Command(_Exiting):
    """A command whose ValueError and OSError become one line and exit code 1; of ranks that say the same, one speaks.

    Set EDM2_TRACEBACK=1 to see the whole traceback instead.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if os.environ.get("EDM2_TRACEBACK") == "1":
                raise
            if isinstance(error, dist.SaidElsewhere):
                raise click.exceptions.Exit(1) from error
            raise click.ClickException(str(error)) from error


class Group(_Exiting, click.Group):
    """A group of such commands."""

    command_class = Command


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


class FloatSeries(click.ParamType):
    """Numbers such as 0.05,0.1 or, with the middle filled in, 0.01,0.02,...,0.25, as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        parts = [part.strip() for part in value.split(",")]
        numbers: list[float] = []
        for index, part in enumerate(parts):
            if part != "...":
                try:
                    numbers.append(float(part))
                except ValueError:
                    self.fail(f"{part!r} is not a number", param, ctx)
                continue
            if len(numbers) < 2 or index != len(parts) - 2:
                self.fail(
                    "'...' goes between two numbers that set the step and the last one: 0.01,0.02,...,0.25", param, ctx
                )
            numbers.extend(self._fill(numbers[-2], numbers[-1], parts[-1], param, ctx))
        return tuple(numbers)

    def _fill(
        self, before: float, start: float, last: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[float]:
        step = start - before
        try:
            gaps = (float(last) - start) / step
        except (ValueError, ZeroDivisionError):
            self.fail(f"cannot fill in from {before}, {start} to {last!r}", param, ctx)
        if gaps < 1 or abs(gaps - round(gaps)) > 1e-6:
            self.fail(f"{last} is not reached from {start} in steps of {step:g}", param, ctx)
        # rounding keeps 0.03 from becoming 0.030000000000000002 in file names and records
        return [round(start + step * k, 10) for k in range(1, round(gaps))]
