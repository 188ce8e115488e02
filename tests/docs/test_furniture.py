"""The files around the code: citation, contribution guide, continuous integration, commit hooks."""

import re
import tomllib

import yaml

from tests.support import ROOT


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_names_this_version_and_the_papers():
    citation = yaml.safe_load(text("CITATION.cff"))
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    papers = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert papers == {"arXiv:2206.00364", "arXiv:2312.02696", "arXiv:2406.02507"}


def test_ci_runs_the_command_that_a_contributor_runs():
    workflow = yaml.safe_load(text(".github/workflows/test.yml"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash scripts/test.sh"]


def test_commit_hooks_are_local_and_use_the_installed_tools():
    (repo,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
    assert all(hook["language"] == "system" for hook in repo["hooks"])


def test_every_path_that_the_contribution_guide_names_exists():
    named = re.findall(r"\b(?:tests|docs|scripts|edm2kit)/[\w/.]*\w", text("CONTRIBUTING.md"))
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing == set()
