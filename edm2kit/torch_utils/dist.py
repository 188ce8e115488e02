"""The process group, and everything that depends on the rank."""

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
import torch.distributed
from tqdm import tqdm

_SHARED = "raised_on_every_rank"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_LOG_INTERVAL_SEC = 30  # between two lines of a progress bar in a file


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is cuda (the GPU of this process), else mps, else cpu.

    Raises ValueError if the device is not available, listing those that are.
    """
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in kinds if kinds[kind]]
    name = available[0] if name == "auto" else name
    kind, colon, number = name.partition(":")
    if kind not in available or (colon and not number.isdecimal()):
        raise ValueError(f"--device {name}: not available here; use one of auto, {', '.join(available)}")
    if name == "cuda":
        from edm2kit.torch_utils.launchers import slurm_hides_other_gpus

        name = "cuda:0" if slurm_hides_other_gpus() else f"cuda:{env_int('LOCAL_RANK', 0)}"
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s); start one process per GPU "
            "(torchrun --nproc-per-node)"
        )
    return torch.device(name)


def env_int(name: str, default: int) -> int:
    """The number in an environment variable such as those of torchrun. Raises ValueError that names the variable."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r:.60}; expected a number. Correct or unset it")
    return int(text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the host has no memory left."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    # the CPU, Apple GPUs, cuBLAS and mmap raise general errors
    texts = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in texts)


DEFAULT_TIMEOUT_SEC = 1800.0
_had_group = False
_lost_output: OSError | None = None
_tf32_wanted = False
_timeout_sec: float | None = None  # as the user asked
_num_meetings = 0  # how often this rank has come to a point where all ranks meet


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Inside, no wait for another process lasts longer; without it, 30 minutes (see `timeout_sec`)."""
    global _timeout_sec
    before, _timeout_sec = _timeout_sec, seconds
    try:
        yield
    finally:
        _timeout_sec = before


def timeout_sec(default_sec: float = DEFAULT_TIMEOUT_SEC) -> float:
    """How long to wait for another process: what `waiting_at_most` says, else `default_sec`."""
    return default_sec if _timeout_sec is None else _timeout_sec


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Inside, sessions compute float32 on CUDA with the 10-bit mantissa of TF32: faster, errors of 1e-3."""
    global _tf32_wanted
    before, _tf32_wanted = _tf32_wanted, True
    try:
        yield
    finally:
        _tf32_wanted = before


@contextlib.contextmanager
def _float32_means_float32() -> Iterator[None]:
    """Switch TF32 off, which torch uses in convolutions by default, or on if it is wanted."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = _tf32_wanted
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, operations give the same bits each time on the same GPU, or raise RuntimeError; CPUs always do."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def repeats_bits(device: torch.device) -> bool:
    """Whether a repeated or resumed command is promised to give the same bits: on a CPU, and with `deterministic()`.

    Then nothing that changes rounding may depend on measured times or free memory, which differ from run to run.
    """
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def had_group() -> bool:
    """Whether this process has ever been part of a process group."""
    return _had_group


def output_error(probe: bool = False) -> OSError | None:
    """Why something is missing in standard output; None if nothing is. An unbuffered one is tried if `probe` is set."""
    global _lost_output
    try:
        if probe and getattr(sys.stdout, "write_through", False):
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        _lost_output = error
    except (ValueError, AttributeError):  # closed by this process, or None
        pass
    return _lost_output


def exit_process(code: int) -> None:
    """End this process with `code`; if it was part of a process group, at once, after flushing its output.

    If the disk of standard output is full, says so and makes 0 a 1: somebody may take the output for complete. Gloo's
    threads outlive the group. If one of them still frees a tensor while the interpreter shuts down, the process
    aborts (exit code -6 in about one of 30 runs on a busy machine, torch 2.13).
    """
    error = output_error()
    if error is not None:
        _discard(sys.stdout)
        if error.errno != errno.EPIPE:  # a reader that has gone does not miss anything
            _say(f"Error: standard output cannot be written ({error.strerror})\n", sys.stderr)
            code = code or 1
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        _discard(sys.stderr)
    if had_group():
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def session(device: str = "auto", timeout_minutes: float = DEFAULT_TIMEOUT_SEC / 60) -> Iterator[torch.device]:
    """Join the process group if torchrun, srun or mpirun started this process; leave it at the end. Yields the device.

    CPU tensors are exchanged over gloo, CUDA tensors over nccl. An error leaves the group without a farewell, which
    would wait for ranks that wait for this one: the caller should report it and call `exit_process`. Inside, float32 is
    float32 on a GPU as well, unless `tf32()` is active. A missing rank is named after a minute; ValueError after
    `timeout_minutes` (or what `waiting_at_most` says), and as `pick_device`.

    Example: `with session("auto") as device: net.to(device)`
    """
    with _launched(), _float32_means_float32():
        picked = pick_device(device)
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        else:
            _keep_freed_memory()
        if env_int("WORLD_SIZE", 1) > 1 and not torch.distributed.is_initialized():
            yield from _in_group(picked, timeout_sec(timeout_minutes * 60))
        else:
            yield picked


def _keep_freed_memory() -> None:
    """Keep memory that tensors free: to ask the system for it again takes up to a fifth of the time on a CPU.

    Does nothing if the user has set MALLOC_ variables, or if the C library is not glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    # no block below 32 MiB (the largest value allowed) is mapped by itself; up to 1 GiB stays at the end of the heap
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20)):
            ctypes.CDLL(None).mallopt(option, value)


