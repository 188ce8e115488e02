"""What every command does while it works: shows how far it is, and never waits for others without a limit."""

import ast
import importlib
import inspect

import click
import pytest

from edm2kit.cli import doctor
from tests.support import ROOT, house


def leaf_commands():
    """(console command with its subcommands, click command) of everything that can be run."""
    for name, module in house.console_commands(ROOT).items():
        command = importlib.import_module(module).main
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", found) for sub, found in command.commands.items())
        else:
            yield name, command
    yield "edm2kit-train doctor", doctor.doctor


COMMANDS = dict(leaf_commands())
# command -> the modules that show how far its long steps are
SHOWN_BY = {
    "edm2kit-train": ["training.log", "torch_utils.download"],
    "edm2kit-train doctor": [
        "training.heldout_loss",
        "experiments.runs.expected_loss",
        "experiments.runs.copies",
        "experiments.runs.snapshot_losses",
    ],
    "edm2kit-generate": ["cli.generation", "torch_utils.download"],
    "edm2kit-phema": ["cli.phema"],
    "edm2kit-metrics calc": ["cli.image_source", "metrics.pairs"],
    "edm2kit-metrics gen": ["cli.generation", "cli.image_source", "metrics.pairs"],
    "edm2kit-metrics ref": ["cli.image_source"],
    "edm2kit-dataset convert": ["data.convert"],
    "edm2kit-dataset check": ["data.check"],
    "edm2kit-dataset encode": ["data.encode"],
    "edm2kit-dataset decode": ["data.encode"],
    "edm2kit-tune probe": ["experiments.tune.probe"],
    "edm2kit-tune search": ["cli.tune", "experiments.tune.report"],
    "edm2kit-compare run": ["cli.generation", "cli.image_source"],
    "edm2kit-compare tune": ["cli.generation", "cli.image_source"],
    "edm2kit-compare report": ["cli.generation", "cli.image_source"],
    "edm2kit-compare cost": ["experiments.compare_guidance.cost"],
    "edm2kit-compare sheet": ["cli.generation"],
    "edm2kit-distill": ["training.log"],
    "edm2kit-classifier": ["cli.classifier"],
    "edm2kit-convert": ["cli.convert"],
    "edm2kit-toy train": ["cli.toy"],
    "edm2kit-toy evaluate": ["cli.toy"],
    "edm2kit-toy plot": ["cli.toy"],
    "edm2kit-toy all": ["cli.toy"],
    "edm2kit-reproduce download": ["torch_utils.download"],
    "edm2kit-reproduce run": ["cli.generation", "torch_utils.download"],
    "edm2kit-reproduce figure": ["experiments.prompt_figures.figures"],
}
# command -> why it shows nothing
QUICK = {
    "edm2kit-dataset advise": "says what it measures, a line per network",
    "edm2kit-metrics list": "prints a list",
    "edm2kit-metrics explain": "compares two small files",
    "edm2kit-compare table": "reads small files",
    "edm2kit-toy publish": "copies files",
    "edm2kit-reproduce list": "prints a list",
    "edm2kit-reproduce plan": "computes in seconds; --measure says what it measures",
    "edm2kit-reproduce report": "reads small files",
    "edm2kit-flops": "computes in seconds",
    "edm2kit-report": "draws small files",
}


def calls(module, names):
    """Whether the source of a module calls one of these functions or methods."""
    tree = ast.parse((ROOT / "edm2kit" / f"{module.replace('.', '/')}.py").read_text())
    found = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return bool(found & set(names))


def test_every_command_shows_how_far_it_is_or_takes_seconds():
    assert set(COMMANDS) == {*SHOWN_BY, *QUICK}
    assert not set(SHOWN_BY) & set(QUICK)
    modules = {module for modules in SHOWN_BY.values() for module in modules} - {"training.log"}
    assert [module for module in sorted(modules) if not calls(module, ["progress_bar"])] == []
    assert calls("training.loop", ["progress"])  # its lines: tests/training/test_log.py


def test_all_bars_keep_to_a_line_per_half_minute_in_log_files():
    """Only `dist.progress_bar` makes bars, which knows what suits a terminal and what a file."""
    others = []
    for file in (ROOT / "edm2kit").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT / "edm2kit").with_suffix("").parts)
        if module != "torch_utils.dist" and calls(module, ["tqdm", "trange"]):
            others.append(module)
    assert others == []


@pytest.mark.parametrize("name", COMMANDS)
def test_what_waits_for_other_processes_takes_a_limit(name):
    command = COMMANDS[name]
    source = inspect.getsource(inspect.unwrap(command.callback))
    waits = "session(" in source or "file_lock(" in source or name.split()[-1] in ("convert", "encode", "decode")
    options = {option for parameter in command.params for option in parameter.opts}
    assert not waits or "--timeout" in options or name == "edm2kit-convert"
