"""torch.compile and CUDA graphs for networks, and whether compiling pays for the rest of a run.

Compiled networks give the same results up to rounding, and the same bits each time on one machine.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from edm2kit.models.preconditioning import Preconditioner
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.cache import cache_folder
from edm2kit.torch_utils.files import atomic_write, hardware

COMPILE = ("auto", "on", "off", "graphs")  # values of --compile
BACKEND = "inductor"
RECORD_NAME = "compile-times.json"  # in the cache folder
MIN_CALLS = 500  # compiling has never paid for fewer
# until a machine has its own record: what a network of the size of EDM2-S takes on a GPU
_TYPICAL = {"seconds": 120.0, "gain": 1.3}


def compile_(net: Preconditioner, backend: str | None = None) -> Preconditioner:
    """Let torch.compile compile the raw network of a denoiser as one graph, for evaluation or training; returns it.

    The first call of every batch size takes minutes; later calls are faster. Calls with edits or with gradients by
    the input run uncompiled. Raises ValueError if this machine cannot compile for a CPU.
    """
    backend = backend or BACKEND
    first = next(itertools.chain(net.parameters(), net.buffers()))
    if backend == "inductor" and first.device.type == "cpu" and not can_compile():
        raise ValueError(
            "torch.compile needs a C++ compiler (g++) and Python's headers; install them, or use --compile off"
        )
    # torch advises to switch TF32 on; whether it is used is the user's choice (--tf32)
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    net.raw.compile(backend=backend, dynamic=False, fullgraph=True)
    return net


def is_compiled(net: Preconditioner) -> bool:
    """Whether calls of the raw network are compiled."""
    return net.raw._compiled_call_impl is not None


def can_compile() -> bool:
    """Whether torch.compile can work on this CPU: it needs a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    supported = sys.version_info < (3, 13) or torch.__version__ >= (2, 6)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return supported and shutil.which(compiler) is not None and headers.is_file()


def compile_if_it_pays_(
    nets: Sequence[Preconditioner], run: Callable[[], object], count: int, device: torch.device, what: str
) -> bool:
    """Compile `nets` if that shortens a run of `count` more calls of `run`, which calls each of them; reports it.

    The time of a call is measured. The time to compile and the gain are those last measured on this machine for such a
    network, or typical ones; the new ones are recorded in the cache folder. Networks that cannot be compiled, or are
    no faster compiled, stay as they were. `what` is "evaluation" or "training step". Returns whether they are compiled.
    """
    if count < MIN_CALLS or any(is_compiled(net) for net in nets):
        return False
    key = _key(nets, device, what)
    known = read_record().get(key, _TYPICAL)
    plain_sec = seconds_of(run, device)
    saved_sec = count * plain_sec * (1 - 1 / max(known["gain"], 1.0)) - known["seconds"]
    if saved_sec <= 0:
        return False
    dist.print0(
        f"Compiling the network, about {known['seconds']:.0f} s: {count} {what}s are left, {plain_sec:.3g} s each, and "
        f"some {saved_sec / 60:.0f} minutes to be saved. Results change by rounding only (--compile off: not at all)"
    )
    try:
        for net in nets:
            compile_(net)
        started = time.monotonic()
        run()
        _wait_for(device)
        compile_sec = time.monotonic() - started
        fast_sec = seconds_of(run, device)
    except Exception as error:  # any of the compiler's many errors
        _uncompile_(nets)
        if dist.is_out_of_memory(error):
            raise
        dist.warn0(f"torch.compile failed ({_first_line(error)}); the run goes on without it (--compile off)")
        return False
    write_record(key, compile_sec, plain_sec / fast_sec)
    if fast_sec >= plain_sec:
        _uncompile_(nets)
        dist.print0(f"Compiled in {compile_sec:.0f} s, but no faster; the run goes on without it")
        return False
    dist.print0(f"Compiled in {compile_sec:.0f} s; {plain_sec / fast_sec:.2f} times as fast")
    return True


