"""Where a result comes from: commit, versions and machine, for every record and snapshot header."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import torch

_ROOT = Path(__file__).parents[2]


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
