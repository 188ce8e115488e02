"""Solvers on networks of images: how many evaluations each needs, alone and autoguided."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.experiments.documents import markdown_table
from edm2kit.experiments.solvers.convergence import (
    ALLOWANCE,
    BY_NAME,
    HEUN_STEPS,
    MEASURED,
    RHO,
    SIGMA_MAX,
    SIGMA_MIN,
    Solver,
)
from edm2kit.experiments.solvers.toy_networks import fewest
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import SOLVERS
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.torch_utils.files import provenance, sha256_of
from edm2kit.torch_utils.rng import StackedGenerator

STEPS = (5, 6, 8, 10, 12, 16, 20, 24, 32)
FINE_STEPS = 128  # of Heun, for the solution of the ODE
GREY_LEVEL = 2 / 255  # of pixels in [-1, 1]


def measure_images(net: Path, gnet: Path, weight: float, num: int, steps: Sequence[int] = STEPS) -> dict[str, Any]:
    """The error of every solver and number of steps on `num` images of a network, alone and led away from `gnet`.

    It is the root mean square distance, per value in [-1, 1], to the solution of the ODE by many Heun steps. Both files
    are snapshots; images have the classes 0, 1, ... in turn.
    """
    device = torch.device("cpu")
    main, guide_net = load_snapshot(net, device).net, load_snapshot(gnet, device).net
    noise = StackedGenerator(device, range(num)).randn([num, main.img_channels, *[main.img_resolution] * 2])
    labels = None
    if main.label_dim:
        labels = torch.nn.functional.one_hot(torch.arange(num) % main.label_dim, main.label_dim).float()
    denoisers: dict[str, Denoiser] = {
        "alone": main,
        "autoguided": guide(Choice("autoguidance", weight), Parts(main, guide_net)),
    }

    def solve(solver: Solver, denoiser: Denoiser, count: int) -> torch.Tensor:
        return solver(denoiser, noise, karras_sigmas(count, SIGMA_MIN, SIGMA_MAX, RHO, torch.float32), labels)

    results = {}
    for name, denoiser in denoisers.items():
        solution = solve(SOLVERS["heun"], denoiser, FINE_STEPS)

        def error(x: torch.Tensor, solution: torch.Tensor = solution) -> float:
            return float((x - solution).square().mean().sqrt())

        rows = {}
        for solver_name in BY_NAME:
            solver, cost, _ = MEASURED[solver_name]
            errors = [error(solve(solver, denoiser, count)) for count in steps]
            rows[solver_name] = {"evaluations": [cost(count) for count in steps], "errors": errors}
        results[name] = {"heun": error(solve(SOLVERS["heun"], denoiser, HEUN_STEPS)), "solvers": rows}
    return {
        "files": {path.name: sha256_of(path) for path in (net, gnet)},
        "steps": list(steps),
        "num_images": num,
        "weight": weight,
        "results": results,
        "provenance": provenance(),
    }


def table(record: Mapping[str, Any]) -> str:
    """Markdown: the evaluations from which on the error is within 1 % of 32 Heun steps, and at most a grey level."""
    results = record["results"]
    head = [
        "solver",
        *(f"error of 32 Heun steps, {name}" for name in results),
        *(f"a grey level, {n}" for n in results),
    ]
    lines = []
    for solver in next(iter(results.values()))["solvers"]:
        cells = [f"`{solver}`"]
        heun = {name: ALLOWANCE * found["heun"] for name, found in results.items()}
        for goals in (heun, dict.fromkeys(results, GREY_LEVEL)):
            for name, goal in goals.items():
                row = results[name]["solvers"][solver]
                count = fewest(row["evaluations"], [error <= goal for error in row["errors"]])
                cells.append(f"more than {row['evaluations'][-1]}" if count is None else str(count))
        lines.append(cells)
    return markdown_table(head, lines, "l" + "r" * (len(head) - 1))
