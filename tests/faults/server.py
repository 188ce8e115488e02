"""Runs commands in processes forked from this one, which has imported everything: 0.1 s to start instead of 5 s.

    python -m tests.faults.server train generate

It reads requests, one JSON object per line, from standard input, and answers each by a line on standard output.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from tests.faults.breaking import Fault, children_of, install

# imported by torch when a command needs them, which takes it half a second
_LATE = (
    "sympy", "torch._dynamo", "torch._meta_registrations", "torch.fx.experimental.symbolic_shapes", "numpy.ma",
    "numpy.random", "PIL.PngImagePlugin", "multiprocessing.popen_fork", "multiprocessing.synchronize",
    "multiprocessing.sharedctypes",
)  # fmt: skip
# name -> module of its click command, words in front of its arguments, and what else it imports when it runs
COMMANDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "train": ("edm2kit.cli.train", (), ("torch.nn.parallel", "edm2kit.training.sharding")),
    "generate": ("edm2kit.cli.generate", (), ()),
    "dataset": ("edm2kit.cli.dataset", (), ()),
    "latents": ("edm2kit.cli.dataset", (), ("diffusers.models.autoencoders.autoencoder_kl",)),
    "metrics": ("edm2kit.cli.metrics", (), ("edm2kit.metrics.detectors.random_features", "scipy.linalg")),
    "reconstruct": ("edm2kit.cli.phema", (), ()),
    "tune": (
        "edm2kit.cli.tune",
        (),
        ("optuna.storages._rdb.storage", "sqlalchemy.dialects.sqlite.pysqlite", "alembic.command"),
    ),
}
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # prctl: what a child gets when its parent dies; orphans become children
_LOOK_SEC = 0.01


def main() -> None:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        module, _, more = COMMANDS[name]
        for wanted in (module, *more, *_LATE):
            importlib.import_module(wanted)
    import torch

    from edm2kit.torch_utils.files import code_commit
    from edm2kit.training import log

    log.activation_bytes = lambda *arguments: 0  # the forecast of memory would take a third of the time

    torch.set_num_threads(1)
    code_commit()  # asks git, once for all
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of the objects that it looks at
    print(json.dumps("ready"), file=answers, flush=True)
    for line in requests:
        print(json.dumps(_answer(json.loads(line), answers)), file=answers, flush=True)


def _answer(request: dict[str, Any], answers: Any) -> dict[str, Any]:
    """Run the jobs of a request side by side to their ends."""
    limit, began = request["limit_sec"], time.monotonic()
    running: dict[int, tuple[int, int]] = {}  # process -> job, rank
    for number, job in enumerate(request["jobs"]):
        agent = job["ranks"] > 1 and job["agent"]
        port = _free_port()
        for rank in range(1 if agent else job["ranks"]):
            pid = os.fork()
            if pid == 0:
                answers.close()
                _child(request, number, job, rank, port, agent)
            running[pid] = (number, rank)
    codes: dict[str, int] = {}
    timed_out = False
    while running:
        _reap(running, codes)
        if running and time.monotonic() - began > limit:
            for pid in running:
                _end(pid, signal.SIGKILL if timed_out else signal.SIGABRT)  # the latter prints where it hangs
            timed_out, limit = True, limit + 5
        # a stopped process never ends; once the others of its job have, it is killed as its user would do
        for pid, (job_number, _) in list(running.items()):
            others = [one for one, (of, _) in running.items() if of == job_number and not _is_stopped(one)]
            if _is_stopped(pid) and not others:
                _end(pid)
        time.sleep(_LOOK_SEC)
    seconds = time.monotonic() - began
    left = _wait_for_orphans(request["orphans_sec"])
    return {"codes": codes, "seconds": seconds, "timed_out": timed_out, "left_over": left}


def _reap(running: dict[int, tuple[int, int]], codes: dict[str, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in running:
            number, rank = running.pop(pid)
            codes[f"{number}.{rank}"] = os.waitstatus_to_exitcode(status)


def _wait_for_orphans(most_sec: float) -> int:
    """Wait for processes whose parents have died; kill what is left, and return its number."""
    until = time.monotonic() + most_sec
    while time.monotonic() < until:
        _reap({}, {})
        alive = children_of(os.getpid())
        if not alive:
            return 0
        for pid in alive:
            if _is_stopped(pid):
                _end(pid)
        time.sleep(_LOOK_SEC)
    left = children_of(os.getpid())
    while children := children_of(os.getpid()):
        for pid in children:
            _end(pid)
        _reap({}, {})
        time.sleep(_LOOK_SEC)
    return len(left)


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _end(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _child(request: dict[str, Any], number: int, job: dict[str, Any], rank: int, port: int, agent: bool) -> None:
    """Become one process of a job; does not return."""
    os.chdir(request["folder"])
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    log = os.open(f"{request['logs']}.{number}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(nothing)
    os.close(log)
    faulthandler.enable(file=os.dup(2))
    if agent:
        _leave(_with_agent(request, number, job))
    if job["ranks"] > 1:
        ranks = str(job["ranks"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )  # fmt: skip
    _leave(_work(request, number, job, rank))


def _leave(code: int) -> None:
    """End this process as the interpreter does, but without taking all modules apart, which takes half a second."""
    threading._shutdown()  # waits for threads, and calls what concurrent.futures has registered
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


def _with_agent(request: dict[str, Any], number: int, job: dict[str, Any]) -> int:
    """Be the agent that torchrun is, whose ranks are forks of it; the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    agent = os.getpid()
    os.register_at_fork(after_in_child=lambda: _become_rank() if os.getppid() == agent else None)
    config = LaunchConfig(
        1, 1, job["ranks"], run_id=f"faults-{agent}", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, _rank_of_agent)(request, number, job, agent)
    except ChildFailedError as error:  # torchrun prints a table of exit codes here
        print(f"Error: {type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _become_rank() -> None:
    """Leave behind what torchrun's processes, which are not forks, do not have of their agent: handlers and sockets."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.dup2(nothing, int(name))


def _rank_of_agent(request: dict[str, Any], number: int, job: dict[str, Any], agent: int) -> None:
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, 0, 0, 0, 0)  # torchrun's processes outlive it
    own, leave = os.getpid(), os._exit

    def leave_group(code: int) -> None:
        if os.getpid() != own or code:
            leave(code)
        raise _LeftError  # the agent waits for this function to return

    os._exit = leave_group
    try:
        code = _work(request, number, job, int(os.environ["RANK"]))
    except _LeftError:
        code = 0
    os._exit = leave
    if code:
        os._exit(code)

    def leave_with_agent() -> None:
        while os.getppid() == agent:
            time.sleep(_LOOK_SEC)
        os._exit(0)

    # torch waits for the agent to read what this function returns, for ever if it has died
    threading.Thread(target=leave_with_agent, daemon=True).start()


class _LeftError(BaseException):
    """A rank is done."""


def _work(request: dict[str, Any], number: int, job: dict[str, Any], rank: int) -> int:
    """Run the command in this process; its exit code."""
    module, words, _ = COMMANDS[job["command"]]
    arguments = [*words, *job["arguments"]]
    sys.argv = [job["command"], *arguments]
    fault = Fault(**request["fault"])
    mine = number == 0 and rank == fault.rank
    count_in = f"{request['logs']}.events.{rank}" if request["count"] else None
    install(fault if mine else Fault("none"), request["folder"], count_in)
    code: Any = 0
    try:
        importlib.import_module(module).main.main(args=arguments, prog_name=job["command"])
    except SystemExit as leaving:
        code = leaving.code
    except _LeftError:
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    main()
