"""Settings for a data set of one's own: how large a network, how long, and everything else that has to be chosen.

Each rule has a name, under which docs/own-images.md explains it and gives its source.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from edm2kit.training.config import TrainConfig, config_from_dict, most_epochs

WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 320)  # channels of the first level, narrowest first
NUM_SNAPSHOTS = 16  # at so many times, so that any EMA length can be rebuilt afterwards
MAIN_EMA_STD, GUIDE_EMA_STD = 0.07, 0.125
_KIB = 1 << 10
_SMALL, _MEDIUM = 20_000, 200_000  # images; above the latter, data sets are like ImageNet
_LONG_STEPS = 50_000
_MANY_EPOCHS = 100
_TRAINING_SHARE = 0.9  # of the budget; the rest is for samples, snapshots and checkpoints


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the data set as training sees it.

    `classes` is the number of classes or the length of label vectors, 0 without labels. `per_class` is the mean number
    of images of a class.
    """

    num_images: int
    resolution: int
    latents: bool
    classes: int
    per_class: float


@dataclass(frozen=True)
class Setting:
    """A value of a configuration (`key` of TrainConfig), the rule that it follows, and the reason in a few words."""

    key: str
    value: Any
    rule: str
    reason: str


def network(resolution: int, width: int) -> dict[str, Any]:
    """The arguments of an EDM2 network of `width` channels for images of `resolution`."""
    halvings = max(1, round(math.log2(resolution / 8)))
    mults = {1: [1, 2], 2: [1, 2, 4], 3: [1, 2, 3, 4]}.get(halvings, [1] * (halvings - 3) + [1, 2, 3, 4])
    blocks = 3
    if width < 128:
        blocks = 1 if width < 64 else 2
    attention = [16, 8] if width >= 64 else []
    heads = [per_head for per_head in (64, 32, 16, 8) if width * mults[-1] % per_head == 0]
    if width >= 64:
        heads = [per_head for per_head in heads if width % per_head == 0]
    return {
        "model_channels": width,
        "channel_mult": mults,
        "num_blocks": blocks,
        "attn_resolutions": attention,
        "channels_per_head": heads[0] if width >= 64 else min(heads[0], 32),
    }


def images_wanted(width: int) -> int:
    """How many images a network of `width` should at least be trained on: in proportion to its weights."""
    return round(40_000 * (width / 16) ** 2)


def widest(facts: Facts) -> int:
    """The widest network for a data set of this size."""
    if facts.num_images < _SMALL:
        return 128
    return 192 if facts.num_images < _MEDIUM else WIDTHS[-1]


def guide_width(width: int) -> int:
    """The width of the guide of a network of `width`: half."""
    return width // 2


def guide_share(nimg: int) -> float:
    """Training of the guide as a fraction of that of the main network, which sees `nimg` images."""
    return 3 / 16 if nimg < 1 << 20 else 1 / 16


@dataclass(frozen=True)
class Speed:
    """Measured or given: images per second of a main network of `width` and of its guide."""

    width: int
    main: float
    guide: float


def choose(facts: Facts, budget_sec: float, measure: Callable[[int], float]) -> Speed:
    """The widest network that can be trained on `images_wanted` images within the budget.

    `measure(width)` returns images per second; it is called for one width after another, narrowest first, until one is
    too slow. The narrowest is taken if none is fast enough.
    """
    chosen, speeds = WIDTHS[0], {}
    for width in WIDTHS:
        if width > widest(facts):
            break
        speeds[width] = measure(width)
        if width > WIDTHS[0] and speeds[width] * budget_sec * _TRAINING_SHARE < images_wanted(width):
            break
        chosen = width
    guide = guide_width(chosen)
    return Speed(chosen, speeds[chosen], speeds[guide] if guide in speeds else measure(guide))


def duration_nimg(facts: Facts, budget_sec: float, speed: Speed) -> int:
    """Training images of the main network: what fits the budget beside the guide, and is of use for the data set."""
    share = guide_share(round(speed.main * budget_sec))
    fitting = budget_sec * _TRAINING_SHARE / (1 / speed.main + share / speed.guide)
    is_small = facts.num_images < _MEDIUM
    useful = 200_000_000 if is_small else 2 << 30
    # a little less, since the schedule rounds
    remembered = 0.9 * most_epochs(facts.num_images, regularised=is_small and not facts.latents) * facts.num_images
    return round(min(fitting, useful, remembered))


