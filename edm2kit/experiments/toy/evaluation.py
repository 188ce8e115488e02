"""All methods measured over training seeds, as a record from which tables and figures are made."""

import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edm2kit.experiments.documents import read_object
from edm2kit.experiments.toy.measures import MEASURES, Yardstick
from edm2kit.experiments.toy.methods import NUM_STEPS, SIGMA_MAX, TOY_METHODS, load_nets, sample, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.tree import components
from edm2kit.torch_utils.dist import print0
from edm2kit.torch_utils.files import atomic_write, check_type, provenance, short
from edm2kit.torch_utils.rng import derive_seed

RECORD_NAME = "evaluation.json"
TRUTH, UNGUIDED = "truth", "unguided"


def check_num_samples(num: int) -> None:
    """Raises ValueError for so few samples that even the exact distribution could leave a branch empty."""
    enough = math.ceil(1 / components("A").branch_mass.min())
    if num < enough:
        raise ValueError(
            f"{num} samples are too few to tell a lost branch from chance: the thinnest branch gets "
            f"{num / enough:.2g} of them on average. Use --samples {enough} or more"
        )


def evaluate(outdir: Path, seeds: Sequence[int], num: int, compiled: bool) -> dict[str, Any]:
    """The MEASURES of `num` samples of every method at every weight, for the networks of each training seed.

    The training seed also decides the starting points. Raises ValueError if a network is missing, and for too few
    samples.
    """
    check_num_samples(num)
    began = time.monotonic()
    rows = []
    for seed in seeds:
        rows += _rows_of_seed(outdir, seed, num, compiled)
        print0(f"Evaluated training seed {seed}: {len(rows)} rows in {time.monotonic() - began:.0f} s")
    return {
        "command": shlex.join(["python", "scripts/toy_example.py", *sys.argv[1:]]),
        "elapsed_sec": round(time.monotonic() - began, 1),
        "provenance": provenance(),
        "training_seeds": list(seeds),
        "num_samples": num,
        "num_steps": NUM_STEPS,
        "sigma_max": SIGMA_MAX,
        "rows": rows,
    }


def _rows_of_seed(outdir: Path, seed: int, num: int, compiled: bool) -> list[dict[str, Any]]:
    nets, noise = load_nets(outdir, seed, compiled), start(num, seed)
    truth = Mixture(components("A"), compiled)
    yardstick = Yardstick.of(truth, num, seed)
    exact = truth.sample(num, torch.Generator().manual_seed(derive_seed(seed, "toy exact")))
    rows = [
        {"method": TRUTH, "weight": 1.0, "seed": seed, **yardstick.measure(exact)},
        {"method": UNGUIDED, "weight": 1.0, "seed": seed, **yardstick.measure(sample(nets.main, noise))},
    ]
    for name, method in TOY_METHODS.items():
        for weight in method.weights:
            x = sample(method.denoiser(nets, weight), noise)
            rows.append({"method": name, "weight": weight, "seed": seed, **yardstick.measure(x)})
    return rows


def save_record(outdir: Path, record: dict[str, Any]) -> None:
    """Write the record with one line per row."""
    head = json.dumps({**record, "rows": []}, indent=2).rstrip()
    body = ",\n".join(f"    {json.dumps(row)}" for row in record["rows"])
    with atomic_write(outdir / RECORD_NAME, "w") as file:
        file.write(head.replace('"rows": []', f'"rows": [\n{body}\n  ]') + "\n")


def load_record(outdir: Path) -> dict[str, Any]:
    """The record in `outdir`. Raises ValueError if it is missing or damaged."""
    path = outdir / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Run `toy_example.py evaluate --outdir {outdir}` first")
    try:
        record = read_object(path)
        for name, hint in {"training_seeds": list[int], "num_samples": int, "rows": list[Mapping[str, Any]]}.items():
            check_type(record.get(name), hint, name)
        for number, row in enumerate(record["rows"]):
            check_type(row.get("method"), str, f"rows[{number}].method")
            for name in ("weight", *MEASURES):
                if not isinstance(row.get(name), int | float):
                    raise ValueError(f"rows[{number}].{name} must be a number; got {short(row.get(name))}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and evaluate again") from error
    return record


@dataclass(frozen=True)
class Spread:
    """Mean over training seeds and standard deviation between them; 0 for a single seed."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def summary(record: Mapping[str, Any], method: str, weight: float) -> dict[str, Spread]:
    """Each of MEASURES over the training seeds, for one method at one weight.

    Raises ValueError if the record does not have them.
    """
    rows = [row for row in record["rows"] if (row["method"], row["weight"]) == (method, weight)]
    if not rows:
        raise ValueError(f"the record has no row of {method} at weight {weight:g}. Evaluate again")
    spreads = {}
    for name in MEASURES:
        values = [row[name] for row in rows]
        spreads[name] = Spread.of(values)
    return spreads