def _launched() -> contextlib.AbstractContextManager[None]:
    if "WORLD_SIZE" in os.environ or not os.environ.keys() & {"SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}:
        return contextlib.nullcontext()  # torchrun, or a single process
    from edm2kit.torch_utils import launchers

    return launchers.as_torchrun()


def _in_group(picked: torch.device, limit_sec: float) -> Iterator[torch.device]:
    global _had_group
    from edm2kit.torch_utils.heartbeat import has_timed_out, is_first_to_report, is_of_group, reason_of_loss, watching
    from edm2kit.torch_utils.meeting import check_variables, group_arguments

    check_variables()
    own_rank, size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"

    def say(text: str) -> None:
        _say(f"Warning: {one_line(text)} (gives up after {limit_sec:.0f} s; see --timeout)\n", sys.stderr)

    with watching(own_rank, size, lambda: _num_meetings, say) as late_ranks:
        try:
            torch.distributed.init_process_group(backend, **group_arguments(limit_sec))
            _had_group = True
            yield picked
        except (ValueError, OSError) as error:
            if _had_group and not is_first_to_report(str(error)):
                raise ReportedElsewhere(str(error)) from error
            raise
        except RuntimeError as error:
            if not is_of_group(error):
                raise
            late = late_ranks(limit_sec if has_timed_out(str(error)) else None)
            raise ValueError(reason_of_loss(str(error), late, limit_sec)) from error
    torch.distributed.destroy_process_group()


class ReportedElsewhere(ValueError):
    """An error with the same message as that of another rank, which reports it."""


def printable(text: str) -> str:
    """`text` with escapes for characters that control a terminal or cannot be printed, as names in files may."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Like `printable`, on one line and cut to 2000 characters, so that a name in a file cannot pose as output."""
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= 2000 else f"{line[:1500]} ... {line[-495:]}"


def print0(*args: object, everywhere: bool = False) -> None:
    """Print on rank 0 only, or `everywhere` that it is called, and flush."""
    if rank() == 0 or everywhere:
        _say(" ".join(printable(str(arg)) for arg in args) + "\n", sys.stdout)


def warn0(message: str, everywhere: bool = False) -> None:
    """Print a warning to standard error on rank 0 only, or `everywhere` that it is called."""
    if rank() == 0 or everywhere:
        _say(f"Warning: {one_line(message)}\n", sys.stderr)


def _say(text: str, stream: TextIO) -> None:
    """Write and flush. If nobody reads the stream any more, or its disk is full, the text is lost and work goes on."""
    global _lost_output
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _discard(stream)
    except (OSError, ValueError, AttributeError) as error:  # a full disk, a closed stream, or None under pythonw
        if isinstance(error, OSError) and stream is sys.stdout:
            _lost_output = error


def _discard(stream: TextIO) -> None:
    """Send the rest of the buffer, and all that follows, nowhere: Python would fail again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class _Unfailing:
    """A stream in which text may be lost, but no write fails, for the progress bars of work that goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str = "") -> None:
        _say(text, self._stream)

    flush = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _meet() -> bool:
    """Count a point where all ranks meet; whether there are others to meet."""
    global _num_meetings
    _num_meetings += 1
    return world_size() > 1


