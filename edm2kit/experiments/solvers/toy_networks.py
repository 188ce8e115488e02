"""Solvers on the networks of the 2-D toy: how many evaluations each needs, alone and autoguided."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.experiments.documents import markdown_table
from edm2kit.experiments.solvers.convergence import ALLOWANCE, BY_NAME, HEUN_STEPS, MEASURED, Solver
from edm2kit.experiments.toy.measures import Yardstick
from edm2kit.experiments.toy.methods import SIGMA_MAX, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ScoreDenoiser, fast_score
from edm2kit.experiments.toy.training import load_network
from edm2kit.experiments.toy.tree import components
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import SOLVERS
from edm2kit.torch_utils.files import provenance

WEIGHT = 2.0  # of autoguidance
STEPS = (4, 6, 8, 10, 12, 16, 20, 24, 32)
FINE_STEPS = 128  # of Heun, for the solution of the ODE
TOLERANCE = 0.01  # of the share of samples outside the 99% level
_MEASURES = ("outside", "mean_log_density")


def load_denoiser(outdir: Path, role: str, seed: int) -> Denoiser:
    """The network for `role`, "main" or "guide", of one training seed. Raises ValueError if it is missing."""
    return ScoreDenoiser(fast_score(load_network(outdir, role, seed), compiled=False))


def measure_toy(outdir: Path, seed: int, num: int, steps: Sequence[int] = STEPS) -> dict[str, Any]:
    """Measures of `num` samples of every solver and number of steps, for the networks of one training seed in `outdir`.

    `error` is the root mean square distance to the solution of the network's ODE, per coordinate; the others compare
    with the exact distribution. Raises ValueError if a network is missing.
    """
    main, guide_net = (load_denoiser(outdir, role, seed) for role in ("main", "guide"))
    noise = start(num, seed)
    yardstick = Yardstick.of(Mixture(components("A")), num, seed)
    denoisers = {"alone": main, "autoguided": guide(Choice("autoguidance", WEIGHT), Parts(main, guide_net))}
    results = {}
    for name, denoiser in denoisers.items():
        solution = _solve(SOLVERS["heun"], denoiser, noise, FINE_STEPS)

        def measured(x: torch.Tensor, solution: torch.Tensor = solution) -> dict[str, float]:
            found = yardstick.measure(x)
            error = float((x - solution).square().mean().sqrt())
            return {"error": error, **{key: found[key] for key in _MEASURES}}

        rows = {}
        for solver_name in BY_NAME:
            solver, cost, _ = MEASURED[solver_name]
            points = [measured(_solve(solver, denoiser, noise, count)) for count in steps]
            rows[solver_name] = {"evaluations": [cost(count) for count in steps], "points": points}
        heun = measured(_solve(SOLVERS["heun"], denoiser, noise, HEUN_STEPS))
        results[name] = {"solution": measured(solution), "heun": heun, "solvers": rows}
    return {
        "steps": list(steps),
        "num_samples": num,
        "training_seed": seed,
        "weight": WEIGHT,
        "heun_steps": HEUN_STEPS,
        "results": results,
        "provenance": provenance(),
    }


def _solve(solver: Solver, denoiser: Denoiser, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    return solver(denoiser, noise, karras_sigmas(num_steps, 0.002, SIGMA_MAX, 7.0, torch.float32)).flatten(1)


def fewest(evaluations: Sequence[int], are_good: Sequence[bool]) -> int | None:
    """The fewest evaluations from which on all are good; None if the last one is not."""
    found = None
    for count, is_good in zip(evaluations, are_good, strict=True):
        if not is_good:
            found = None
        elif found is None:
            found = count
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: the evaluations of each solver for outliers, or an error, within 1 % of those of 32 Heun steps."""
    results = record["results"]
    head = ["solver", *(f"outliers, {name}" for name in results), *(f"error, {name}" for name in results)]
    lines = []
    for solver in next(iter(results.values()))["solvers"]:
        cells = [f"`{solver}`"]
        for measure in ("outside", "error"):
            for found in results.values():
                row, heun = found["solvers"][solver], found["heun"]
                goal = heun["outside"] + TOLERANCE if measure == "outside" else heun["error"] * ALLOWANCE
                are_good = [point[measure] <= goal for point in row["points"]]
                count = fewest(row["evaluations"], are_good)
                cells.append(f"more than {row['evaluations'][-1]}" if count is None else str(count))
        lines.append(cells)
    return markdown_table(head, lines, "l" + "r" * (len(head) - 1))
