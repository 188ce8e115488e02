"""JSON records beside results: writing them, and comparing the settings in them with those of today."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edm2kit.torch_utils.files import atomic_write


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically. Raises OSError if it cannot be written."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)


def plain_json(value: Any) -> Any:
    """`value` as JSON can hold it: tuples become lists, keys strings, infinities and other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def short_json(value: Any, max_chars: int = 24) -> str:
    """`value` as JSON for a message, cut to at most `max_chars` characters."""
    text = json.dumps(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def differences(recorded: Any, current: Any, name: str = "") -> list[str]:
    """Each setting in which two JSON values differ, such as "solver.num_steps 32 there, 16 now"; [] if equal.

    Mappings are compared key by key at any depth. `name` is the name of the value itself.
    """
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        found = []
        for key in dict.fromkeys([*recorded, *current]):
            found += differences(recorded.get(key), current.get(key), f"{name}.{key}".lstrip("."))
        return found
    if recorded == current:
        return []
    return [f"{name} {short_json(recorded)} there, {short_json(current)} now"]
