"""Presets for generating images: published networks, their guidance, and the published result; and files of one's own.

The published ones are in edm2kit/configs/generate.yaml. A file of one's own, such as edm2kit-tune writes, may set any
option of generate.py; those of the networks that come with the package are such files, beside them in edm2kit/networks.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from edm2kit.torch_utils.files import atomic_write, short
from edm2kit.training.config import nearest, read_yaml

SIZES = ("xxs", "xs", "s", "m", "l", "xl", "xxl")
PRESETS_FILE = Path(__file__).parents[1] / "configs" / "generate.yaml"
BOX = Path(__file__).parents[1] / "networks"  # networks that come with the package, their presets and cards
_FILE_SUFFIXES = (".yaml", ".yml")
_REPEATABLE = ("guidance-also",)
_SWITCHES = ("compile",)  # options whose values are on, off and others
# options whose values are files
_PATHS = (
    *("net", "gnet", "uncond", "labels", "prompts", "gnet-lora"),
    *("classifier-file", "loss-image", "loss-mask", "loss-classifier"),
)


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
        raise ValueError(f"unknown preset {name!r}{nearest(name, [*boxed_presets(), *presets])}")
    return presets[name]


def boxed_presets() -> list[str]:
    """The names of the presets whose networks come with the package, so that they work offline."""
    return sorted(path.stem for path in BOX.glob(f"*{_FILE_SUFFIXES[0]}"))


def preset_file(name: str) -> Path | None:
    """The file of a preset that is one of its own or comes with the package; None for a key of generate.yaml."""
    if name.lower().endswith(_FILE_SUFFIXES):
        return Path(name)
    return BOX / f"{name}{_FILE_SUFFIXES[0]}" if name in boxed_presets() else None


def preset_words(path: Path, flags: Collection[str] = ("balanced",)) -> list[str]:
    """The options of a preset file as words of a command line; files are relative to the folder of the preset.

    Such a file maps the names of generate.py's options to their values, under the key `options`. `flags` are those that
    take no value. Raises ValueError, naming the file, if it cannot be read or has another form.

    Example of a file:

        options: {net: main.safetensors, gnet: guide.safetensors, guidance: 2, interval: "0.28,2.9", steps: 16}
    """
    if not path.is_file():
        raise ValueError(f"the preset file {path} does not exist")
    options = read_yaml(path).get("options")
    if not isinstance(options, dict) or not options or not all(isinstance(name, str) for name in options):
        raise ValueError(
            f"{path} is not a preset file: it needs a mapping `options`, such as {{net: main.safetensors, steps: 16}}"
        )
    words = []
    for name, value in options.items():
        if value is None or (value is False and name in flags):
            continue
        for one in value if name in _REPEATABLE and isinstance(value, list) else [value]:
            words.append(f"--{name}")
            if one is not True or name not in flags:
                words.append(_word(name, one, path))
    return words


def _word(name: str, value: Any, path: Path) -> str:
    """The value of an option in the preset file at `path`, as on a command line."""
    if name in _SWITCHES and isinstance(value, bool):
        return "on" if value else "off"  # which YAML 1.1 takes for true and false
    values = value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str | int | float) or isinstance(one, bool):
            raise ValueError(
                f"{path}: {name} is {short(one)}; write text that YAML takes for something else, such as no, on or "
                "2024-01-31, in quotes"
            )
    if isinstance(value, list):
        return ",".join(map(str, value))
    if name in _PATHS and "://" not in str(value):
        kind, colon, file = str(value).rpartition("diffusers:")
        beside = path.parent / os.path.expanduser(file)  # an absolute path stays as it is
        # a model of diffusers may also be a name on the hub
        return f"{kind}{colon}{beside}" if not colon or beside.exists() else str(value)
    return str(value)


def write_preset_file(path: Path, options: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a file for `--preset`: `options` as in `preset_words`, and `about`, which is for readers only."""
    with atomic_write(path, "w") as file:
        file.write("# Generate images with these settings: python generate.py --preset THIS_FILE --outdir out\n")
        yaml.safe_dump({"options": dict(options), **about}, file, sort_keys=False)


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
