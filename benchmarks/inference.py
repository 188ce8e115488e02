"""One evaluation of a network: plain, frozen (as users get it), and compiled."""

import copy
from pathlib import Path

import click
import torch

from benchmarks import harness, networks
from benchmarks.harness import Comparison, Work, relative_error
from benchmarks.plain import PlainNetwork
from edm2kit.cli import click_types as cli
from edm2kit.models import compile_, freeze_
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.preconditioning import slow_precision

# job -> architecture, batch size, goals
JOBS = {
    "inference_small": (networks.SMALL, 16, {"frozen": 1.6, "frozen, bf16": 6.5, "frozen, bf16, compiled": 3.2}),
    "inference_xs64": (networks.XS64, 4, {"frozen": 1.3, "frozen, bf16": 7.0}),
    "inference_small_one_image": (networks.SMALL, 1, {"frozen": 2.0, "frozen, bf16": 4.2}),
}
_HALF = torch.bfloat16


@click.command(cls=cli.Command)
@harness.runs_option()
@harness.only_option(JOBS)
@click.option("--half", is_flag=True, help="Time bf16 even if the CPU has no instructions for it")
@click.option("--compiled", is_flag=True, help="Also compile the networks; takes minutes")
@harness.out_option
def main(runs: int, only: tuple[str, ...], half: bool, compiled: bool, out: Path) -> None:
    """Compare ways to evaluate D(x; sigma, labels); writes inference_*.json."""
    for name in only or JOBS:
        with torch.no_grad():
            harness.save(harness.measure(make_job(name, half, compiled), runs), out)


def make_job(name: str, half: bool, compiled: bool) -> Comparison:
    """The networks of one comparison, with the errors of their answers."""
    architecture, size, goals = JOBS[name]
    live, batch = networks.random_network(architecture).eval(), networks.random_batch(architecture, size)
    x = batch.x * batch.sigma.reshape(-1, 1, 1, 1)
    slow = None if half else slow_precision(_HALF)
    plain = PlainNetwork(architecture, live.state_dict())
    nets = {"plain": plain, "weights normalised at each call": live, "frozen": freeze_(copy.deepcopy(live))}
    if slow is None:
        rough = copy.deepcopy(live)
        rough.compute_dtype = _HALF
        nets["frozen, bf16"] = freeze_(rough)
    if compiled:
        nets["frozen and compiled"] = compile_(freeze_(copy.deepcopy(live)))
        if slow is None:
            rough = copy.deepcopy(live)
            rough.compute_dtype = _HALF
            nets["frozen, bf16, compiled"] = compile_(freeze_(rough))
    exact = plain(x, batch.sigma, batch.labels)
    return Comparison(
        name,
        {way: (lambda net=net: net(x, batch.sigma, batch.labels)) for way, net in nets.items()},
        work=Work(evaluation_cost(architecture).multiply_adds * size, "multiply-adds", "matmul_fp32"),
        ceilings={way: "matmul_bf16" for way in nets if "bf16" in way},
        goals=goals,
        errors={way: relative_error(net(x, batch.sigma, batch.labels), exact) for way, net in nets.items()},
        error_kind="of D, relative norm",
        notes={"batch": size, "skipped": {} if slow is None else {"frozen, bf16": slow}, **half_errors()},
    )


def half_errors() -> dict[str, float]:
    """Relative errors of one evaluation in bf16: of a small frozen network, and of a plain one under autocast."""
    architecture = networks.GUIDE
    live, batch = networks.random_network(architecture).eval(), networks.random_batch(architecture, 2)
    x = batch.x * batch.sigma.reshape(-1, 1, 1, 1)
    plain = PlainNetwork(architecture, live.state_dict())
    exact = plain(x, batch.sigma, batch.labels)
    with torch.autocast("cpu", _HALF):
        autocast = plain(x, batch.sigma, batch.labels).float()
    live.compute_dtype = _HALF
    rough = freeze_(live)(x, batch.sigma, batch.labels)
    return {"error_bf16": relative_error(rough, exact), "error_autocast_bf16": relative_error(autocast, exact)}


if __name__ == "__main__":
    main()
