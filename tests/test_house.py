"""The house itself: who may import whom, each dependency named once, every command line answering --help."""

import ast
import json
import re
import subprocess
import sys

import pytest

from edm2kit.guidance.registry import METHODS, RULES
from tests.support import ROOT, house

# Each file runs as `python FILE --help` would start it, from a folder elsewhere, but in one process: torch loads once.
_HELP_RUNNER = """
import contextlib, io, json, runpy, sys
import torch
clean_path, rooms, answers = list(sys.path), json.loads(sys.argv[1]), {}
for file in sys.argv[2:]:
    sys.path[:] = [file.rsplit("/", 1)[0], *clean_path]
    sys.argv = [file, "--help"]
    for name in [name for name in sys.modules if name.split(".")[0] in rooms]:
        del sys.modules[name]
    before, output, code = set(sys.modules), io.StringIO(), None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = repr(error)
    loaded = sorted({name.split(".")[0] for name in set(sys.modules) - before})
    answers[file] = {"code": code, "output": output.getvalue(), "loaded": loaded}
print(json.dumps(answers))
"""


# what a newcomer looks for -> the file of edm2kit that has it
LOOK_UPS = {
    "autoguidance": "guidance/second_network/autoguidance.py",
    "cfg": "guidance/second_network/cfg.py",
    "pag": "guidance/own_network/pag.py",
    "seg": "guidance/own_network/seg.py",
    "sag": "guidance/own_network/sag.py",
    "icg": "guidance/own_network/icg.py",
    "tsg": "guidance/own_network/tsg.py",
    "sliding window": "guidance/own_network/sliding_window.py",
    "truncation": "guidance/own_network/truncation.py",
    "classifier guidance": "guidance/classifier/classifier_guidance.py",
    "dps": "guidance/losses/dps.py",
    "freedom": "guidance/losses/freedom.py",
    "tfg": "guidance/losses/tfg.py",
    "lgd": "guidance/losses/lgd.py",
    "apg": "guidance/rules/apg.py",
    "rescale": "guidance/rules/rescale.py",
    "interval": "guidance/interval.py",
    "weight schedule": "guidance/weight_schedule.py",
    "heun": "sampling/solvers.py",
    "noise levels": "sampling/noise_levels.py",
    "edm2": "models/edm2.py",
    "dit": "models/dit.py",
    "preconditioning": "models/preconditioning.py",
    "vae": "models/vae.py",
    "ema": "ema/power_function.py",
    "power function": "ema/power_function.py",
    "phema": "cli/phema.py",
    "snapshot": "snapshots/file_format.py",
    "checkpoint": "training/checkpoint.py",
    "dataset": "data/dataset.py",
    "labels": "data/labels.py",
    "batches": "data/batches.py",
    "fid": "metrics/frechet.py",
    "frechet": "metrics/frechet.py",
    "inception": "metrics/detectors/inception.py",
    "dinov2": "metrics/detectors/dinov2.py",
    "precision recall": "metrics/precision_recall.py",
    "learning rate": "training/learning_rate.py",
    "loss": "training/loss.py",
    "config": "training/config.py",
    "train": "cli/train.py",
    "generate": "cli/generate.py",
    "distillation": "training/distillation.py",
    "sharding": "training/sharding.py",
    "rng": "torch_utils/rng.py",
    "pickle": "torch_utils/pickles/reader.py",
}


