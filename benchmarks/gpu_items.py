"""The items that benchmarks/gpu.py measures: functions that yield more and more of their result."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import harness, plain_detectors
from benchmarks.half_plain import HalfPlainNetwork, HalfPlainTraining
from benchmarks.harness import Work
from benchmarks.plain import guided_heun
from benchmarks.trainers import images_for, make_trainer, preset_config
from edm2kit.ema.power_function import std_to_exp
from edm2kit.guidance.combine import Guided
from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.models import Precond, full_architecture
from edm2kit.models.compilation import compile_, graph_
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.edm2 import freeze_
from edm2kit.models.encoders import StabilityVAEEncoder
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.models.vae import load_vae
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.training.config import TrainConfig
from edm2kit.training.log import make_forecast
from edm2kit.training.loop import Trainer

GOALS = {"training": 2.0, "sampling": 2.5}  # ratios to plain, by the fastest way
MAX_SEC = 540  # no item takes longer, so that each fits into a call of nine minutes
COMPILE_SEC = {"evaluation": 120.0, "training": 200.0}  # until "compile" has measured it
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
    backend: str | None = "inductor"  # of torch.compile; with None, compiled and graphed ways run eagerly
    has_ceilings: bool = True
    compiled: bool = True  # with False, ways that compile are left out

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
    "img64-xs": Shape("edm2-img64-xs", 3, 32),
    "img512-xxl": Shape("edm2-img512-xxl", 4, 1),
}
MEASURED = ("img512-s", "img512-xs", "img64-s")  # the most important first
GUIDES = {"img512-s": "img512-xs", "img512-xs": "img512-xs", "img64-s": "img64-xs"}  # what guides a network


def gpu_setting() -> Setting:
    """The published networks on the GPU."""
    return Setting(torch.device("cuda"), SHAPES, ("fp16", "bf16"), runs=10, warmup=3, num_steps=32)


def dry_setting(device: torch.device) -> Setting:
    """The published networks, two steps and one run of everything, for a stand-in of a GPU."""
    return Setting(device, SHAPES, ("fp16", "bf16"), 1, 0, num_steps=2, backend=None, has_ceilings=False)


def toy_setting() -> Setting:
    """Tiny networks on the CPU, to test the script."""
    network = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    shapes = {name: dataclasses.replace(shape, batch=2) for name, shape in SHAPES.items()}
    small = Setting(torch.device("cpu"), shapes, ("bf16",), runs=1, warmup=0, num_steps=2)
    network["channels_per_head"] = 8
    return dataclasses.replace(small, network=network, resolution=8, classes=4, backend="eager", has_ceilings=False)


@dataclass(frozen=True)
class Item:
    """One measurement: `run` yields more and more of its result.

    It takes about `base_sec` and the time of compiling networks, which depends on the machine, `compiled` times.
    """

    run: Callable[[], Iterator[Result]]
    base_sec: float
    compiled: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by what: "evaluation", "training"

    def limit_sec(self, compile_sec: Mapping[str, float]) -> float:
        """Seconds after which it is stopped; `compile_sec` is what compiling takes here, see COMPILE_SEC."""
        compiling = sum(count * compile_sec[what] for what, count in self.compiled.items())
        return min(MAX_SEC, self.base_sec + 1.5 * compiling)


def items(setting: Setting) -> dict[str, Item]:
    """Every item by name, the most important first."""
    found = {"ceilings": Item(partial(ceilings, setting), 180)}
    if setting.compiled:
        found["compile"] = Item(partial(compile_cost, setting), MAX_SEC)
    for precision in setting.precisions:
        for name in MEASURED:
            found[f"training-{name}-{precision}"] = Item(
                partial(training, setting, name, precision), 180, {"training": 1}
            )
            found[f"sampling-{name}-{precision}"] = Item(
                partial(sampling, setting, name, precision), 270, {"evaluation": 2}
            )
        if precision == setting.precisions[0]:
            found["memory-img512-xxl"] = Item(partial(xxl_memory, setting), 180)
            few = partial(sampling, setting, "img512-s", precision, batch=4)
            found[f"four-images-img512-s-{precision}"] = Item(few, 180, {"evaluation": 2})
            found["detectors"] = Item(partial(detectors, setting), 180)
            found["vae"] = Item(partial(vae, setting), 180)
    for precision in setting.precisions:
        for name in MEASURED:
            run = partial(evaluation, setting, name, precision)
            found[f"evaluation-{name}-{precision}"] = Item(run, 120, {"evaluation": 1})
    if not setting.compiled:
        found = {name: dataclasses.replace(item, compiled={}) for name, item in found.items()}
    return found


def ceilings(setting: Setting) -> Iterator[Result]:
    """The machine's limits: multiply-adds and bytes per second."""
    names = ["memory_copy"] + [name for precision in setting.precisions if (name := setting.ceiling(precision))]
    units = {name: "bytes/s" if name == "memory_copy" else "multiply-adds/s" for name in names}
    yield {"numbers": {f"{name}: {units[name]}": harness.ceiling(name, setting.device) for name in names}}


