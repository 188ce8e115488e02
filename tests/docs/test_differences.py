"""What docs/differences.md says about options that have the names of NVlabs/edm2."""

import re

import click
import pytest

from edm2kit.cli import dataset, generate, metrics, phema, train
from tests.support import ROOT

PAGE = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
COMMANDS = {
    "train.py": train.main,
    "generate.py": generate.main,
    "calculate_metrics.py": metrics.main,
    "reconstruct_phema.py": phema.main,
    "scripts/dataset_tool.py": dataset.main,
}
ROWS = [
    (row[0], option)
    for row in re.findall(r"^\| `([\w./]+\.py)` \|([^|]*)\|", PAGE, re.MULTILINE)
    for option in re.findall(r"`(--[\w-]+)`", row[1])
]


def options_of(command):
    """All options of a command, or of all subcommands of a group."""
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    return {
        name for one in commands for parameter in one.params for name in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize(("script", "option"), ROWS)
def test_every_option_exists_in_its_command(script, option):
    assert option in options_of(COMMANDS[script])


def test_no_option_is_both_the_same_and_different():
    assert len(ROWS) == len(set(ROWS))
    assert len(ROWS) > 50
