"""The items that benchmarks/gpu.py measures: functions that yield more and more of their result."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.half_plain import HalfPlainNetwork, HalfPlainTraining
from benchmarks.harness import Work
from benchmarks.plain import guided_heun
from benchmarks.trainers import images_for, make_trainer, preset_config
from edm2kit.ema.power_function import std_to_exp
from edm2kit.guidance.combine import Guided
from edm2kit.models import Precond, full_architecture
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.edm2 import freeze_
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.training.config import TrainConfig
from edm2kit.training.log import make_forecast
from edm2kit.training.loop import Trainer

GOALS = {"training": 2.0, "guided": 2.5}  # ratios to plain, by the fastest way
Contenders = dict[str, Callable[[], object]]
Result = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A preset at 64x64 with `channels` (4: latents), in batches of `batch` images."""

    preset: str
    channels: int
    batch: int


@dataclass(frozen=True)
class Setting:
    """Device, networks and sizes of the measurements."""

    device: torch.device
    shapes: Mapping[str, Shape]
    precisions: tuple[str, ...]
    runs: int
    warmup: int
    num_steps: int
    network: Mapping[str, Any] | None = None  # replaces the preset's own
    resolution: int = 64
    classes: int = 1000
    backend: str = "inductor"
    has_ceilings: bool = True

    def ceiling(self, precision: str) -> str | None:
        """Name of the machine's limit to compare multiply-adds with."""
        return f"matmul_{precision}" if self.has_ceilings else None

    def config(self, shape: str, precision: str, **changes: Any) -> TrainConfig:
        """The shape's training configuration."""
        changes = {"precision": precision, "batch_size": self.shapes[shape].batch, "rampup_nimg": 0, **changes}
        if self.network is not None:
            changes["network"] = self.network
        return preset_config(self.shapes[shape].preset, **changes)

    def architecture(self, config: TrainConfig, shape: str) -> dict[str, Any]:
        channels = self.shapes[shape].channels
        return full_architecture(self.resolution, channels, self.classes, config.sigma_data, config.network)

    def trainer(self, config: TrainConfig, shape: str) -> Trainer:
        return make_trainer(config, self.resolution, self.shapes[shape].channels, self.classes, self.device)


SHAPES = {
    "img512-xs": Shape("edm2-img512-xs", 4, 32),
    "img512-s": Shape("edm2-img512-s", 4, 32),
    "img64-s": Shape("edm2-img64-s", 3, 32),
    "img512-xxl": Shape("edm2-img512-xxl", 4, 1),
}


def gpu_setting() -> Setting:
    """The published networks on the GPU."""
    return Setting(torch.device("cuda"), SHAPES, ("fp16", "bf16"), runs=10, warmup=3, num_steps=32)


def toy_setting() -> Setting:
    """Tiny networks on the CPU, to test the script."""
    network = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    shapes = {name: dataclasses.replace(shape, batch=2) for name, shape in SHAPES.items()}
    small = Setting(torch.device("cpu"), shapes, ("bf16",), runs=1, warmup=0, num_steps=2)
    network["channels_per_head"] = 8
    return dataclasses.replace(small, network=network, resolution=8, classes=4, backend="eager", has_ceilings=False)


def items(setting: Setting) -> dict[str, tuple[int, Callable[[], Iterator[Result]]]]:
    """Name -> (time limit in seconds, what to run), the most important first."""
    found: dict[str, tuple[int, Callable[[], Iterator[Result]]]] = {"ceilings": (30, partial(ceilings, setting))}
    named = [name for name in setting.shapes if name != "img512-xxl"]
    first, *others = setting.precisions
    for precision in (first, *others):
        for name in named:
            found[f"training-{name}-{precision}"] = (120, partial(training, setting, name, precision))
            found[f"evaluation-{name}-{precision}"] = (80, partial(evaluation, setting, name, precision))
        if precision == first:
            found["memory-img512-xxl"] = (90, partial(xxl_memory, setting))
            found[f"guided-img512-s-{precision}"] = (150, partial(guided, setting, precision))
    return found


