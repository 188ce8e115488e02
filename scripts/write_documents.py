"""Write the generated parts of all documents from their records."""

import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click

try:
    from edm2kit.cli import click_types as cli
    from edm2kit.cli import help_pages
    from edm2kit.cli.field_options import settings_table
    from edm2kit.experiments import documents, lite_features, own_images
    from edm2kit.experiments.cifar10 import report as cifar10
    from edm2kit.experiments.compare_guidance import report as comparison
    from edm2kit.experiments.demo import report as demo
    from edm2kit.experiments.paper_tables import document as paper_tables
    from edm2kit.experiments.solvers import report as solvers
    from edm2kit.experiments.toy import report as toy
    from edm2kit.experiments.tune import exhaustive as tune
    from edm2kit.guidance import table as guidance
    from edm2kit.training.config import TrainConfig
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error

Parts = dict[str, str]  # name of a part -> its text


def _record(path: Path) -> dict:
    return json.loads((documents.checkout() / path).read_text(encoding="utf-8"))


def _guidance_parts() -> Parts:
    record = _record(comparison.FOLDER / comparison.RECORD_NAME)
    distilled = {"distillation": comparison.cost_table(_record(comparison.FOLDER / comparison.DISTILLATION_NAME))}
    return {"methods": guidance.table_markdown(), **distilled, **comparison.document_parts(record)}


def _solver_parts() -> Parts:
    orders = _record(solvers.FOLDER / solvers.RECORD_NAME)
    on_toy = _record(solvers.FOLDER / solvers.TOY_RECORD_NAME)
    on_images = _record(solvers.FOLDER / solvers.IMAGES_RECORD_NAME)
    return {**solvers.document_parts(orders), **solvers.toy_parts(on_toy), **solvers.image_parts(on_images)}


# document -> its generated parts; docs/performance.md and docs/scaling.md belong to benchmarks/report.py
DOCUMENTS: dict[str, Callable[[], Parts]] = {
    "README.md": lambda: cifar10.first_parts(_record(cifar10.FOLDER / cifar10.RECORD_NAME)),
    "docs/guidance.md": _guidance_parts,
    "docs/metrics.md": lambda: lite_features.document_parts(_record(lite_features.RECORD)),
    "docs/own-images.md": lambda: own_images.document_parts(_record(own_images.FOLDER / own_images.RECORD_NAME)),
    "docs/reproduction.md": lambda: paper_tables.document_parts(_record(paper_tables.RECORD)),
    "docs/solvers.md": _solver_parts,
    "docs/toy.md": lambda: toy.document_parts(_record(toy.FOLDER / toy.RECORD_NAME)),
    "docs/tune.md": lambda: tune.document_parts(_record(tune.RECORD)),
    "docs/train-config.md": lambda: {"settings": settings_table(TrainConfig)},
    "experiments/cifar10/README.md": lambda: cifar10.document_parts(_record(cifar10.FOLDER / cifar10.RECORD_NAME)),
    "experiments/demo/README.md": lambda: demo.document_parts(_record(demo.FOLDER / demo.RECORDS_NAME)),
}


def help_text() -> str:
    """The content of help_pages.FILE."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = sorted(target.partition(":")[2] for target in project["scripts"].values())
    commands = {name: importlib.import_module(f"edm2kit.cli.{name}").main for name in names}
    commands["train doctor"] = importlib.import_module("edm2kit.cli.doctor").doctor
    return json.dumps(help_pages.pages_of(commands), indent=1) + "\n"


@click.command(cls=cli.Command)
@click.option("--check", is_flag=True, help="Write nothing; fail if a document differs from its records.")
def main(check: bool) -> None:
    """Write every generated part of README.md and docs/ from the records in experiments/ and benchmarks/."""
    root = documents.checkout()
    outdated = []
    for name, parts in DOCUMENTS.items():
        if not documents.is_current(root / name, parts()):
            outdated.append(name)
            if not check:
                documents.write_parts(root / name, parts())
    if help_pages.FILE.read_text(encoding="utf-8") != help_text():
        outdated.append(help_pages.FILE.name)
        if not check:
            help_pages.FILE.write_text(help_text(), encoding="utf-8")
    benchmarks_are_fine = _benchmark_documents(root, check)
    if check and outdated:
        raise ValueError(f"{', '.join(outdated)}: older than the records. Run python scripts/write_documents.py")
    if not benchmarks_are_fine:
        sys.exit(1)
    click.echo(f"Updated {', '.join(outdated)}" if outdated else f"{', '.join(DOCUMENTS)} are current")


def _benchmark_documents(root: Path, check: bool) -> bool:
    """Run benchmarks/report.py, which only works from the checkout's root; whether it succeeded."""
    words = [sys.executable, "-m", "benchmarks.report", *(["--check"] if check else [])]
    return subprocess.run(words, cwd=root).returncode == 0


if __name__ == "__main__":
    main()
