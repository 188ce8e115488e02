"""Guided images from start to end: two networks, 32 Heun steps, plain and as users get them."""

import copy
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks import harness, networks
from benchmarks.harness import Comparison, Work, relative_error
from benchmarks.plain import PlainNetwork, guided_heun
from edm2kit.cli import click_types as cli
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.network_call import Perturbed
from edm2kit.guidance.own_network.pag import METHOD as PAG
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.edm2 import Precond, freeze_
from edm2kit.models.preconditioning import slow_precision
from edm2kit.sampling.solvers import edm_sampler

_STEPS, _BATCH, _WEIGHT = 32, 8, 1.7
_EVALUATIONS = 2 * _STEPS - 1


@click.command(cls=cli.Command)
@harness.runs_option(3)
@harness.only_option(["pair", "batched"])
@harness.out_option
@torch.no_grad()
def main(runs: int, only: tuple[str, ...], out: Path) -> None:
    """Compare guided sampling, and two guided calls with one of twice the batch; writes sampling_*.json."""
    net = networks.random_network(networks.SMALL, seed=0).eval()
    guide_net = networks.random_network(networks.GUIDE, seed=1).eval()
    names = only or ("pair", "batched")
    if "pair" in names:
        harness.save(harness.measure(pair_job(net, guide_net), runs, warmup=0), out)
    if "batched" in names:
        harness.save(harness.measure(batched_job(freeze_(copy.deepcopy(net))), harness.RUNS), out)


def pair_job(net: Precond, guide_net: Precond) -> Comparison:
    """The main network guided by a narrower one, in all steps."""
    plain = [PlainNetwork(a, n.state_dict()) for a, n in ((networks.SMALL, net), (networks.GUIDE, guide_net))]
    noise, _, labels = networks.random_batch(networks.SMALL, _BATCH)
    ways = {"plain": partial(guided_heun, *plain, _WEIGHT)}
    slow = slow_precision(torch.bfloat16)
    for way, dtype in {"frozen": torch.float32, **({} if slow else {"frozen, bf16": torch.bfloat16})}.items():
        ways[way] = partial(edm_sampler, Guided(*(_frozen(n, dtype) for n in (net, guide_net)), _WEIGHT))
    work = sum(evaluation_cost(a).multiply_adds for a in (networks.SMALL, networks.GUIDE)) * _BATCH * _EVALUATIONS
    images = {way: run(noise, labels, num_steps=_STEPS) for way, run in ways.items()}
    return Comparison(
        "sampling_guided_pair",
        {way: partial(run, noise, labels, num_steps=_STEPS) for way, run in ways.items()},
        work=Work(work, "multiply-adds", "matmul_fp32"),
        ceilings={"frozen, bf16": "matmul_bf16"},
        goals={"frozen": 1.8},
        errors={way: relative_error(found, images["plain"]) for way, found in images.items()},
        error_kind="of the finished images, relative norm, at the same noise",
        notes={
            "images": _BATCH,
            "steps": _STEPS,
            "weight": _WEIGHT,
            "skipped": {} if slow is None else {"frozen, bf16": slow},
        },
    )


def _frozen(net: Precond, dtype: torch.dtype) -> Precond:
    copied = copy.deepcopy(net)
    copied.compute_dtype = dtype
    return freeze_(copied)


def batched_job(net: Precond) -> Comparison:
    """The main network and itself with perturbed attention (PAG): two calls, or one of twice the batch."""
    batch = networks.random_batch(networks.SMALL, 4)
    x = batch.x * batch.sigma.reshape(-1, 1, 1, 1)
    perturbed = PAG.negative(Parts(net), **{option.keyword: option.default for option in PAG.options})
    assert isinstance(perturbed, Perturbed)
    ways = {"two calls": Guided(net, perturbed, 2.0), "one call": guide(Choice("pag", 2.0), Parts(net))}
    D = {way: way_to(x, batch.sigma, batch.labels) for way, way_to in ways.items()}
    return Comparison(
        "sampling_batched_calls",
        {way: partial(way_to, x, batch.sigma, batch.labels) for way, way_to in ways.items()},
        work=Work(2 * len(x) * evaluation_cost(networks.SMALL).multiply_adds, "multiply-adds", "matmul_fp32"),
        errors={way: relative_error(found, D["two calls"]) for way, found in D.items()},
        error_kind="of guided D, relative norm",
        notes={"images": len(x), "plain": "here: the frozen network, called twice"},
    )


if __name__ == "__main__":
    main()