@pytest.fixture(scope="module")
def help_answers(tmp_path_factory):
    files = [str(file) for file in house.command_lines(ROOT)]
    local = json.dumps(["edm2kit", "scripts"])
    command = [sys.executable, "-I", "-c", _HELP_RUNNER, local, *files]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("file", house.command_lines(ROOT), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_line_answers_help_without_loading_optional_packages(file, help_answers):
    answer = help_answers[str(file)]
    assert answer["code"] == 0, (answer["code"], answer["output"])
    assert answer["output"].startswith("Usage:")
    assert not {"matplotlib", "diffusers", "optuna", "torchvision"} & set(answer["loaded"])


def test_imports_point_downward():
    assert house.import_problems(ROOT) == []


def test_no_solver_names_a_guidance_method():
    named = {*METHODS, *RULES} - {"none", "linear"}
    for file in sorted((ROOT / "edm2kit" / "sampling").glob("*.py")):
        words = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        assert named & {word for word in words if isinstance(word, str)} == set(), file


def test_no_file_names_the_place_it_was_written_or_a_package_address():
    assert house.text_problems(ROOT) == []


def test_files_stay_readable_in_one_sitting():
    assert house.length_problems(ROOT) == []


def test_a_newcomer_finds_things_by_their_name():
    missing = {path for path in LOOK_UPS.values() if not (ROOT / "edm2kit" / path).exists()}
    assert missing == set()
    found = [term for term, path in LOOK_UPS.items() if term.replace(" ", "_") in path]
    assert len(LOOK_UPS) == 46
    assert len(found) >= 44


def test_every_dependency_is_named_once_and_used():
    named = [name for group in house.dependencies(ROOT).values() for name in group]
    assert sorted(named) == sorted(set(named))
    used = {
        found.module.split(".")[0] for file in house.python_files(ROOT) for found in house.imports_of(file.read_text())
    }
    unused = {house.IMPORT_NAMES.get(name, name) for name in house.dependencies(ROOT)["core"]} - used
    assert unused == set()


def test_conda_takes_all_but_python_and_pip_from_pyproject():
    lines = (ROOT / "environment.yml").read_text().split("dependencies:")[1].splitlines()
    names = [re.match(r"[\w-]+", line.strip(" -"))[0] for line in lines if line.strip()]
    assert names == ["python", "pip", "pip", "constraint", "editable"]


def test_constraints_pin_one_version_of_each_direct_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = [re.fullmatch(r"([\w.-]+)==[\w.]+", line)[1].lower() for line in lines]
    assert len(pinned) == len(set(pinned))
    groups = house.dependencies(ROOT)
    for group in ("core", "vae", "hub", "plots", "tensorboard", "test"):
        assert set(groups[group]) <= set(pinned), f"of {group}"


def test_installation_takes_along_one_package():
    setup = house.pyproject(ROOT)["tool"]["setuptools"]
    assert setup["packages"]["find"]["include"] == ["edm2kit*"]
    assert "py-modules" not in setup


def test_no_file_changes_the_search_path():
    lines = [f"{file}:{line}" for file in house.python_files(ROOT) for line in file.read_text().splitlines()]
    assert [line for line in lines if "sys.path" + ".insert" in line] == []


def test_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert text.strip().startswith("Apache License")
    assert all(f"   {number}. " in text for number in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture
def crooked(tmp_path):
    """A small tree to bend: one file in each room, one command line, one script."""
    for room in house.ROOMS:
        (tmp_path / "edm2kit" / room).mkdir(parents=True)
        (tmp_path / "edm2kit" / room / "a.py").write_text("import math\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "scripts" / "tool.py").write_text('if __name__ == "__main__":\n    pass\n')
    (tmp_path / "train.py").write_text("from edm2kit.cli.train import main\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert house.import_problems(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("edm2kit/torch_utils/b.py", "from edm2kit.training.a import x", "torch_utils may import only itself"),
        ("edm2kit/training/b.py", "def f():\n    import edm2kit.sampling.a", "training may import only"),
        ("edm2kit/guidance/b.py", "import edm2kit.metrics", "guidance may import only"),
        ("edm2kit/sampling/b.py", "from edm2kit.cli import options", "sampling may import only"),
        ("edm2kit/models/b.py", "from edm2kit.snapshots import a", "models may import only"),
        ("edm2kit/cli/b.py", "from edm2kit.cli.train import main", "a command"),
        ("edm2kit/cli/b.py", "from scripts.tool import x", "scripts is outside the package"),
        ("scripts/b.py", "from benchmarks.a import x", "only benchmarks itself uses it"),
        ("benchmarks/b.py", "from edm2kit.cli.train import main", "a command"),
        (
            "edm2kit/metrics/b.py",
            "try:\n    import matplotlib\nexcept ImportError:\n    pass",
            "inside the function",
        ),
        ("edm2kit/training/b.py", "from torch.utils.tensorboard import SummaryWriter", "inside the function"),
        ("edm2kit/training/b.py", "def f():\n    import torchvision", "torchvision is not used here"),
        ("edm2kit/training/b.py", "import pandas", "not named in pyproject.toml"),
    ],
)
def test_a_crooked_import_is_reported(crooked, file, source, reason):
    (crooked / file).write_text(source)
    (problem,) = house.import_problems(crooked)
    assert problem.startswith(f"{file}:")
    assert reason in problem


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("edm2kit/metrics/b.py", "def f():\n    import matplotlib.pyplot"),
        ("edm2kit/metrics/b.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
        ("edm2kit/cli/b.py", "from edm2kit.sampling.a import x\nfrom edm2kit.metrics.a import y"),
        ("scripts/b.py", "from edm2kit.cli.train import main"),
        ("benchmarks/b.py", "from edm2kit.training.a import x"),
    ],
)
def test_a_straight_import_is_left_alone(crooked, file, source):
    (crooked / file).write_text(source)
    assert house.import_problems(crooked) == []


def test_a_foreign_path_an_address_and_a_long_file_are_reported(crooked):
    (crooked / "scripts" / "x.sh").write_text("cd /" + "work/main\npip install --index-" + "url x\n")
    (crooked / "edm2kit" / "training" / "b.py").write_text("pass\n" * (house.MAX_LINES + 1))
    assert [problem.split()[0] for problem in house.text_problems(crooked)] == ["scripts/x.sh:1", "scripts/x.sh:2"]
    assert [problem.split()[0] for problem in house.length_problems(crooked)] == ["edm2kit/training/b.py"]