def ceilings(setting: Setting) -> Iterator[Result]:
    """The machine's limits: multiply-adds and bytes per second."""
    names = ["memory_copy"] + [name for precision in setting.precisions if (name := setting.ceiling(precision))]
    yield {"numbers": {name: harness.ceiling(name, setting.device) for name in names}}


def training(setting: Setting, shape: str, precision: str) -> Iterator[Result]:
    """A training step: plain, as in train.py, and compiled."""
    config, batch = setting.config(shape, precision), setting.shapes[shape].batch
    net, yardstick = networks(setting, shape, precision)
    x, _, labels = inputs(net, batch, setting)
    architecture, state = setting.architecture(config, shape), yardstick.state
    exponents, dtype = tuple(std_to_exp(list(config.ema_stds)).tolist()), PRECISIONS[precision]
    del net, yardstick

    def plain() -> Callable[[], object]:
        return partial(HalfPlainTraining(architecture, state, exponents, dtype).step, x, labels, 0.01)

    def default(backend: str | None = None) -> Callable[[], object]:
        trainer = setting.trainer(config, shape)
        if backend:
            trainer.ddp = torch.compile(trainer.net, backend=backend)
        return partial(trainer.step, images_for(trainer, batch), 1)

    contenders, peaks = {}, {}
    for way, make in {"plain": plain, "default": default, "compiled": partial(default, setting.backend)}.items():
        contenders[way], peaks[f"{way} peak GB"] = with_peak(setting, make)
        if way == "plain":
            continue
        work = Work(
            3 * batch * evaluation_cost(architecture).multiply_adds, "multiply-adds", setting.ceiling(precision)
        )
        goals = {way: GOALS["training"]} if way == "compiled" else {}
        found = compare(f"training-{shape}-{precision}", contenders, setting, work, goals)
        yield found | {"numbers": rates(found, batch) | peaks}


def evaluation(setting: Setting, shape: str, precision: str) -> Iterator[Result]:
    """One evaluation of the network (sampling needs 63): plain, default, as a CUDA graph, compiled."""
    batch = setting.shapes[shape].batch
    net, plain = networks(setting, shape, precision)
    x, sigma, labels = inputs(net, batch, setting)
    ways: dict[str, Callable[..., torch.Tensor]] = {"plain": plain, "default": net}
    exact, _ = networks(setting, shape, "fp32")
    with torch.no_grad():
        answer = exact(x, sigma, labels)
    del exact

    def result() -> Result:
        contenders = {way: torch.no_grad()(partial(function, x, sigma, labels)) for way, function in ways.items()}
        errors = {way: harness.relative_error(run().float(), answer) for way, run in contenders.items()}
        macs = batch * evaluation_cost(setting.architecture(setting.config(shape, precision), shape)).multiply_adds
        work = Work(macs, "multiply-adds", setting.ceiling(precision))
        found = compare(f"evaluation-{shape}-{precision}", contenders, setting, work, {}, errors)
        return found | {"numbers": rates(found, batch)}

    yield result()
    if setting.device.type == "cuda":
        ways["CUDA graph"] = graphed(net, x, sigma, labels)
        yield result()
    ways["compiled"] = torch.compile(net, backend=setting.backend)
    yield result()


def guided(setting: Setting, precision: str) -> Iterator[Result]:
    """Complete sampling, img512-s guided by img512-xs: plain, default, fast; and unguided, for the cost of guidance."""
    shape, batch = "img512-s", setting.shapes["img512-s"].batch
    (net, plain), (guide, plain_guide) = (networks(setting, name, precision) for name in (shape, "img512-xs"))
    x, sigma, labels = inputs(net, batch, setting)
    steps = setting.num_steps

    def sample(denoiser: Callable[..., torch.Tensor]) -> torch.Tensor:
        return edm_sampler(denoiser, x, labels, num_steps=steps)

    contenders: Contenders = {
        "plain": lambda: guided_heun(plain, plain_guide, 2.0, x, labels, num_steps=steps),
        "default": lambda: sample(Guided(net, guide, 2.0)),
        "default, unguided": lambda: sample(net),
    }
    few = dataclasses.replace(setting, runs=min(setting.runs, 3), warmup=min(setting.warmup, 1))

    def result() -> Result:
        goals = {"compiled": GOALS["guided"]} if "compiled" in contenders else {}
        found = compare(f"guided-img512-s-{precision}", contenders, few, Work(batch, "images"), goals)
        seconds = {way: row["median_sec"] for way, row in found["contenders"].items()}
        cost = {"guided over unguided": seconds["default"] / seconds["default, unguided"]}
        return found | {"numbers": rates(found, batch) | cost}

    yield result()
    if setting.device.type == "cuda":
        pair = [graphed(part, x, sigma, labels) for part in (net, guide)]
        contenders["CUDA graphs"] = lambda: sample(Guided(*pair, 2.0))
        yield result()
    fast = [torch.compile(part, backend=setting.backend) for part in (net, guide)]
    contenders["compiled"] = lambda: sample(Guided(*fast, 2.0))
    yield result()


