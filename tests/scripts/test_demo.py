"""The demo's steps exist. To run them all in a minute or two: bash scripts/demo.sh --tiny."""

import re
import subprocess

import pytest

from edm2kit.training.config import preset_names
from tests.support import ROOT

TEXT = (ROOT / "scripts" / "demo.sh").read_text()


def test_every_command_and_preset_of_the_demo_exists():
    commands = re.findall(r"\brun ([\w/]+\.py)", TEXT)
    assert len(set(commands)) == 7
    assert [command for command in commands if not (ROOT / command).is_file()] == []
    assert set(re.findall(r"--preset ([\w-]+)", TEXT)) <= set(preset_names())


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda script: script.name)
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