def settings(facts: Facts, speed: Speed, nimg: int, *, guide: bool, more: Mapping[str, Any]) -> list[Setting]:
    """Every setting of the main network, or of its guide, with its rule.

    `nimg` are the images that the main network sees; `more` holds precision and batch_gpu, as the machine needs them.
    """
    batch = _batch_size(facts, nimg)
    width = guide_width(speed.width) if guide else speed.width
    every, duration = _schedule(nimg * guide_share(nimg) if guide else nimg, batch)
    steps = duration // batch
    is_long = nimg // batch >= _LONG_STEPS
    epochs = nimg / facts.num_images
    rest = _regularisation(facts, epochs, width)
    P_mean, P_std, levels = _noise_levels(facts)
    shape = f"{width} channels" + (", half of the main network's" if guide else " fit the budget")
    rate = 0.02
    if is_long:
        rate = {192: 0.010, 256: 0.009, 320: 0.008}.get(width, 0.012)
    found = [
        Setting("cond", facts.classes > 0 and facts.per_class >= 100, "classes", _classes_reason(facts)),
        Setting("network", {**network(facts.resolution, width), **rest.network}, "network", shape),
        Setting("duration_nimg", duration, "duration", f"{duration / facts.num_images:,.0f} epochs, {steps:,} steps"),
        Setting("batch_size", batch, "batch", "5,000 steps or more, if that is 16 images or more"),
        Setting("ref_lr", rate, "learning rate", "short run" if not is_long else "as EDM2"),
        Setting("ref_batches", max(1, steps // (15 if is_long else 5)), "decay", "of all steps, 1/15 or 1/5 if short"),
        Setting("rampup_nimg", min(10_000_000, duration // 32), "ramp-up", "3% of the run"),
        Setting("flip", not facts.latents, "mirror images", "set false for text, digits, and left-right differences"),
        Setting("augment", rest.augment, "augmentation", rest.reason),
        Setting("P_mean", P_mean, "noise levels", levels),
        Setting("P_std", P_std, "noise levels", levels),
        Setting("snapshot_every_nimg", every, "snapshots", f"{duration // every} times"),
        Setting("checkpoint_every_nimg", every * 2, "snapshots", "what a killed run loses at most"),
        Setting("status_every_nimg", max(batch, every // 4), "snapshots", "lines in the log"),
        Setting("seed", 1 if guide else 0, "guide", "a guide with other random numbers"),
    ]
    return [*found, *(Setting(key, value, "machine", "measured here") for key, value in more.items())]


@dataclass(frozen=True)
class _Regularisation:
    network: Mapping[str, Any]
    augment: float
    reason: str


def _regularisation(facts: Facts, epochs: float, width: int) -> _Regularisation:
    if epochs < _MANY_EPOCHS:
        return _Regularisation({"dropout": 0.0}, 0.0, f"no dropout, no augmentation: {epochs:,.0f} epochs are few")
    if facts.num_images < _SMALL:
        dropout, augment = 0.25, 0.15
    elif facts.num_images < _MEDIUM:
        dropout, augment = 0.13, 0.12
    else:
        dropout, augment = (0.1 if width >= 256 else 0.0), 0.0
    if facts.latents:
        augment = 0.0
    reason = f"with dropout {dropout:g}, as EDM for data sets of this size, at {epochs:,.0f} epochs"
    return _Regularisation({"dropout": dropout}, augment, reason)


def _noise_levels(facts: Facts) -> tuple[float, float, str]:
    if facts.latents:
        return -0.4, 1.0, "as EDM2 for latents"
    if facts.resolution <= 32:
        return -0.6, 1.4, "as the preset cifar10"
    shift = math.log(facts.resolution / 64)
    return round(-0.8 + shift, 2), 1.6, "as EDM2 for 64x64 pixels, with more noise for more pixels"


def _classes_reason(facts: Facts) -> str:
    if not facts.classes:
        return "the data have no labels"
    return f"{facts.per_class:,.0f} images per class; below 100, labels make networks memorise"


def _batch_size(facts: Facts, nimg: int) -> int:
    most = 512 if facts.num_images < _MEDIUM else 2048
    return min(max(16, 1 << int(math.log2(max(1, nimg / 5000)))), most)


def _schedule(nimg: float, batch: int) -> tuple[int, int]:
    """Images between snapshots and in all: multiples of 1024 and of the batch, close to `nimg`."""
    unit = max(_KIB, batch)
    every = max(1, round(nimg / NUM_SNAPSHOTS / unit)) * unit
    return every, max(2, round(nimg / every)) * every


def to_yaml(found: list[Setting], heading: list[str]) -> str:
    """The settings as a commented YAML file that --config takes."""
    lines = [f"# {line}".rstrip() for line in heading]
    for setting in found:
        lines.append(f"# {setting.rule}: {setting.reason}")
        value = _count(setting.value) if setting.key.endswith("_nimg") else setting.value
        # lists inside the network stay on one line
        flow = None if isinstance(value, dict) else False
        lines.append(yaml.safe_dump({setting.key: value}, sort_keys=False, default_flow_style=flow).strip())
    return "\n".join(lines) + "\n"


def to_config(found: list[Setting], **more: Any) -> TrainConfig:
    """The configuration of these settings, checked."""
    return config_from_dict({**{setting.key: setting.value for setting in found}, **more}, "the advice")


def _count(value: int) -> int | str:
    return f"{value // _KIB}Ki" if value >= 10 * _KIB and value % _KIB == 0 else value
