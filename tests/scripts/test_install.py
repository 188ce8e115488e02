"""Installing: quick when nothing is to be done, and nothing of the user's is ever replaced."""

import subprocess
import sysconfig
import tomllib

import pytest

from scripts import _install

PYPROJECT = {
    "project": {
        "name": "mine",
        "dependencies": ["torch>=2.5", "numpy>=1.26"],
        "optional-dependencies": {"plots": ["matplotlib>=3.8"], "test": ["mine[plots]", "pytest>=8"]},
    }
}


@pytest.fixture
def installed(monkeypatch):
    """Versions this environment claims to have, by name; a test fills it in."""
    versions = {}
    monkeypatch.setattr(_install, "installed_version", versions.get)
    return versions


@pytest.fixture
def pip_calls(monkeypatch):
    """What pip was asked for: (requirements, text of the constraints file)."""
    calls = []

    def run(command, **_):
        if "--editable" in command:
            calls.append("the checkout")
            return subprocess.CompletedProcess(command, 0)
        at = command.index("--constraint") + 1
        with open(command[at]) as file:
            calls.append((command[at + 1 :], file.read()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one dependency, and a site-packages folder of its own."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "mine"\ndependencies = ["torch>=2.5"]\n[project.optional-dependencies]\ntest = []\n'
    )
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(_install, "ROOT", tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def test_extras_may_name_extras():
    assert _install.requirements(PYPROJECT) == ["torch>=2.5", "numpy>=1.26", "pytest>=8", "matplotlib>=3.8"]


def test_the_projects_own_requirements_are_understood():
    wanted = _install.requirements(tomllib.loads((_install.ROOT / "pyproject.toml").read_text()))
    assert "torch>=2.5" in wanted


@pytest.mark.parametrize("line", ["torch", "torch==2.5", "torch>=2.5,<3", "torch>=2.5; python_version<'3.12'"])
def test_a_requirement_of_another_form_is_refused(line):
    with pytest.raises(ValueError, match="not of the form name>=version"):
        _install.requirements(
            {"project": {"name": "mine", "dependencies": [line], "optional-dependencies": {"test": []}}}
        )


@pytest.mark.parametrize("version", ["2.5", "2.5.0", "2.13.0+cu130", "2.10.0a0+git123", "3"])
def test_a_version_that_will_do_is_kept(installed, version):
    installed["torch"] = version
    assert _install.missing(["torch>=2.5", "numpy>=1.26"]) == ["numpy>=1.26"]


def test_a_version_that_is_too_old_is_the_users_to_change(installed):
    installed["torch"] = "2.4.1+cu118"
    with pytest.raises(ValueError, match=r"has torch 2\.4\.1\+cu118, but torch>=2\.5 is needed; update it yourself"):
        _install.missing(["torch>=2.5"])


def test_adding_pins_what_is_there_and_takes_tested_versions_for_the_rest():
    here = _install.installed_version("pytest")
    lines = _install.kept_constraints("# tested\npytest==1.0\nno-such-package==3.2\n").splitlines()
    assert f"pytest=={here}" in lines
    assert "pytest==1.0" not in lines
    assert "no-such-package==3.2" in lines


def test_an_environment_that_has_everything_is_left_alone(checkout, installed, pip_calls, monkeypatch):
    installed["torch"] = "2.7.1+cu126"
    monkeypatch.setattr(_install, "package_is_installed", lambda: True)
    _install.add()
    assert pip_calls == []


def test_only_the_package_is_installed_if_only_that_is_missing(checkout, installed, pip_calls):
    installed["torch"] = "2.7.1+cu126"
    _install.add()
    assert pip_calls == ["the checkout"]


def test_the_own_environment_is_synced_once_until_something_changes(checkout, pip_calls):
    _install.sync()
    _install.sync()
    assert pip_calls == [(["torch>=2.5"], "torch==2.13.0\n"), "the checkout"]
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    _install.sync()
    assert len(pip_calls) == 4


def test_a_failed_installation_is_tried_again(checkout, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    for _ in range(2):
        with pytest.raises(ValueError, match="pip could not install"):
            _install.sync()
