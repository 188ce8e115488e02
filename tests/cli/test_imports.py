"""Commands start quickly: --help imports little beyond torch. Counted, because times depend on the machine."""

import json
import subprocess
import sys

from tests.support import ROOT
from tests.support.tiny import environment

# what a command imports only when it needs it; torch's compiler alone takes seconds
NEEDED_LATER = ("torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "requests", "scipy.stats", "diffusers")
# modules beyond torch; lower a number when it gets less, and do not raise it
MOST = {"generate": 200, "metrics": 420}

_COUNT = """
import importlib, json, sys
import torch
before = set(sys.modules)
found = {}
for name in sys.argv[1:]:
    importlib.import_module(f"edm2kit.cli.{name}")
    found[name] = sorted(set(sys.modules) - before)
print(json.dumps(found))
"""


def test_commands_import_little_beyond_torch():
    line = [sys.executable, "-c", _COUNT, *MOST]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, env=environment())
    for command, imported in json.loads(done.stdout).items():
        for name in NEEDED_LATER:
            assert name not in imported, f"{command} imports {name} before it is needed"
        assert len(imported) <= MOST[command], [name for name in imported if "." not in name]
