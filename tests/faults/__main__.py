"""The long form: hundreds of random faults for each family of commands.

    python -m tests.faults --faults 200 --family train

Writes benchmarks/records/faults.json, which docs/reliability.md reports.
"""

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.files import provenance
from tests.faults.families import FAMILIES, Family
from tests.faults.processes import Server
from tests.faults.trial import Ready, Verdict, attempt, get_ready, plan


@click.command(cls=cli.Command)
@click.option("--family", "names", type=click.Choice(list(FAMILIES)), multiple=True, help="Only this one; repeatable")
@click.option("--faults", metavar="N", type=cli.AtLeast(int, 1), default=200, help="Faults per family")
@click.option("--only", metavar="K", type=cli.AtLeast(int, 0), help="Only the fault of this number, and print it")
@click.option("--again", is_flag=True, help="Only the faults of the record that broke a promise, once that is mended")
@click.option(
    "--more", is_flag=True, help="Only the faults that the record lacks, up to --faults; they are added to it"
)
@click.option("--seed", metavar="N", type=int, default=0, help="Seed of the faults")
@click.option("--max-sec", metavar="SEC", type=cli.AtLeast(float, 1), default=36000.0, help="Time per family, at most")
@harness.out_option
def main(
    names: tuple[str, ...],
    faults: int,
    only: int | None,
    again: bool,
    more: bool,
    seed: int,
    max_sec: float,
    out: Path,
) -> None:
    """Break commands in every way and run them again; writes faults.json.

    The exit code is 1 if a promise was broken; the record then holds what happened.
    """
    torch.set_num_threads(1)
    path = out / "faults.json"
    record = json.loads(path.read_text()) if path.exists() else {"job": "faults", "families": {}}
    for name in names or FAMILIES:
        before = record["families"].get(name, {"faults": 0, "kinds": {}, "problems": [], "elapsed_sec": 0.0})
        wanted: set[int] | None = None
        if only is not None:
            wanted = {only}
        elif again:
            wanted = {one["number"] for one in before["problems"]}
        elif more:
            wanted = set(range(before["faults"], faults))
        if wanted is not None and not wanted:
            continue
        found = run(FAMILIES[name], faults, wanted, before.get("seed", seed) if again or more else seed, max_sec)
        click.echo(
            f"{name}: {found['faults']} faults in {found['elapsed_sec']:.0f} s, {len(found['problems'])} problems"
        )
        if only is not None:
            continue
        if again:
            found = corrected(before, found)
        elif more:
            found = added(before, found)
        record["families"][name] = found
        record |= {"command": harness.command(), "provenance": provenance(), "cpu": harness.cpu()}
        harness.save(record, out)
    if any(found["problems"] for found in record["families"].values()):
        raise ValueError(f"promises were broken; see {path}")


def corrected(before: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """The record of a family in which the trials that broke a promise are replaced by their repetitions."""
    kinds = {kind: Counter(counts) for kind, counts in before["kinds"].items()}
    for kind in kinds:
        kinds[kind]["broken"] = 0
        kinds[kind].update(again["kinds"].get(kind, {}))
    mended = {one["number"] for one in before["problems"]} - {one["number"] for one in again["problems"]}
    return {
        **before,
        "kinds": {kind: {outcome: n for outcome, n in counts.items() if n} for kind, counts in kinds.items()},
        "problems": again["problems"],
        "mended": before.get("mended", []) + [one for one in before["problems"] if one["number"] in mended],
    }


def added(before: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The record of a family with further trials."""
    kinds = {kind: Counter(before["kinds"].get(kind, {})) for kind in sorted({*before["kinds"], *more["kinds"]})}
    for kind, counts in more["kinds"].items():
        kinds[kind].update(counts)
    return {
        **before,
        "faults": before["faults"] + more["faults"],
        "kinds": {kind: dict(counts) for kind, counts in kinds.items()},
        "problems": before["problems"] + more["problems"],
        "seed": more["seed"],
        "elapsed_sec": round(before["elapsed_sec"] + more["elapsed_sec"], 1),
    }


def run(family: Family, faults: int, only: set[int] | None, seed: int, max_sec: float) -> dict[str, Any]:
    """Try a family's faults; counts by kind and outcome, and everything that broke a promise."""
    verdicts: list[tuple[int, Verdict]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as name, Server(family.commands) as server:
        place = Path(name)
        (place / "inputs").mkdir()
        family.prepare(place / "inputs", server)
        ready: dict[str, Ready] = {}
        for number, (variant, kind, rng) in enumerate(plan(family, faults, seed)):
            if only is not None and number not in only:
                continue
            if time.monotonic() - began > max_sec:
                break
            if variant.name not in ready:
                ready[variant.name] = get_ready(family, variant, place / "inputs", place / "trial", server)
            verdict = attempt(ready[variant.name], kind, rng, place / "trial", server)
            verdicts.append((number, verdict))
            for problem in verdict.problems:
                click.echo(f"{family.name} {number}: {verdict.variant}, {kind}, {verdict.fault}: {problem}")
            if only is not None:
                click.echo(f"{number}: {verdict}")
    return summary(verdicts) | {"seed": seed, "elapsed_sec": round(time.monotonic() - began, 1)}


def summary(verdicts: list[tuple[int, Verdict]]) -> dict[str, Any]:
    """Counts by kind and outcome; every trial with a problem."""
    kinds: dict[str, Counter[str]] = {}
    for _, verdict in verdicts:
        kinds.setdefault(verdict.kind, Counter())["broken" if verdict.problems else verdict.outcome] += 1
    return {
        "faults": len(verdicts),
        "kinds": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "problems": [
            {
                "number": number,
                "kind": verdict.kind,
                "variant": verdict.variant,
                "fault": vars(verdict.fault),
                "problems": verdict.problems[:5],
            }
            for number, verdict in verdicts
            if verdict.problems
        ],
    }


if __name__ == "__main__":
    main()