def compile_cost(setting: Setting) -> Iterator[Result]:
    """Seconds that the first call of a compiled network takes beyond the second: evaluation, then training."""
    shape, precision = "img512-s", setting.precisions[0]
    numbers: dict[str, float] = {}
    for what in COMPILE_SEC:
        if what == "evaluation":
            net = denoiser(setting, shape, precision, "compiled")
            example = inputs(setting, shape, setting.shapes[shape].batch)
            run = torch.no_grad()(partial(net, *example))
        else:
            run = trained(setting, setting.config(shape, precision, compile="on"), shape)
        first, second = seconds(setting, run), seconds(setting, run)
        numbers[f"{what}: compile s"] = first - second
        yield {"numbers": dict(numbers)}


def compile_seconds(found: Mapping[str, Result]) -> dict[str, float]:
    """What compiling takes by what is compiled: as the item "compile" among the results says, or typical times."""
    numbers = found.get("compile", {}).get("numbers", {})
    return {what: max(numbers.get(f"{what}: compile s", typical), 5) for what, typical in COMPILE_SEC.items()}


def seconds(setting: Setting, run: Callable[[], object]) -> float:
    """The time of one call."""
    wait = waiting(setting)
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def trained(setting: Setting, config: TrainConfig, shape: str) -> Callable[[], object]:
    """A training step as in train.py."""
    if setting.backend is None:
        config = dataclasses.replace(config, compile="off")
    trainer = setting.trainer(dataclasses.replace(config, compile="off"), shape)
    if config.compile == "on":
        compile_(trainer.net, setting.backend)
    return partial(trainer.step, images_for(trainer, config.batch_size), 1)


def training(setting: Setting, shape: str, precision: str) -> Iterator[Result]:
    """A training step: plain, as in train.py, and compiled."""
    config, batch = setting.config(shape, precision), setting.shapes[shape].batch
    x, _, labels = inputs(setting, shape, batch)
    architecture = setting.architecture(config, shape)
    exponents = tuple(std_to_exp(list(config.ema_stds)).tolist())

    def plain() -> Callable[[], object]:
        state = denoiser(setting, shape, precision, "plain").state
        return partial(HalfPlainTraining(architecture, state, exponents, PRECISIONS[precision]).step, x, labels, 0.01)

    makers = {
        "plain": plain,
        "default": lambda: trained(setting, dataclasses.replace(config, compile="off"), shape),
        "compiled": lambda: trained(setting, dataclasses.replace(config, compile="on"), shape),
    }
    work = Work(3 * batch * evaluation_cost(architecture).multiply_adds, "multiply-adds", setting.ceiling(precision))
    yield from against_plain(f"training-{shape}-{precision}", makers, setting, work, batch, GOALS["training"])


