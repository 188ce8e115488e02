"""JSON records beside results: writing them, comparing settings, and where a result comes from."""

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.torch_utils.files import atomic_write

_ROOT = Path(__file__).parents[2]


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically. Raises OSError if it cannot be written."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)


def plain_json(value: Any) -> Any:
    """`value` as JSON can hold it: tuples become lists, keys strings, infinities and other objects their text."""
    match value:
        case Mapping():
            return {str(key): plain_json(item) for key, item in value.items()}
        case list() | tuple() | range():
            return [plain_json(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


def short_json(value: Any, max_chars: int = 24) -> str:
    """`value` as JSON for a message, cut to at most `max_chars` characters."""
    text = json.dumps(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def differences(recorded: Any, current: Any, name: str = "") -> list[str]:
    """Each setting in which two JSON values differ, such as "solver.num_steps 32, now 16"; [] if equal.

    Mappings are compared key by key at any depth. `name` is the name of the value itself.
    """
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        found = []
        for key in dict.fromkeys([*recorded, *current]):
            found += differences(recorded.get(key), current.get(key), f"{name}.{key}".lstrip("."))
        return found
    if recorded == current:
        return []
    return [f"{name} {short_json(recorded)}, now {short_json(current)}"]


@cache
def code_commit() -> str:
    """The git commit of the checkout, followed by "+changes" if Python files differ; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(_ROOT)]
        # a copy of these files inside another repository does not have its commit
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if Path(top.stdout.strip()).resolve() != _ROOT.resolve():
            return "unknown"
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def hardware(device: torch.device | str = "cpu") -> str:
    """The name of the device, such as "NVIDIA H100 80GB" or "x86_64 CPU, 2 threads"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.device(device).type.upper()}, {torch.get_num_threads()} threads"


def provenance(device: torch.device | str = "cpu") -> dict[str, str]:
    """Commit, versions and hardware as strings, for a JSON record."""
    return {
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hardware": hardware(device),
    }
