"""Presets for generating images: published networks, their guidance, and the published result."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
    presets = {}
    for name, fields in content["presets"].items():
        for key in ("net", "gnet"):
            if key in fields:
                fields[key] = content["base_url"] + fields[key]
        if "interval" in fields:
            fields["interval"] = tuple(fields["interval"])
        presets[name] = Preset(**fields)
    return presets


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
        match = re.search(rf"-({'|'.join(SIZES)})(?=-|$)", name)
        if match is None:
            sizes[name] = []
        else:
            sizes.setdefault(f"{name[: match.start()]}-{{}}{name[match.end() :]}", []).append(match[1])
    texts = []
    for pattern, found in sizes.items():
        ordered = ",".join(sorted(found, key=SIZES.index))
        texts.append(pattern.format(ordered if len(found) == 1 else f"{{{ordered}}}"))
    return ", ".join(texts)
