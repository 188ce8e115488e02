"""The driver's side of tests/faults/server.py."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.faults.breaking import Fault
from tests.support import ROOT

LIMIT_SEC = 120.0  # a command that takes longer hangs; all take a second or two on a quiet machine
ORPHANS_SEC = 60.0  # for processes that outlive the one that started them


@dataclass(frozen=True)
class Job:
    """A command line of one process or of several ranks, which an agent like torchrun's starts if `agent` is set."""

    command: str
    arguments: tuple[str, ...]
    ranks: int = 1
    agent: bool = False


@dataclass(frozen=True)
class Ending:
    """How a job ended: exit codes of its processes (negative for signals) by rank, and everything that they printed."""

    codes: tuple[int, ...]
    text: str
    seconds: float
    timed_out: bool
    left_over: int

    @property
    def succeeded(self) -> bool:
        return not any(self.codes) and not self.timed_out

    @property
    def killed(self) -> bool:
        """Whether a signal ended a process, so that it could say nothing."""
        return any(code < 0 for code in self.codes)


class Server:
    """A process that forks commands. A context manager."""

    def __init__(self, commands: Iterable[str]):
        self.commands = list(commands)

    def __enter__(self) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", *self.commands],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if error is not None:
            self._process.kill()
        self._process.wait()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server of forks has ended"
        return json.loads(line)

    def run(self, folder: Path, jobs: Sequence[Job], fault: Fault | None = None, count: bool = False) -> list[Ending]:
        """Run `jobs` in `folder` at the same time, the first of them with `fault`."""
        logs = folder.with_name(f"{folder.name}.log")
        for old in logs.parent.glob(f"{logs.name}.*"):
            old.unlink()
        request = {
            "folder": str(folder),
            "logs": str(logs),
            "jobs": [dataclasses.asdict(job) for job in jobs],
            "fault": dataclasses.asdict(fault or Fault("none")),
            "count": count,
            "limit_sec": LIMIT_SEC,
            "orphans_sec": ORPHANS_SEC,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        endings = []
        for number in range(len(jobs)):
            codes = [code for key, code in sorted(answer["codes"].items()) if key.startswith(f"{number}.")]
            files = sorted(logs.parent.glob(f"{logs.name}.{number}.*"))
            text = "".join(file.read_text(errors="replace") for file in files)
            endings.append(Ending(tuple(codes), text, answer["seconds"], answer["timed_out"], answer["left_over"]))
        return endings

    def count_events(self, folder: Path, job: Job) -> tuple[Ending, list[int]]:
        """Run a job without a fault; its ending, and the number of events of each rank."""
        (ending,) = self.run(folder, [job], count=True)
        files = [folder.with_name(f"{folder.name}.log.events.{rank}") for rank in range(job.ranks)]
        return ending, [int(file.read_text()) for file in files if file.exists()]