def compile_for_images_(
    nets: Sequence[Preconditioner],
    shape: tuple[int, int, int],
    count: int,
    batch_size: int,
    num_steps: int,
    device: torch.device,
) -> bool:
    """Compile the networks if that pays for sampling `count` images of `shape`; whether they are compiled."""
    if all(is_compiled(net) for net in nets):
        return True
    size = max(min(batch_size, count), 1)
    x, sigma = torch.zeros([size, *shape], device=device), torch.ones(size, device=device)
    labels = {dim: torch.zeros(size, dim, device=device) for dim in {net.label_dim for net in nets}}

    @torch.no_grad()
    def evaluate() -> None:
        for net in nets:
            net(x, sigma, labels[net.label_dim])

    evaluations = -(-count // size) * 2 * num_steps  # of Heun; of other solvers about half as many
    return compile_if_it_pays_(nets, evaluate, evaluations, device, "evaluation")


def _uncompile_(nets: Iterable[Preconditioner]) -> None:
    for net in nets:
        net.raw._compiled_call_impl = None  # what Module.compile sets; torch has no way back


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The least time of `rounds` calls, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        _wait_for(device)
        started = time.monotonic()
        run()
        _wait_for(device)
        times.append(time.monotonic() - started)
    return min(times[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(nets: Sequence[Preconditioner], device: torch.device, what: str) -> str:
    sizes = [f"{type(net.raw).__name__} of {sum(1 for _ in net.parameters())} weights" for net in nets]
    dtype = str(nets[0].compute_dtype).removeprefix("torch.")
    return f"{hardware(device)}, torch {torch.__version__}, {what}, {' and '.join(sizes)}, {dtype}"


def read_record() -> dict[str, dict[str, float]]:
    """Seconds to compile and gain in speed by machine and network, as measured so far; empty if it cannot be read."""
    try:
        found = json.loads((cache_folder() / RECORD_NAME).read_text(encoding="utf-8"))
        return {key: {name: float(entry[name]) for name in _TYPICAL} for key, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def write_record(key: str, seconds: float, gain: float) -> None:
    """Remember what compiling took and gained; a folder that cannot be written costs only the memory of it."""
    entries = {**read_record(), key: {"seconds": round(seconds, 1), "gain": round(gain, 3)}}
    with contextlib.suppress(OSError), atomic_write(cache_folder() / RECORD_NAME, "w") as file:
        file.write(json.dumps(entries, indent=1) + "\n")


class GraphedCall:
    """A function of tensors as a CUDA graph for each combination of input shapes: one launch instead of hundreds.

    For small batches, for which the host takes longer to launch kernels than the GPU to run them. `function` must only
    launch kernels on the device (no random numbers, no waits) and give the same for the same inputs. Each graph keeps
    the memory of its activations. Positional arguments that are not tensors must stay the same objects.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self._graphs: dict[Any, tuple[list[torch.Tensor], Any, torch.Tensor]] = {}

    def __call__(self, *args: Any) -> torch.Tensor:
        inputs = [arg for arg in args if isinstance(arg, torch.Tensor)]
        key = tuple((tuple(x.shape), x.dtype, x.stride()) if isinstance(x, torch.Tensor) else x is None for x in args)
        if key not in self._graphs:
            self._graphs[key] = self._capture(args)
        held, graph, answer = self._graphs[key]
        for target, source in zip(held, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        return answer.clone()  # the next call overwrites it

    @torch.no_grad()
    def _capture(self, args: Sequence[Any]) -> tuple[list[torch.Tensor], Any, torch.Tensor]:
        own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        # cuBLAS and cuDNN set themselves up in the first calls, on a stream of their own as capturing asks for
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self.function(*own)
        return [arg for arg in own if isinstance(arg, torch.Tensor)], graph, answer


def graph_(net: Preconditioner, device: torch.device) -> Preconditioner:
    """Let calls of the raw network of a frozen denoiser run as CUDA graphs, for small batches; returns it.

    Results change by rounding at most: cuBLAS may choose other kernels while they are captured. Calls with edits or
    with gradients run without. Raises ValueError if `device` is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need an NVIDIA GPU, and the device is {device}; use --compile off")
    net.fast_raw = GraphedCall(net.raw)
    return net
