"""Recorded settings of images, compared under their current names; methods and options were renamed."""

import re
from collections.abc import Mapping
from typing import Any

from edm2kit.guidance.registry import ALIASES, METHODS, OPTION_ALIASES
from edm2kit.torch_utils.files import check_type, differences


def settings_differences(recorded: Any, current: Any, name: str = "") -> list[str]:
    """`edm2kit.torch_utils.files.differences` of two settings, whatever release recorded either; [] if equal."""
    return differences(settings_with_current_names(recorded), settings_with_current_names(current), name)


def settings_with_current_names(settings: Any) -> Any:
    """Recorded settings with guidance under their current names, so that those of the same images are equal.

    `settings` has the keys `gnet` and `guidance`, as generate.py records them; without `guidance` it stays as it is.
    Guidance by an unconditional guide network counts as autoguidance, which is the same formula.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("guidance"), Mapping):
        return settings
    guidance = dict(settings["guidance"])
    also = guidance.get("also", [])
    try:
        check_type(guidance.get("method"), str, "method")
        check_type(also, list[tuple[str, float]], "also")
    except ValueError:
        return settings  # a damaged record is equal to none
    names = []
    for name in (guidance["method"], *(name for name, _ in also)):
        names.append(ALIASES.get(name, name))
    if settings.get("gnet") is not None and not _needs_gnet(names):
        names = ["autoguidance" if name == "cfg" else name for name in names]
    guidance["method"] = names[0]
    if also:
        weights = [weight for _, weight in also]
        guidance["also"] = [list(pair) for pair in zip(names[1:], weights, strict=True)]
    if isinstance(guidance.get("options"), Mapping):
        options = guidance["options"].items()
        guidance["options"] = {OPTION_ALIASES.get(keyword, keyword): value for keyword, value in options}
    return {**settings, "guidance": guidance}


def _needs_gnet(names: list[str]) -> bool:
    """Whether any of these methods cannot do without a guide network; cfg then uses the main network."""
    return any(METHODS[name].needs_gnet for name in names if name in METHODS)


def words_with_current_names(words: str) -> str:
    """A command line as text with its guidance methods and options under their current names."""
    for old, new in ALIASES.items():
        words = re.sub(rf"(--guidance-(?:method|also)[ =]){old}\b", rf"\g<1>{new}", words)
    for old, new in OPTION_ALIASES.items():
        words = re.sub(rf"--{old.replace('_', '-')}\b", f"--{new.replace('_', '-')}", words)
    return words