def xxl_memory(setting: Setting) -> Iterator[Result]:
    """Peak memory of training edm2-img512-xxl at one image per pass, against the forecast."""
    shape, numbers = "img512-xxl", {}
    for recompute in (True, False):
        config = setting.config(shape, setting.precisions[0], recompute=recompute, batch_gpu=1, batch_size=1)
        trained, peak = with_peak(setting, partial(two_steps, setting, config))
        del trained
        forecast = make_forecast(config, setting.architecture(config, shape), 1, 1).memory.total
        way = f"recompute {str(recompute).lower()}"
        numbers |= {f"{way}: forecast GB": forecast / 1e9, f"{way}: measured GB": peak}
        yield {"numbers": dict(numbers)}


def two_steps(setting: Setting, config: TrainConfig) -> Callable[[], object]:
    """A training step after a first one: Adam's moments exist from the second on."""
    trainer = setting.trainer(config, "img512-xxl")
    step = partial(trainer.step, images_for(trainer, 1), 1)
    step()
    return step


def networks(setting: Setting, shape: str, precision: str) -> tuple[Precond, HalfPlainNetwork]:
    """A network as sampling uses it, and the same the plain way; random weights, the same each time."""
    torch.manual_seed(0)
    architecture = setting.architecture(setting.config(shape, precision), shape)
    with setting.device:
        net = Precond(**architecture).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.fill_(1)  # gains start at 0: such a network would say nothing
    net.compute_dtype = PRECISIONS[precision]
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    return freeze_(net), HalfPlainNetwork(architecture, state, net.compute_dtype)


def inputs(net: Precond, batch: int, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, noise levels and labels for a network."""
    generator = torch.Generator(setting.device).manual_seed(1)
    shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
    x = torch.randn(shape, generator=generator, device=setting.device)
    labels = torch.eye(net.label_dim, device=setting.device)[torch.arange(batch) % net.label_dim]
    return x, torch.full([batch], math.e, device=setting.device), labels


def compare(
    name: str,
    contenders: Contenders,
    setting: Setting,
    work: Work,
    goals: dict[str, float],
    errors: dict[str, float] | None = None,
) -> Result:
    """Time contenders, which take turns."""
    kind = "norm of the difference from fp32 over its norm" if errors else ""
    job = harness.Comparison(name, dict(contenders), work, goals, errors or {}, kind)
    return harness.measure(job, setting.runs, setting.warmup, setting.device)


def rates(found: Result, batch: int) -> dict[str, float]:
    return {f"{way} images/s": batch / row["median_sec"] for way, row in found["contenders"].items()}


def with_peak(setting: Setting, make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], float]:
    """The function that `make` returns, after one call, and the peak GB of both on the GPU (0 on a CPU)."""
    if setting.device.type != "cuda":
        run = make()
        run()
        return run, 0.0
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = make()
    run()
    torch.cuda.synchronize()
    return run, (torch.cuda.max_memory_allocated() - base) / 1e9


def graphed(net: Precond, *example: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The network as one CUDA graph for inputs shaped like `example` (x, sigma [N], labels)."""
    held = [tensor.clone() for tensor in example]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            net(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        answer = net(*held)

    def run(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for target, source in zip(held, (x, torch.as_tensor(sigma, device=x.device), labels), strict=True):
            target.copy_(source)  # a scalar sigma is broadcast over the batch
        graph.replay()
        return answer.clone()

    return run
