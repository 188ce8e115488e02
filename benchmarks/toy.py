"""One training iteration of the toy's main network, with two ways to compute the exact score."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import torch

from benchmarks import harness
from benchmarks.harness import Comparison, Work
from benchmarks.plain_io import EigenMixture
from edm2kit.cli import click_types as cli
from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ToyNet
from edm2kit.experiments.toy.training import BATCH_SIZE, EMA_STD, RECIPES, REF_LR, noisy_batch, score_matching_loss
from edm2kit.experiments.toy.tree import components
from edm2kit.models.compilation import can_compile
from edm2kit.models.layers import normalize_weights_


@click.command(cls=cli.Command)
@harness.runs_option()
@harness.out_option
def main(runs: int, out: Path) -> None:
    """Compare the closed form with batched eigenvectors; writes toy_iteration.json."""
    parts = components(RECIPES["main"].classes)
    exact = Mixture(parts)
    plain = SimpleNamespace(sample=exact.sample, score=EigenMixture(parts.phi, parts.mu, parts.Sigma).score)
    contenders = {"plain": iteration(plain), "closed form": iteration(exact)}
    if can_compile():
        contenders["closed form, compiled"] = iteration(Mixture(parts, compiled=True), torch.compile)
    default = list(contenders)[-1]
    x, sigma = noisy_batch(exact, torch.Generator().manual_seed(0))
    truth = exact.score(x.double(), sigma.double())
    ours, eigen = (harness.relative_error(way.score(x, sigma), truth) for way in (exact, plain))
    job = Comparison(
        "toy_iteration",
        contenders,
        work=Work(BATCH_SIZE, "points"),
        goals={default: 20},
        errors={"plain": eigen, default: ours},
        error_kind="of the float32 score against float64, relative norm",
        notes={"network": "main", "points": BATCH_SIZE, "default": default},
    )
    harness.save(harness.measure(job, runs), out)


def iteration(truth: Mixture | SimpleNamespace, compiled: Callable = lambda function: function) -> Callable[[], None]:
    """One iteration of edm2kit.experiments.toy.training.train."""
    net = ToyNet(RECIPES["main"].width)
    optimizer = torch.optim.Adam(net.parameters(), lr=REF_LR, betas=(0.9, 0.99))
    ema, loss_of = PowerFunctionEMA(net, [EMA_STD]), compiled(score_matching_loss)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        normalize_weights_(net)
        x, sigma = noisy_batch(truth, generator)
        loss = loss_of(net, x, sigma, truth.score(x, sigma))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(BATCH_SIZE, BATCH_SIZE)

    return run


if __name__ == "__main__":
    main()
