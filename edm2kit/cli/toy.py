"""The 2-D toy example of the autoguidance paper, from training to figures: `python scripts/toy_example.py --help`."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("toy")  # before torch is imported

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edm2kit.cli.click_types import Group, IntRanges, OutputFolder
from edm2kit.experiments.documents import checkout
from edm2kit.experiments.toy import evaluation, figures, page, plot_style, report
from edm2kit.experiments.toy.methods import load_nets
from edm2kit.experiments.toy.training import RECIPES, load_network, network_path, save_network, train
from edm2kit.models.compilation import can_compile
from edm2kit.torch_utils.dist import print0, progress_bar

_outdir = click.option(
    "--outdir",
    metavar="DIR",
    type=OutputFolder(),
    default="runs/toy",
    help="Folder of networks, figures and record",
)
_seed = click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Training seed")
_samples = click.option(
    "--samples", metavar="N", type=click.IntRange(min=1), default=8192, help="Samples per method and weight"
)
_compile = click.option(
    "--compile/--no-compile",
    "compiled",
    default=can_compile,
    show_default=False,
    help="Speed up training and sampling three to four times with torch.compile  [default: if there is a C++ compiler]",
)


@click.group(cls=Group)
def main() -> None:
    """The 2-D toy example of the autoguidance paper: learn and guide a fractal-like tree, in minutes on a CPU.

    \b
    python scripts/toy_example.py all
    python scripts/toy_example.py evaluate --training-seeds 5
    """


@main.command("train")
@_outdir
@click.option("--seeds", metavar="LIST", type=IntRanges(), default="0", help="Training seeds, e.g. 0 or 0-4")
@_compile
def train_(outdir: Path, seeds: tuple[int, ...], compiled: bool) -> None:
    """Train the main network and both guides for each seed; skips networks that are in OUTDIR already."""
    _train_missing(outdir, seeds, compiled)


@main.command()
@_outdir
@_seed
@click.option("--html", is_flag=True, help="Also write toy.html, a page with a slider for the weight")
@_compile
def plot(outdir: Path, seed: int, html: bool, compiled: bool) -> None:
    """Plot Figures 1 and 2 of the paper as PNG and PDF, and the trade-off if OUTDIR has a record."""
    _plot(outdir, seed, html, compiled)


@main.command()
@_outdir
@click.option(
    "--training-seeds",
    metavar="N",
    type=click.IntRange(min=1),
    default=5,
    help="Number of training seeds, starting at 0",
)
@_samples
@_compile
def evaluate(outdir: Path, training_seeds: int, samples: int, compiled: bool) -> None:
    """Measure every method at every weight; writes evaluation.json and the trade-off figure.

    Networks that are missing are trained first.
    """
    _evaluate(outdir, range(training_seeds), samples, compiled)


@main.command("all")
@_outdir
@_seed
@_samples
@_compile
def all_(outdir: Path, seed: int, samples: int, compiled: bool) -> None:
    """Train one seed, measure it and plot everything."""
    _evaluate(outdir, [seed], samples, compiled)
    _plot(outdir, seed, html=True, compiled=compiled)


@main.command()
@_outdir
def publish(outdir: Path) -> None:
    """Copy record and figures from OUTDIR to experiments/toy in the checkout, and update docs/toy.md."""
    report.publish(outdir, checkout())
    print0(f"Updated {report.FOLDER} and {report.DOCUMENT} in {checkout()}")


def _train_missing(outdir: Path, seeds: Sequence[int], compiled: bool) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    missing = []
    for seed in seeds:
        for role in RECIPES:
            if network_path(outdir, role, seed).exists():
                load_network(outdir, role, seed)  # reports a damaged file now, not after training the others
            else:
                missing.append((role, seed))
    if missing and not compiled:
        print0("Training without torch.compile, about three times slower. Install a C++ compiler to use it")
    for role, seed in missing:
        recipe = RECIPES[role]
        with progress_bar(recipe.iterations, "it", what=f"{role}, seed {seed}") as bar:

            def advance(_: int, loss: float, bar: Any = bar) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            net = train(recipe, seed, compiled, advance)
        save_network(network_path(outdir, role, seed), net, recipe, seed)


def _evaluate(outdir: Path, seeds: Sequence[int], samples: int, compiled: bool) -> None:
    evaluation.check_num_samples(samples)
    plot_style.check_can_draw()
    _train_missing(outdir, seeds, compiled)
    record = evaluation.evaluate(outdir, seeds, samples, compiled)
    evaluation.save_record(outdir, record)
    print0(report.table(record))
    figures.draw_tradeoff(record, outdir / "tradeoff")
    print0(f"Wrote {outdir / evaluation.RECORD_NAME} and {outdir / 'tradeoff.png'}, .pdf")


def _plot(outdir: Path, seed: int, html: bool, compiled: bool) -> None:
    plot_style.check_can_draw()
    # compiling only pays off for the page, which needs a hundred times the samples of the figures
    nets = load_nets(outdir, seed, compiled and html)
    main_net, guide_net = load_network(outdir, "main", seed), load_network(outdir, "guide", seed)
    figures.draw_samples(nets, seed, outdir / "figure1")
    figures.draw_detail(main_net, guide_net, seed, outdir / "figure2")
    written = ["figure1", "figure2"]
    if (outdir / evaluation.RECORD_NAME).exists():
        figures.draw_tradeoff(evaluation.load_record(outdir), outdir / "tradeoff")
        written.append("tradeoff")
    print0(f"Wrote {', '.join(f'{name}.png and .pdf' for name in written)} to {outdir}")
    if html:
        page.write(nets, seed, outdir / "toy.html")
        print0(f"Wrote {outdir / 'toy.html'}")


if __name__ == "__main__":
    main()
