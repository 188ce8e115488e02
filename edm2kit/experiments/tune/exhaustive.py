"""Does the search find the best? A complete grid on small networks, and searches with a tenth of its images.

    python -m edm2kit.experiments.tune.exhaustive --main runs/main --guide runs/guide --ref ref.npz \\
        --metric fd_random --outdir runs/exhaustive -- --steps 8

Grid and searches use the same seeds, so a search that ends at the best cell of the grid has exactly its value.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.experiments.documents import checkout, markdown_table, write_parts
from edm2kit.experiments.tune.budget import Budget
from edm2kit.experiments.tune.halving import best_of, rungs_for
from edm2kit.experiments.tune.objective import Objective
from edm2kit.experiments.tune.proposals import require_optuna
from edm2kit.experiments.tune.search import Plan, run_search
from edm2kit.experiments.tune.sources import NetworkCache, open_source_of_networks
from edm2kit.experiments.tune.space import BASELINE, Candidate, Space, make_ways
from edm2kit.experiments.tune.study import SharedStudy
from edm2kit.guidance.registry import NO_GUIDANCE
from edm2kit.metrics.scoring import make_scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import provenance, write_json

RECORD = Path("experiments", "tune", "record.json")
DOCUMENT = Path("docs", "tune.md")
_LENGTHS = (0.05, 0.0707, 0.1)
_WEIGHT_INTERVALS = 8
_SHARE = 10  # a search may generate one image for so many of the grid
_SEEDS = (0, 1)


def measure_both(main: str, guide: str, ref: str, metric: str, num: int, outdir: Path, words: tuple[str, ...]) -> Any:
    """The record of the grid and of two searches. What was measured before is kept in `outdir`."""
    with dist.session("cpu") as device:
        main_source, guide_source = open_source_of_networks("main", main), open_source_of_networks("guide", guide)
        ways = make_ways(["autoguidance"], main_source, [guide_source], words)
        ages = (guide_source.times[0], guide_source.times[-1])
        space = Space(
            main_source,
            replace(ways["autoguidance"].request, guidance=NO_GUIDANCE, gnet=None),
            ways,
            _LENGTHS,
            {("guide", age): tuple(guide_source.lengths(age, _LENGTHS)) for age in ages},
            {"guide": ages},
            {"autoguidance": (1.0, 3.0)},
            weight_intervals=_WEIGHT_INTERVALS,
        )
        scorer = make_scorer(ref, device, [metric])
        cache = NetworkCache([main_source, guide_source], device, "fp32", 1 << 30)
        objective = Objective(space, cache, scorer, metric, num, outdir / "grid")
        grid: dict[str, float] = {}
        with progress_bar(space.count, "cell", what="grid") as bar:
            for values in _cells(space):
                candidate = space.candidate(values)
                grid[candidate.key] = objective.value(objective.measure(candidate, num))
                bar.update()
        record: dict[str, Any] = {
            "command": f"python -m edm2kit.experiments.tune.exhaustive {shlex.join(sys.argv[1:])}",
            "metric": metric,
            "num_images": num,
            "grid": [{"candidate": key, "value": value} for key, value in grid.items()],
            "grid_images": len(grid) * num,
            "unguided": objective.value(objective.measure(space.candidate(BASELINE), num)),
            "searches": [],
            **provenance(device),
        }
        for seed in _SEEDS:
            plan = Plan(rungs_for(num, 2), Budget(images=len(grid) * num // _SHARE), seed)
            record["searches"].append(_searched(objective, plan, outdir / f"search-{seed}"))
        return record


def _searched(objective: Objective, plan: Plan, folder: Path) -> dict[str, Any]:
    """The record of one search."""
    own = replace(objective, folder=folder / "features")

    def measure(candidate: Candidate, num_images: int) -> tuple[float, Mapping[str, float]]:
        measured = own.measure(candidate, num_images)
        return own.value(measured), measured.values

    with SharedStudy(folder, {"seed": plan.seed}) as study:
        run_search(study, own.space, plan, BASELINE, measure)
        found = study.evaluations()
    best = best_of(found)
    assert best is not None
    return {
        "seed": plan.seed,
        "images": sum(one.cost for one in found),
        "candidates": len({one.key for one in found}),
        "best": best.key,
        "value": best.value,
        "seconds": round(sum(one.seconds for one in found), 1),
    }


def _cells(space: Space) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{"way": "autoguidance"}]
    for name, count in space.sizes("autoguidance").items():
        cells = [{**cell, name: k} for cell in cells for k in range(count)]
    return cells


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The part of docs/tune.md that comes from the record."""
    values = sorted(cell["value"] for cell in record["grid"])
    best, metric = values[0], record["metric"]
    rows = [
        ["main network alone", "", f"{record['unguided']:.4g}", ""],
        [
            "median cell of the grid",
            "",
            f"{values[len(values) // 2]:.4g}",
            f"{values[len(values) // 2] / best - 1:+.1%}",
        ],
        [f"complete grid, {len(values)} cells", f"{record['grid_images']:,}", f"{best:.4g}", ""],
    ]
    for one in record["searches"]:
        name = f"search, seed {one['seed']}, {one['candidates']} candidates"
        rows.append([name, f"{one['images']:,}", f"{one['value']:.4g}", f"{one['value'] / best - 1:+.1%}"])
    table = markdown_table(["", "images", f"{metric}, {record['num_images']} images", "against the best"], rows, "lrrr")
    note = (
        f"Measured on {record['hardware']}, commit {record['commit'][:12]}, by `edm2kit.experiments.tune.exhaustive`."
    )
    return {"tune": f"{table}\n\n{note}"}


@click.command(cls=cli.Command)
@click.option("--main", "main_run", required=True, help="Run folder of the main network")
@click.option("--guide", required=True, help="Run folder of the guide")
@click.option("--ref", required=True, help="Reference statistics")
@click.option("--metric", default="fd_random", help="Metric, small values being good")
@click.option("--num", default=90, help="Images per cell")
@click.option("--outdir", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of results")
@click.option("--publish", is_flag=True, help="Also update experiments/tune/ and docs/tune.md in the checkout")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def main(
    main_run: str, guide: str, ref: str, metric: str, num: int, outdir: Path, publish: bool, words: tuple[str, ...]
) -> None:
    """Measure a complete grid, and two searches with a tenth of its images."""
    require_optuna()
    record = measure_both(main_run, guide, ref, metric, num, outdir, words)
    write_json(outdir / "record.json", record)
    click.echo(document_parts(record)["tune"])
    if publish:
        write_json(checkout() / RECORD, record)
        write_parts(checkout() / DOCUMENT, document_parts(record))


if __name__ == "__main__":
    main()
