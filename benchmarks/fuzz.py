"""Damaged files for every parser: whatever is in a file, it is read or refused in one line.

    python -m benchmarks.fuzz --inputs 1000000 --parser labels

Valid files are the seeds; each input is one of them with a few random changes. tests/test_parsers.py uses hypothesis.
"""

import contextlib
import json
import os
import random
import signal
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import fuzz_data, fuzz_records, fuzz_settings, fuzz_weights, harness
from benchmarks.fuzz_inputs import Change, Parser, outcome
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.files import provenance

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LIMIT_SEC = 20  # of CPU time for one input
LIMIT_BYTES = 4 << 30  # of memory, on top of what the process has at the start
PARSERS: Mapping[str, Parser] = {
    **fuzz_weights.PARSERS,
    **fuzz_data.PARSERS,
    **fuzz_settings.PARSERS,
    **fuzz_records.PARSERS,
}
_IN_MEMORY = Path("/dev/shm")  # files on a disk took ten times as long as most parsers
_SAVED_EVERY = 100_000  # inputs


@click.command(cls=cli.Command)
@click.option("--parser", "names", metavar="NAME", type=click.Choice(list(PARSERS)), multiple=True, help="Only these")
@click.option("--inputs", metavar="N", type=cli.AtLeast(int, 1), default=1_000_000, help="Inputs per parser")
@click.option("--max-sec", metavar="SEC", type=cli.AtLeast(float, 0), default=3600.0, help="Time per parser, at most")
@click.option("--seed", metavar="N", type=int, default=0, help="Seed of the changes")
@click.option("--add", is_flag=True, help="Add to the record, with the seeds after those in it")
@harness.out_option
def main(names: tuple[str, ...], inputs: int, max_sec: float, seed: int, add: bool, out: Path) -> None:
    """Feed damaged files to every parser; writes fuzz.json with the number of inputs and outcomes.

    With --add, every call feeds other inputs, and the record holds the sums. It is saved after 100,000 inputs each.

    The exit code is 1 if an input is neither read nor refused in one line; the record then holds the first ones.
    """
    torch.set_num_threads(1)
    path = out / "fuzz.json"
    record = json.loads(path.read_text()) if path.exists() else {"job": "fuzz", "parsers": {}}
    for name in names or PARSERS:
        found = record["parsers"].get(name) if add else None
        left, ends = inputs, time.monotonic() + max_sec
        while left > 0:
            part = run(name, min(left, _SAVED_EVERY), ends - time.monotonic(), found["seed"] + 1 if found else seed)
            found = harness.added(found, part) if found else part
            record["parsers"][name] = found
            record |= {"command": harness.command(), "limit_sec": LIMIT_SEC, **provenance()}
            harness.save(record, out)
            left -= part["inputs"]
            if time.monotonic() > ends:
                break
        click.echo(
            f"{name}: {found['inputs']} inputs, {found['read']} read, {len(found['failures'])} kinds of failures"
        )
    if any(found["failures"] for found in record["parsers"].values()):
        raise ValueError(f"some inputs are neither read nor refused in one line; see {path}")


def run(name: str, inputs: int, max_sec: float, seed: int) -> dict[str, Any]:
    """The outcomes of random inputs for a parser: counts, and the first input of each kind of failure."""
    rng, parser = random.Random(f"{name} {seed}"), PARSERS[name]
    counts: Counter[str] = Counter()
    failures: dict[str, dict[str, str]] = {}
    slowest_sec, started = 0.0, time.monotonic()
    in_memory = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=in_memory) as name_of_folder, _limits():
        folder = Path(name_of_folder)
        seeds = parser.seeds(folder)
        outcome(parser, parser.input_of(seeds[0], []), folder)  # what torch imports at its first use is not timed
        for _ in range(inputs):
            if counts and time.monotonic() - started > max_sec:  # at least one, so that every call gets on
                break
            changes = [
                Change(rng.randrange(12), rng.randrange(1 << 20), rng.randrange(1 << 16))
                for _ in range(rng.choice((1, 1, 1, 2, 3, 8)))
            ]
            data = parser.input_of(rng.choice(seeds), changes)
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LIMIT_SEC)
            try:
                counts[outcome(parser, data, folder)] += 1
            except (Exception, _TooSlow) as error:
                counts["failed"] += 1
                kind = f"{type(error).__name__}: {error!s:.120}"
                failures.setdefault(kind, {"kind": kind, "input": data[:4000].hex()})
            slowest_sec = max(slowest_sec, time.process_time() - begin)
    return {
        "inputs": counts.total(),
        "read": counts["read"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        "failures": list(failures.values())[:20],
        "slowest_sec": round(slowest_sec, 3),
        "elapsed_sec": round(time.monotonic() - started, 1),
        "seed": seed,
    }


class _TooSlow(BaseException):  # not an Exception: parsers catch those
    """An input took longer than LIMIT_SEC."""


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Inside, an input that takes too long or too much memory is an error, and warnings are not printed."""

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise _TooSlow(f"more than {LIMIT_SEC} s of CPU time")

    sizes = Path("/proc/self/statm")
    limited = resource is not None and sizes.exists()
    former, former_bytes = signal.signal(signal.SIGPROF, ring), (-1, -1)
    if limited:
        former_bytes = resource.getrlimit(resource.RLIMIT_AS)
        held = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT_BYTES, former_bytes[1]))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, former_bytes)


if __name__ == "__main__":
    main()