def evaluation(setting: Setting, shape: str, precision: str) -> Iterator[Result]:
    """One evaluation of the network (sampling needs 63): plain, default, as a CUDA graph, compiled."""
    batch = setting.shapes[shape].batch
    example = inputs(setting, shape, batch)
    with torch.no_grad():
        answer = denoiser(setting, shape, "fp32", "default")(*example)

    def maker(way: str) -> Callable[[], Callable[[], object]]:
        return lambda: torch.no_grad()(partial(denoiser(setting, shape, precision, way), *example))

    makers = {way: maker(way) for way in WAYS}
    macs = batch * evaluation_cost(setting.architecture(setting.config(shape, precision), shape)).multiply_adds
    work = Work(macs, "multiply-adds", setting.ceiling(precision))
    name = f"evaluation-{shape}-{precision}"
    yield from against_plain(
        name, makers, setting, work, batch, None, lambda D: harness.relative_error(D.float(), answer)
    )


def sampling(setting: Setting, shape: str, precision: str, batch: int | None = None) -> Iterator[Result]:
    """Complete guided sampling: plain, default, CUDA graphs, compiled; and unguided, for the cost of guidance."""
    batch = batch or setting.shapes[shape].batch
    x, _, labels = inputs(setting, shape, batch)
    steps = setting.num_steps

    def pair(way: str) -> list[Any]:
        return [denoiser(setting, name, precision, way) for name in (shape, GUIDES[shape])]

    def maker(way: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            net, guide = pair(way)
            if way == "plain":
                return torch.no_grad()(lambda: guided_heun(net, guide, 2.0, x, labels, num_steps=steps))
            return lambda: edm_sampler(Guided(net, guide, 2.0), x, labels, num_steps=steps)

        return make

    unguided = denoiser(setting, shape, precision, "default")
    makers = {way: maker(way) for way in WAYS if way != "compiled"}
    makers["default, unguided"] = lambda: lambda: edm_sampler(unguided, x, labels, num_steps=steps)
    makers["compiled"] = maker("compiled")  # last, as compiling may take more time than there is
    few = dataclasses.replace(setting, runs=min(setting.runs, 2), warmup=min(setting.warmup, 1))
    prefix = "sampling" if batch == setting.shapes[shape].batch else f"sampling of {batch}"
    goal = GOALS["sampling"] if prefix == "sampling" else None
    yield from against_plain(f"{prefix}-{shape}-{precision}", makers, few, Work(batch, "images"), batch, goal)


def detectors(setting: Setting) -> Iterator[Result]:
    """Features of 64x64 images by Inception and DINOv2, with random weights, in float32."""
    numbers: dict[str, float] = {}
    count = 64 if setting.network is None else 2
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, device=setting.device)
    pairs = {
        "inception": (InceptionV3, plain_detectors.PlainInception),
        "dinov2": (DINOv2ViT, plain_detectors.PlainDINOv2),
    }
    for name, makers in pairs.items():
        for way, make in zip(("default", "plain"), makers, strict=True):
            net = make().eval().to(setting.device)
            run = torch.no_grad()(partial(net, images))
            times = harness.interleave({way: run}, setting.runs, setting.warmup, synchronize=waiting(setting))[way]
            numbers[f"{name}, {way}: images/s"] = count / min(times)
            yield {"numbers": dict(numbers)}


def vae(setting: Setting) -> Iterator[Result]:
    """Decoding latents of 512x512 images with a VAE of Stable Diffusion's size and random weights."""
    from diffusers import AutoencoderKL

    channels, count = ([128, 256, 512, 512], 16) if setting.network is None else ([32, 32], 2)
    kinds = {side: [f"{name}Block2D"] * len(channels) for side, name in (("down", "DownEncoder"), ("up", "UpDecoder"))}
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(
            block_out_channels=channels,
            down_block_types=kinds["down"],
            up_block_types=kinds["up"],
            latent_channels=4,
            layers_per_block=2,
        ).save_pretrained(folder)
        load_vae(folder, setting.device)
        latents = torch.zeros(count, 4, setting.resolution, setting.resolution, device=setting.device)
        decode = partial(StabilityVAEEncoder(folder).decode, latents)
        times = harness.interleave({"vae": decode}, setting.runs, setting.warmup, synchronize=waiting(setting))["vae"]
        yield {"numbers": {"decode: images/s": count / min(times)}}


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


