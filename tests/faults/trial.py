"""One trial: a fault in a command, the same command again, and what must hold after that."""

import random
import re
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.checkpoint import damage
from tests.faults.breaking import Fault
from tests.faults.families import Family, Variant, is_furniture, leftovers, results, written
from tests.faults.processes import Ending, Job, Server

# kinds that suit every job, then those for jobs with reading processes, ranks, and an agent
FOR_ALL = (
    "kill", "kill by processor time", "kill inside a write", "signal", "disk full", "file size limit",
    "input/output error", "results removed", "read-only", "closed output", "full output", "clock", "bit flip",
    "deleted file", "two jobs",
)  # fmt: skip
FOR_READERS = ("kill a reader", "stop a reader")
FOR_RANKS = ("kill", "stop", "disk full", "signal")
FOR_AGENTS = ("kill the agent",)
_BETWEEN = ("bit flip", "deleted file")  # done to the files, after a kill or a complete run
_LOSES_OUTPUT = ("closed output", "full output")
_AGAIN = 3  # how often the command is repeated at most
_FINAL_LINES = ("Error: ", "Aborted!", "Usage: ")
_LOG_LINE = re.compile(r"^[EWI]\d{4} .*$", re.MULTILINE)  # of torch's agent, which prints tracebacks of its own


@dataclass(frozen=True)
class Ready:
    """A variant of a family whose inputs are in `folder`; `expected` are its results without a fault.

    `events` is their number by rank, and `largest` the size of the largest file in bytes.
    """

    family: Family
    variant: Variant
    folder: Path
    expected: dict[str, str]
    events: Sequence[int]
    largest: int


@dataclass
class Verdict:
    """What a trial showed, and the `problems` that break a promise.

    An outcome is "equal", or, if a file was damaged or deleted: "refused" by the command, "found when read" later,
    "unnoticed" in a file without a checksum, or "stays deleted".
    """

    kind: str
    variant: str
    fault: Fault
    outcome: str = "equal"
    problems: list[str] = field(default_factory=list)


def get_ready(family: Family, variant: Variant, inputs: Path, place: Path, server: Server) -> Ready:
    """Run a variant without a fault, and keep its results."""
    with _copied(inputs, place) as folder:
        ending, events = server.count_events(folder, variant.job)
        assert ending.succeeded, f"{family.name}, {variant.name}: {ending.text}"
        largest = max(path.stat().st_size for path in written(folder))
        return Ready(family, variant, inputs, results(folder), events, largest)


