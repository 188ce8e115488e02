"""What made a result: the code's commit, the versions, the machine. Goes into every record and snapshot header."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import torch

_ROOT = Path(__file__).parents[2]


@cache
def code_commit() -> str:
    """The checkout's git commit, with "+changes" where files differ from it; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(_ROOT)]
        # a copy of the sources inside somebody else's repository has no commit of ours
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if Path(top.stdout.strip()).resolve() != _ROOT.resolve():
            return "unknown"
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def hardware(device: torch.device | str = "cpu") -> str:
    """The device in words, such as "NVIDIA H100 80GB" or "x86_64 CPU, 2 threads"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.device(device).type.upper()}, {torch.get_num_threads()} threads"


def provenance(device: torch.device | str = "cpu") -> dict[str, str]:
    """Commit, versions and hardware, as strings for a JSON record."""
    return {
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hardware": hardware(device),
    }
