"""Presets for generating images: published networks, their guidance, and the published result."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from edm2kit.training.config import nearest

SIZES = ("xxs", "xs", "s", "m", "l", "xl", "xxl")
PRESETS_FILE = Path(__file__).parents[1] / "configs" / "generate.yaml"


@dataclass(frozen=True)
class Preset:
    """Published networks with the settings of a published result.

    - `net`, `gnet`: URLs.
    - `guidance`, `interval`: as the options of these names; None without a guide network.
    - `metric`, `value`: the published result, the minimum over three seed ranges of 50,000 images each.
    """

    net: str
    metric: str
    value: float
    gnet: str | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None


@cache
def load_presets() -> Mapping[str, Preset]:
    """Every preset of edm2kit/configs/generate.yaml by name."""
    content = yaml.safe_load(PRESETS_FILE.read_text(encoding="utf-8"))
    return {name: _preset(fields, content["base_url"]) for name, fields in content["presets"].items()}


def find_preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError with the nearest name if there is none."""
    presets = load_presets()
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}{nearest(name, list(presets))}")
    return presets[name]


def summary(names: Iterable[str]) -> str:
    """Preset names as a list, shortened if they only differ in size: "edm2-img64-{xs,s,m}, pictures32"."""
    sizes: dict[str, list[str]] = {}
    for name in names:
        size = next((word for word in name.split("-") if word in SIZES), "")
        pattern = re.sub(rf"-{size}(?=-|$)", "-{}", name) if size else name
        sizes.setdefault(pattern, []).append(size)
    return ", ".join(_with_sizes(pattern, found) for pattern, found in sizes.items())


def _with_sizes(pattern: str, sizes: Sequence[str]) -> str:
    if len(sizes) == 1:
        return pattern.replace("{}", sizes[0])
    return pattern.replace("{}", "{" + ",".join(sorted(sizes, key=SIZES.index)) + "}")


def _preset(fields: Mapping[str, Any], base_url: str) -> Preset:
    urls = {key: base_url + fields[key] for key in ("net", "gnet") if key in fields}
    interval = fields.get("interval")
    return Preset(**{**fields, **urls, "interval": None if interval is None else tuple(interval)})