@contextmanager
def _copied(inputs: Path, place: Path) -> Iterator[Path]:
    """A folder with copies of the inputs, as old as they are."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(inputs, place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def kinds_of(variant: Variant) -> list[str]:
    """The kinds of faults that suit a variant."""
    job = variant.job
    if job.ranks == 1:
        return [*FOR_ALL, *(FOR_READERS if variant.readers else ())]
    return [*FOR_RANKS, *(FOR_READERS if variant.readers else ()), *(FOR_AGENTS if job.agent else ())]


def plan(family: Family, count: int, seed: int) -> list[tuple[Variant, str, random.Random]]:
    """`count` trials that take turns among variants and kinds; each has random numbers of its own."""
    pairs = [(variant, kind) for variant in family.variants for kind in kinds_of(variant)]
    order = random.Random(f"{family.name} {seed}")
    trials: list[tuple[Variant, str, random.Random]] = []
    while len(trials) < count:
        order.shuffle(pairs)
        trials += [
            (variant, kind, random.Random(f"{family.name} {seed} {len(trials) + k}"))
            for k, (variant, kind) in enumerate(pairs)
        ]
    return trials[:count]


def draw(kind: str, ready: Ready, rng: random.Random) -> Fault:
    """A random fault of a kind."""
    rank = rng.randrange(len(ready.events)) if ready.variant.job.ranks > 1 else 0
    at = rng.randint(1, max(ready.events[rank], 1))
    number = 0
    match kind:
        case "signal":
            number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
        case "kill by processor time":
            number = int(rng.uniform(0, 0.5e6 if ready.variant.job.command == "train" else 0.15e6))
        case "kill inside a write" | "file size limit":
            number = int(ready.largest * rng.random() ** 3)  # small files, too
        case "closed output" | "full output":
            number = rng.choice((1, 2, 3))
        case _:
            number = rng.randrange(1 << 16)
    if kind in _BETWEEN:
        return Fault(rng.choice(("kill", "none")), at, number, rank)
    if kind == "two jobs":
        return Fault(rng.choice(("kill", "none", "signal")), at, signal.SIGTERM, rank)
    return Fault(kind, at, number, rank)


def attempt(ready: Ready, kind: str, rng: random.Random, place: Path, server: Server) -> Verdict:
    """Carry out one trial in a new folder `place`."""
    fault = draw(kind, ready, rng)
    verdict = Verdict(kind, ready.variant.name, fault)
    job = _patient(ready.variant.job, kind)
    with _copied(ready.folder, place) as folder:
        with _prepared(folder, kind):
            endings = server.run(folder, [job] * (2 if kind == "two jobs" else 1), fault)
        for ending in endings:
            verdict.problems += _problems_of(ending, kind)
        stopped = any("state saved. Run the same command" in ending.text for ending in endings)  # as a signal asked
        if all(ending.succeeded for ending in endings) and kind != "results removed" and not stopped:
            verdict.problems += [f"success, but {text}" for text in _differences(ready, folder, kind)]
        broken = _break(folder, kind, rng) if kind in _BETWEEN else None
        _again(ready, folder, verdict, broken, server)
        verdict.problems += [f"{name} remains" for name in leftovers(folder) if verdict.outcome != "refused"]
    return verdict


def _patient(job: Job, kind: str) -> Job:
    """A job that soon gives up on a process that is stopped."""
    if not kind.startswith("stop"):
        return job
    at = job.arguments.index("--timeout") + 1
    words = (*job.arguments[:at], "3s", *job.arguments[at + 1 :])
    return Job(job.command, words, job.ranks, job.agent)


@contextmanager
def _prepared(folder: Path, kind: str) -> Iterator[None]:
    """Inside, the folder cannot be written to if the kind is "read-only"."""
    if kind == "read-only":
        folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def _problems_of(ending: Ending, kind: str) -> list[str]:
    """What is wrong with the way a command ended."""
    text = _LOG_LINE.sub("", ending.text)
    found = []
    if ending.timed_out:
        found.append(f"hangs: {text[text.find('Fatal Python error') :][:1500]}")
    if ending.left_over:
        found.append(f"{ending.left_over} processes remain")
    if "Traceback (most recent call last)" in text:
        found.append(f"traceback: {(text.strip().splitlines() or [''])[-1]:.300}")
    # a limit on the size of files holds for the file that the output goes to
    silent = kind in (*_LOSES_OUTPUT, "kill the agent", "file size limit")
    if not (ending.succeeded or ending.killed or silent or ending.timed_out) and not _has_reason(text, kind):
        found.append(f"exit codes {ending.codes} without a reason: {text[-300:]!r}")
    return found


_FAILED_WRITES = ("disk full", "file size limit", "input/output error")


def _has_reason(text: str, kind: str) -> bool:
    if any(line.startswith(_FINAL_LINES) for line in text.splitlines()):
        return True
    return kind in ("signal", "two jobs")  # which the user has sent


def _differences(ready: Ready, folder: Path, kind: str) -> list[str]:
    """How the results differ from those without a fault."""
    try:
        found = results(folder)
    except Exception as error:  # whatever reading a damaged file raises
        return [f"a result cannot be read: {type(error).__name__}: {error!s:.200}"]
    if kind == "two jobs" and ready.family.is_shared:
        return [f"{name} is missing" for name in ready.expected if "/" not in name[4:] and name not in found]
    changed = [name for name in ready.expected if found.get(name) != ready.expected[name]]
    if kind in _FAILED_WRITES:  # training goes on without a sheet of samples, and warns
        changed = [name for name in changed if name in found or "samples-" not in name]
    extra = [name for name in found if name not in ready.expected and not name.endswith(".pt")]
    return [
        *(f"{name} {'differs' if name in found else 'is missing'}" for name in changed),
        *(f"{name} is too many" for name in extra),
    ]


def _break(folder: Path, kind: str, rng: random.Random) -> Path | None:
    """Flip a bit of a file that a command wrote, or delete it; which one."""
    files = [path for path in written(folder) if path.stat().st_size and not is_furniture(path)]
    if not files:
        return None
    path = rng.choice(files)
    if kind == "deleted file":
        path.unlink()
        return path
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path


def _again(ready: Ready, folder: Path, verdict: Verdict, broken: Path | None, server: Server) -> None:
    """Run the same command until it succeeds, and compare its results."""
    for _ in range(_AGAIN):
        (ending,) = server.run(folder, [ready.variant.job])
        verdict.problems += _problems_of(ending, "again")
        if ending.succeeded:
            break
    else:
        reason = (ending.text.strip().splitlines() or [""])[-1]
        if (broken is not None or verdict.kind == "results removed") and reason.startswith("Error: "):
            verdict.outcome = "refused"
        else:
            verdict.problems.append(f"does not continue: {reason:.300}")
        return
    wrong = _differences(ready, folder, verdict.kind)
    if broken is None or not wrong:
        verdict.problems += wrong
        return
    name = broken.relative_to(folder).as_posix()
    if wrong not in ([f"{name} differs"], [f"{name} is missing"]) and not wrong[0].startswith("a result cannot"):
        verdict.problems += wrong
    elif not broken.exists():
        verdict.outcome = "stays deleted"
        if broken.suffix not in ready.family.lasting:
            verdict.problems.append(f"{name} was deleted and is not made again")
    elif is_refused(broken):
        verdict.outcome = "found when read"
    else:
        verdict.outcome = "unnoticed"
        if broken.suffix not in ready.family.unchecked:
            verdict.problems.append(f"a bit of {name} was flipped, and nobody notices")


def is_refused(path: Path) -> bool:
    """Whether reading a damaged file fails."""
    read = _READERS.get(path.suffix)
    if read is None:
        return False
    try:
        read(path)
    except Exception:  # libraries raise a dozen types of errors for damaged files
        return True
    return False


def _read_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("wrong checksum")


def _read_arrays(path: Path) -> None:
    with np.load(path) as file:
        for name in file:
            file[name]


def _read_snapshot(path: Path) -> None:
    load_snapshot(path)


def _read_checkpoint(path: Path) -> None:
    if reason := damage(path):
        raise ValueError(reason)


_READERS: dict[str, Callable[[Path], None]] = {
    ".pt": _read_checkpoint,
    ".png": _read_picture,
    ".zip": _read_zip,
    ".npz": _read_arrays,
    ".safetensors": _read_snapshot,
}
