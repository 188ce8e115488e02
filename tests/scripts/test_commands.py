"""Root files, scripts/, console commands and `python -m edm2kit.cli.NAME` are the same commands."""

import ast
import importlib
import subprocess
import sys

import pytest

from edm2kit.cli import console
from tests.support import ROOT, house

FILES = {
    "train.py": "train", "generate.py": "generate", "calculate_metrics.py": "metrics", "reconstruct_phema.py": "phema",
    "scripts/dataset_tool.py": "dataset", "scripts/reproduce.py": "reproduce", "scripts/distill.py": "distill",
    "scripts/train_classifier.py": "classifier", "scripts/convert_snapshot.py": "convert",
    "scripts/count_flops.py": "flops", "scripts/toy_example.py": "toy", "scripts/compare_guidance.py": "compare",
    "scripts/tune.py": "tune", "scripts/report.py": "report",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_file_calls_the_function_of_its_console_command(file):
    name = FILES[file]
    target = house.pyproject(ROOT)["project"]["scripts"][f"edm2kit-{name}"]
    assert target == f"edm2kit.cli.console:{name}"
    source = (ROOT / file).read_text()
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    [(where, [alias])] = [(node.module, node.names) for node in imported]
    assert (where, alias.name) == ("edm2kit.cli.console", name)
    assert source.endswith(f'if __name__ == "__main__":\n    {alias.asname or name}()\n')
    module = (ROOT / "edm2kit" / "cli" / f"{name}.py").read_text()
    assert f'if __name__ == "__main__":\n    help_pages.answer("{name}")' in module
    assert module.endswith('if __name__ == "__main__":\n    main()\n')


def test_a_root_file_can_be_imported_for_its_command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("train", "generate", "calculate_metrics", "reconstruct_phema"):
        command = importlib.import_module(name).main
        assert command is getattr(console, FILES[f"{name}.py"])
        with command.make_context(name, [], resilient_parsing=True) as context:
            assert context.command is importlib.import_module(f"edm2kit.cli.{FILES[f'{name}.py']}").main


def test_every_console_command_has_a_file():
    assert {f"edm2kit-{name}" for name in FILES.values()} == set(house.pyproject(ROOT)["project"]["scripts"])


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("scripts/")])
def test_a_script_that_finds_no_package_says_how_to_install_it(file, tmp_path):
    command = [sys.executable, "-I", "-S", str(ROOT / file), "--help"]  # without site-packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: the package edm2kit is not installed in this Python. Run: pip install -e .\n"


def test_python_m_runs_the_same_command(tmp_path):
    command = [sys.executable, "-m", "edm2kit.cli.flops", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: python -m edm2kit.cli.flops ")