WAYS = ("plain", "default", "CUDA graphs", "compiled")


def denoiser(setting: Setting, shape: str, precision: str, way: str) -> Any:
    """A network as sampling uses it in one of WAYS; its weights are random, and the same each time."""
    torch.manual_seed(0)
    architecture = setting.architecture(setting.config(shape, precision), shape)
    with setting.device:
        net = Precond(**architecture).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.fill_(1)  # gains start at 0: such a network would say nothing
    net.compute_dtype = PRECISIONS[precision]
    if way == "plain":
        state = {name: value.contiguous() for name, value in net.state_dict().items()}
        return HalfPlainNetwork(architecture, state, net.compute_dtype)
    net = freeze_(net)
    if way == "compiled" and setting.backend is not None:
        return compile_(net, setting.backend)
    if way == "CUDA graphs" and setting.device.type == "cuda":
        return graph_(net, setting.device)
    return net


def inputs(setting: Setting, shape: str, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, noise levels and labels for a network."""
    generator = torch.Generator(setting.device).manual_seed(1)
    size = (batch, setting.shapes[shape].channels, setting.resolution, setting.resolution)
    x = torch.randn(size, generator=generator, device=setting.device)
    labels = torch.eye(setting.classes, device=setting.device)[
        torch.arange(batch, device=setting.device) % setting.classes
    ]
    return x, torch.full([batch], math.e, device=setting.device), labels


def against_plain(
    name: str,
    makers: Mapping[str, Callable[[], Callable[[], object]]],
    setting: Setting,
    work: Work,
    batch: int,
    goal: float | None,
    error_of: Callable[[Any], float] | None = None,
) -> Iterator[Result]:
    """Each way takes turns with the plain one; yields the rows so far, and the peak memory of each way in GB.

    A way is made when its turn comes, and is dropped afterwards. `goal` is that of the fastest way, "compiled".
    """
    if not setting.compiled:
        makers = {way: make for way, make in makers.items() if way != "compiled"}
    plain, peak = with_peak(setting, makers["plain"])
    numbers, rows, found = {"plain peak GB": peak}, {}, None
    for way in list(makers)[1:]:
        if way == "CUDA graphs" and setting.device.type == "cpu":
            continue
        run, numbers[f"{way} peak GB"] = with_peak(setting, makers[way])
        errors = {} if error_of is None else {label: error_of(one()) for label, one in (("plain", plain), (way, run))}
        goals = {} if goal is None or way != "compiled" else {way: goal}
        kind = "norm of the difference from fp32 over its norm" if errors else ""
        job = harness.Comparison(name, {"plain": plain, way: run}, work, goals, errors, kind)
        found = harness.measure(job, setting.runs, setting.warmup, setting.device)
        rows = {**rows, way: found["contenders"][way]}
        rows = {"plain": rows.get("plain", found["contenders"]["plain"]), **rows}
        del run, job
        for label, row in rows.items():
            numbers[f"{label} images/s"] = batch / row["median_sec"]
        if {"default", "default, unguided"} <= set(rows):
            parts = [rows[label]["median_sec"] for label in ("default", "default, unguided")]
            numbers["guided over unguided"] = parts[0] / parts[1]
        yield {**found, "contenders": rows, "numbers": dict(numbers)}


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


def waiting(setting: Setting) -> Callable[[], object]:
    """What makes the host wait for the device."""
    return torch.cuda.synchronize if setting.device.type == "cuda" else lambda: None
