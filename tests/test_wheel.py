"""The wheel: one top-level name, complete, and working far from the checkout beside foreign packages."""

import json
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.support import ROOT, house
from tests.support.fakes import tiny_snapshot

COMMANDS = (
    "train", "generate", "metrics", "phema", "dataset", "reproduce", "distill", "classifier", "convert", "flops", "toy",
    "compare", "tune", "report",
)  # fmt: skip
FOREIGN = ("guidance", "training", "torch_utils", "metrics")
_BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
# -S leaves out .pth files, by which an editable installation leads back to the checkout
_RUN = """
import contextlib, io, json, sys
site, rest, net, commands = json.loads(sys.argv[1])
sys.path[:0] = [site, *rest]
import edm2kit
assert edm2kit.__file__.startswith(site), edm2kit.__file__

from edm2kit.cli.generate import main
main(["--net", net, "--steps", "2", "--seeds", "5", "--outdir", "out", "--device", "cpu"], standalone_mode=False)

import importlib
answers = {}
for name, target in commands.items():
    module, function = target.split(":")
    command = getattr(importlib.import_module(module), function)
    sys.argv = [site + "/bin/" + name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            command()
        except SystemExit as ending:
            assert not ending.code, ending.code
    answers[name] = output.getvalue()
    importlib.import_module("edm2kit.cli." + function)

import guidance, training, torch_utils, metrics
foreign = [module.ORIGIN for module in (guidance, training, torch_utils, metrics)]
inside = sorted(name for name in sys.modules if name.split(".")[0] == "edm2kit")
outside = [name for name in inside if not (getattr(sys.modules[name], "__file__", None) or site).startswith(site)]
print(json.dumps({"answers": answers, "foreign": foreign, "outside": outside}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, because a build writes into its source folder."""
    source = tmp_path_factory.mktemp("source")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "edm2kit", source / "edm2kit", ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", _BUILD, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the unpacked wheel beside foreign packages of the names that EDM2 code uses."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    for name in FOREIGN:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("ORIGIN = 'foreign'\n")
    return folder


def console_commands(site: Path) -> dict[str, str]:
    parser = ConfigParser()
    parser.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    return dict(parser["console_scripts"])


def test_the_wheel_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name.split("/")[0] for name in file.namelist()}
    (information,) = [name for name in names if name.endswith(".dist-info")]
    assert names - {information} == {"edm2kit"}


def test_the_wheel_has_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.startswith("edm2kit/")}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "edm2kit").rglob("*") if path.is_file()}
    assert packed == {name for name in here if "__pycache__" not in name}
    assert {"edm2kit/py.typed", "edm2kit/configs/generate.yaml", "edm2kit/experiments/toy/page.html"} <= packed
    assert {name for name in packed if name.startswith("edm2kit/networks/") and name.endswith(".safetensors")}


def test_the_wheel_has_the_console_commands(site):
    assert sorted(console_commands(site)) == sorted(f"edm2kit-{name}" for name in COMMANDS)
    found = {target.replace(".console:", ".") for target in console_commands(site).values()}
    assert found == house.commands(ROOT)


def test_away_from_the_checkout_it_generates_and_every_command_answers_help(site, tmp_path):
    net = tiny_snapshot(tmp_path / "net.safetensors")
    rest = [path for path in sys.path if path and not (Path(path) / "edm2kit").exists()]
    work = tmp_path / "elsewhere"
    work.mkdir()
    given = json.dumps([str(site), rest, str(net), console_commands(site)])
    command = [sys.executable, "-I", "-S", "-c", _RUN, given]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (work / "out" / "000005.png").exists()
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["foreign"] == ["foreign"] * len(FOREIGN)
    assert found["outside"] == []
    for name, text in found["answers"].items():
        assert text.startswith(f"Usage: {name} "), name