def barrier() -> None:
    """Wait until every rank has reached this point."""
    if _meet():
        torch.distributed.barrier()


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` with its sum over all ranks, in place, and return it."""
    if _meet():
        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast_(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Replace `tensor` with that of rank `source`, in place, and return it."""
    if _meet():
        torch.distributed.broadcast(tensor, source)
    return tensor


def send_to_rank0(tensor: torch.Tensor | None, source: int, like: torch.Tensor) -> torch.Tensor | None:
    """The `tensor` of rank `source` on the CPU of rank 0, with the shape and layout of `like`; None on other ranks.

    Only rank `source` needs to pass a tensor.
    """
    _meet()
    if rank() == source:
        assert tensor is not None
        tensor = tensor.detach().cpu()
        if source == 0:
            return tensor
        torch.distributed.send(tensor.contiguous(), 0)
    elif rank() == 0:
        received = torch.empty(like.shape, dtype=like.dtype)
        torch.distributed.recv(received, source)
        return torch.empty_like(like, device="cpu").copy_(received)
    return None


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank, the same answer on every rank (a small CPU all-reduce)."""
    return bool(all_reduce_sum_(torch.tensor(int(flag))).item())


def broadcast_object(value: Any) -> Any:
    """The `value` of rank 0, on every rank. Any object that can be pickled; only data of rank 0 is unpickled."""
    if not _meet():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank."""
    if not _meet():
        return [value]
    box: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def gather_on_rank0(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on rank 0; an empty list on the others."""
    if not _meet():
        return [value]
    box: list[Any] | None = [None] * world_size() if rank() == 0 else None
    torch.distributed.gather_object(value, box, dst=0)
    return box or []


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error, so that no rank waits for the others forever.

    Each rank passes its own error or None. A rank without an error raises a ValueError with the first rank's message.
    """
    texts = gather_objects(None if error is None else str(error))
    first = next((text for text in texts if text is not None), None)
    if error is None and first is not None:
        error = ValueError(first)
    if error is not None:
        setattr(error, _SHARED, True)
        raise error


def is_shared(error: BaseException) -> bool:
    """Whether `error` was raised on every rank, so that they can still act together."""
    return getattr(error, _SHARED, False)


def on_rank0(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` on rank 0 only and return its result on every rank.

    The other ranks wait. If the call raises ValueError or OSError, every rank raises.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = function(*args)
        except (ValueError, OSError) as caught:
            error = caught
    raise_together(error)
    return broadcast_object(result)


def progress_bar(
    total: int | None,
    unit: str = "img",
    initial: int = 0,
    *,
    what: str | None = None,
    hidden: bool = False,
    scaled: bool = False,
) -> tqdm:
    """A progress bar on standard error, refreshed ten times a second on a terminal and every 30 seconds in a file.

    It counts `unit`s up to `total` (None if unknown), starting at `initial`, and is labelled `what`. `scaled` shows
    2500000 as 2.5M. `hidden` shows nothing.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        file=_Unfailing(sys.stderr),
        total=total,
        initial=initial,
        unit=unit,
        desc=what,
        unit_scale=scaled,
        disable=hidden or rank() != 0,
        dynamic_ncols=True,
        mininterval=0.1 if on_terminal else _LOG_INTERVAL_SEC,
        maxinterval=10 if on_terminal else 2 * _LOG_INTERVAL_SEC,
    )
