"""The 2-D toy example of the autoguidance paper, from training to figures: `python scripts/toy_example.py --help`."""

from collections.abc import Sequence
from pathlib import Path

import click
from tqdm import tqdm

from edm2kit.cli.click_types import Group, IntRanges
from edm2kit.experiments.documents import checkout
from edm2kit.experiments.toy import closeup, drawing, evaluation, overview, page, report, tradeoff
from edm2kit.experiments.toy.methods import load_nets
from edm2kit.experiments.toy.mixture import can_compile
from edm2kit.experiments.toy.training import RECIPES, load_network, network_path, save_network, train
from edm2kit.torch_utils.dist import print0

_OUTDIR = click.option(
    "--outdir", type=click.Path(path_type=Path, file_okay=False), default="runs/toy", show_default=True,
    help="Folder of networks, figures and record.",
)  # fmt: skip
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Training seed.")
_SAMPLES = click.option(
    "--samples", type=click.IntRange(min=1), default=8192, show_default=True, help="Samples per method and weight."
)
_COMPILE = click.option(
    "--compile/--no-compile", "compiled", default=can_compile, show_default="where a C++ compiler is found",
    help="Let torch.compile speed up training and sampling, three to four times.",
)  # fmt: skip


@click.group(cls=Group)
def main() -> None:
    """The 2-D toy example of the autoguidance paper: a fractal-like tree, learned and guided in minutes on a CPU."""


@main.command("train")
@_OUTDIR
@click.option("--seeds", type=IntRanges(), default="0", show_default=True, help="Training seeds, such as 0 or 0-4.")
@_COMPILE
def train_(outdir: Path, seeds: tuple[int, ...], compiled: bool) -> None:
    """Train the main network and both guides of each seed; those already in OUTDIR are kept."""
    _train_missing(outdir, seeds, compiled)


@main.command()
@_OUTDIR
@_SEED
@click.option("--html", is_flag=True, help="Also write toy.html, a page with a slider for the weight.")
@_COMPILE
def plot(outdir: Path, seed: int, html: bool, compiled: bool) -> None:
    """Draw Figures 1 and 2 of the paper as PNG and PDF, and the trade-off curve once there is a record of it."""
    _plot(outdir, seed, html, compiled)


@main.command()
@_OUTDIR
@click.option(
    "--training-seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Seeds 0, 1, ...: how many."
)
@_SAMPLES
@_COMPILE
def evaluate(outdir: Path, training_seeds: int, samples: int, compiled: bool) -> None:
    """Measure every method at every weight; trains what is missing, writes evaluation.json and the trade-off curve."""
    _evaluate(outdir, range(training_seeds), samples, compiled)


@main.command("all")
@_OUTDIR
@_SEED
@_SAMPLES
@_COMPILE
def all_(outdir: Path, seed: int, samples: int, compiled: bool) -> None:
    """Train one seed, measure it and draw everything."""
    _evaluate(outdir, [seed], samples, compiled)
    _plot(outdir, seed, html=True, compiled=compiled)


@main.command()
@_OUTDIR
def publish(outdir: Path) -> None:
    """Copy record and figures from OUTDIR to experiments/toy in the checkout, and update docs/toy.md."""
    report.publish(outdir, checkout())
    print0(f"Updated {report.FOLDER} and {report.DOCUMENT} in {checkout()}")


def _train_missing(outdir: Path, seeds: Sequence[int], compiled: bool) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    jobs = []
    for role, seed in ((role, seed) for seed in seeds for role in RECIPES):
        if network_path(outdir, role, seed).exists():
            load_network(outdir, role, seed)  # a damaged one is to be told now, not after training the others
        else:
            jobs.append((role, seed))
    if jobs and not compiled:
        print0("Training without torch.compile, about three times slower; with a C++ compiler it would be used")
    for role, seed in jobs:
        recipe = RECIPES[role]
        with tqdm(total=recipe.iterations, desc=f"{role}, seed {seed}", mininterval=1) as bar:

            def advance(_: int, loss: float, bar: tqdm = bar) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            net = train(recipe, seed, compiled, advance)
        save_network(network_path(outdir, role, seed), net, recipe, seed)


def _evaluate(outdir: Path, seeds: Sequence[int], samples: int, compiled: bool) -> None:
    evaluation.check_num_samples(samples)
    drawing.check_can_draw()
    _train_missing(outdir, seeds, compiled)
    record = evaluation.evaluate(outdir, seeds, samples, compiled)
    evaluation.save_record(outdir, record)
    print0(report.table(record))
    tradeoff.draw(record, outdir / "tradeoff")
    print0(f"Wrote {outdir / evaluation.RECORD_NAME} and {outdir / 'tradeoff.png'}, .pdf")


def _plot(outdir: Path, seed: int, html: bool, compiled: bool) -> None:
    drawing.check_can_draw()
    nets = load_nets(outdir, seed, compiled and html)  # the page takes a hundred times the samples of the figures
    overview.draw(nets, seed, outdir / "figure1")
    closeup.draw(load_network(outdir, "main", seed), load_network(outdir, "guide", seed), seed, outdir / "figure2")
    written = ["figure1", "figure2"]
    if (outdir / evaluation.RECORD_NAME).exists():
        tradeoff.draw(evaluation.load_record(outdir), outdir / "tradeoff")
        written.append("tradeoff")
    print0(f"Wrote {', '.join(f'{name}.png and .pdf' for name in written)} to {outdir}")
    if html:
        page.write(nets, seed, outdir / "toy.html")
        print0(f"Wrote {outdir / 'toy.html'}")


if __name__ == "__main__":
    main()
