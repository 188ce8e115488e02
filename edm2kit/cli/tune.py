"""Find the settings of guidance: which guide, its age, both EMA lengths, weight and interval."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("tune")  # before torch is imported

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import Interval
from edm2kit.cli.generation import Request, prepare
from edm2kit.cli.image_source import image_batches, open_images
from edm2kit.experiments.tune import probe_report
from edm2kit.experiments.tune.budget import Budget, duration, parse_budget
from edm2kit.experiments.tune.halving import rungs_for
from edm2kit.experiments.tune.objective import Objective, direction
from edm2kit.experiments.tune.probe import predict, probe, summary
from edm2kit.experiments.tune.proposals import require_optuna
from edm2kit.experiments.tune.report import PAGE, PRESET, Finish, images_after, options_of
from edm2kit.experiments.tune.search import Plan, forecast, run_search
from edm2kit.experiments.tune.sources import NetworkCache, NetworkSource, Version, contents, open_source_of_networks
from edm2kit.experiments.tune.space import BASELINE, UNGUIDED, Space, Way, make_ways
from edm2kit.experiments.tune.study import SharedStudy
from edm2kit.guidance.registry import METHODS, NO_GUIDANCE
from edm2kit.metrics.registry import check_metrics
from edm2kit.metrics.scoring import Scorer, image_features, make_scorer
from edm2kit.models.preconditioning import resolve_precision
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.files import file_lock, sha256_of

_GIB = 1 << 30
_PACE_IMAGES = 4  # to measure the speed with
_MAX_AGES = 6
_PROBE_AGES = 3


class Guide(click.ParamType):
    """PATH or NAME=PATH of a guide, as a pair; without a name, that of the folder or file."""

    name = "guide"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if equals and "/" not in name:
            return name, path
        return Path(value).name.removesuffix(".safetensors") or value, value


def _lengths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < length <= 0.2886 for length in found):
        raise ValueError(f"{text!r:.60} is not a list of EMA lengths above 0 and up to 0.2886, such as 0.05,0.1")
    return found


def _weights(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r:.60} is not a range of weights; write for example 1,3") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{text!r:.60} runs backwards; write for example 1,3")
    return low, high


def _interval(text: str) -> Any:
    if text in ("search", "none"):
        return text
    return Interval().convert(text, None, None)


_networks = cli.section(
    "Networks",
    click.option("--main", metavar="PATH|URL", required=True, help="Main network: a run folder, or one snapshot"),
    click.option(
        "--guide",
        "guides",
        metavar="[NAME=]PATH|URL",
        type=Guide(),
        multiple=True,
        help="Guide: a run folder, or one snapshot; repeatable",
    ),
    click.option(
        "--method",
        "methods",
        metavar="TEXT",
        multiple=True,
        help='Guidance method, with options of its own as in "pag --pag-match yes"; repeatable  [default: '
        "autoguidance]",
    ),
    click.option(
        "--ema-main", metavar="LIST", type=cli.Parsed(_lengths), help="EMA lengths  [default: around the stored]"
    ),
    click.option("--ema-guide", metavar="LIST", type=cli.Parsed(_lengths), help="The same for guides"),
    click.option(
        "--age",
        "ages",
        metavar="NIMG",
        type=cli.Size(),
        multiple=True,
        help="Training time of guides, in images; repeatable  [default: up to 6, to probe 3]",
    ),
)
_outdir = click.option(
    "--outdir", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of results"
)
_batch = click.option("--batch", metavar="N", type=cli.AtLeast(int, 1), default=32, help="Images per batch")
_seed = click.option("--seed", metavar="N", type=cli.AtLeast(int, 0), default=0, help="Seed of all random choices")
_words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- GENERATE OPTIONS]")


@click.group(cls=cli.Group)
def main() -> None:
    """Find good settings of guidance for your networks.

    \b
    edm2kit-tune probe  --main runs/main --guide runs/guide --data heldout.zip --outdir runs/probe
    edm2kit-tune search --main runs/main --guide runs/guide --ref real.npz --metric fd_lite0 \\
        --budget 4000img --outdir runs/search -- --steps 16
    python generate.py --preset runs/search/preset.yaml --seeds 0-63 --outdir out

    Options of generate.py that all images share follow after --.
    """


@main.command(name="probe", sections=("Networks", "Data", "Output", "Speed"))
@_networks
@cli.section(
    "Data",
    click.option("--data", metavar="PATH", required=True, help="Held-out images, as for train.py --data"),
    click.option("--num", metavar="N", type=cli.AtLeast(int, 2), default=500, help="Images"),
    click.option("--levels", metavar="N", type=cli.AtLeast(int, 2, 10_000), default=16, help="Noise levels"),
    _seed,
)
@cli.section("Output", _outdir)
@cli.section("Speed", _batch, cli.device_option(), cli.tf32_option(), cli.timeout_option())
@_words
def probe_command(
    outdir: Path,
    data: str,
    num: int,
    levels: int,
    seed: int,
    batch: int,
    device: str,
    words: tuple[str, ...],
    **given: Any,
) -> None:
    """Compare guides with the main network on held-out images, without generating any.

    For each guide and noise level: the least-squares weight, size and angle of the difference, the loss of both
    networks. Predicts in words which guide and interval to search.
    """
    cli.check_writable(outdir)
    with dist.session(device) as where:
        main_source, guides, methods = _open(given)
        ways = make_ways(methods, main_source, guides, words)
        ways.pop(UNGUIDED, None)
        if not ways:
            raise ValueError("there is nothing to probe; give a --guide, or a --method with a weighted difference")
        base = next(iter(ways.values())).request
        cache = NetworkCache([main_source, *guides], where, resolve_precision(base.precision, where), 2 * _GIB)
        version = _at_length(main_source, main_source.usual, given["ema_main"])
        snapshot = cache.get(version)
        images, conditions = probe_report.load_images(data, num, snapshot, where)
        doubled = {}
        for way in ways.values():
            if METHODS[way.method].negative is None:
                raise ValueError(f"guidance method {way.method} has no weighted difference to probe; leave it out")
            for title, guide in _probe_versions(way, given["ages"], given["ema_guide"], main_source, version):
                loaded = {"net": snapshot}
                if guide is not None:
                    loaded["gnet"] = cache.get(guide)
                request = _named(way.request, version, guide)
                doubled[title] = prepare(request, where, labels_from_data=True, loaded=loaded).engine.denoiser
        sampler = base.sampler
        sigmas = torch.logspace(math.log10(sampler.sigma_min), math.log10(sampler.sigma_max), levels).tolist()
        result = probe(
            snapshot.net, doubled, images, conditions, sigmas, sigma_data=snapshot.net.sigma_data, batch_size=batch,
            seed=seed,
        )  # fmt: skip
        written = probe_report.write(result, predict(result), outdir, _command(), where)
        dist.print0(f"{summary(result)}\nWrote {written}")


def _probe_versions(
    way: Way, ages: Sequence[int], lengths: tuple[float, ...] | None, main_source: NetworkSource, main_version: Version
) -> list[tuple[str, Version | None]]:
    """The guides of one way at several training times, with names for the report; without the main network itself."""
    if way.guide is None:
        return [(way.title, None)]
    found: list[tuple[str, Version | None]] = []
    times = _ages(way.guide, ages)
    if way.guide.path == main_source.path and len(times) > 1:  # earlier snapshots of the main network's run
        times = [nimg for nimg in times if nimg != main_version.nimg]
    for age in _spread(times, _PROBE_AGES):
        usual = way.guide.usual
        version = _at_length(way.guide, Version(way.guide.name, age, usual.ema_std), lengths)
        found.append((f"{way.title} ({way.guide.name} at {age:,} images)", version))
    return found


def _at_length(source: NetworkSource, version: Version, lengths: tuple[float, ...] | None) -> Version:
    """The version at the one EMA length that was asked for, if any."""
    if lengths is None or not source.is_run:
        return version
    if len(lengths) > 1:
        raise ValueError("a probe takes one EMA length per network; name one")
    source.check_length(version.nimg, lengths[0])
    return Version(source.name, version.nimg, lengths[0])


def _named(request: Request, main_version: Version, guide: Version | None) -> Request:
    return replace(request, net=str(main_version), gnet=None if guide is None else str(guide))


@main.command(sections=("Networks", "Search", "Scoring", "Budget", "Output", "Speed"))
@_networks
@cli.section(
    "Search",
    click.option("--weights", metavar="LO,HI", type=cli.Parsed(_weights), help="Range  [default: from 1 to 3 or more]"),
    click.option(
        "--interval",
        metavar="LO,HI",
        type=cli.Parsed(_interval),
        default="search",
        help="Noise levels (LO, HI] to guide at, none for all, or search",
    ),
)
@cli.section(
    "Scoring",
    click.option(
        "--ref", metavar="PATH|URL", required=True, help="Reference statistics, from calculate_metrics.py ref"
    ),
    click.option("--metric", metavar="NAME", required=True, help="One metric, such as fd_lite0 or fid.kid"),
    click.option("--real", metavar="PATH", help="Real images, for metrics that need them"),
)
@cli.section(
    "Budget",
    click.option(
        "--budget", metavar="BUDGET", type=cli.Parsed(parse_budget), required=True, help="4000img, 90min or 2h"
    ),
    click.option("--num", metavar="N", type=cli.AtLeast(int, 4), default=500, help="Images for the last comparison"),
    click.option("--halvings", metavar="N", type=click.IntRange(0, 6), default=2, help="Earlier ones, of 1/3 each"),
    click.option("--confirm", metavar="N", type=cli.AtLeast(int, 4), help="Fresh images per range  [default: --num]"),
    _seed,
)
@cli.section("Output", _outdir)
@cli.section(
    "Speed",
    _batch,
    click.option("--cache", metavar="GIB", type=cli.AtLeast(float, 0), default=4.0, help="Memory for rebuilt networks"),
    cli.device_option(),
    cli.tf32_option(),
    cli.timeout_option(),
)
@_words
def search(
    outdir: Path,
    budget: Budget,
    num: int,
    halvings: int,
    confirm: int | None,
    seed: int,
    batch: int,
    cache: float,
    device: str,
    words: tuple[str, ...],
    **given: Any,
) -> None:
    """Search guide, guide age, EMA lengths, weight and interval for the best value of a metric.

    Start the same command several times to share the work, and again after a crash to resume. The result is a preset
    for generate.py, a confirmation on fresh seeds, and a page (index.html).
    """
    require_optuna()
    check_metrics([given["metric"]])
    direction(given["metric"])
    options_of(words)
    cli.check_writable(outdir)
    rungs = rungs_for(num, halvings)
    if budget.images is not None and budget.images < 2 * num:
        raise ValueError(
            f"a budget of {budget} is too small: the unguided network and one candidate take {2 * num:,} at --num "
            f"{num}. Give a larger --budget or a smaller --num"
        )
    with dist.session(device) as where:
        if dist.world_size() > 1:
            raise ValueError("a search is shared by starting the same command several times, not by torchrun")
        main_source, guides, methods = _open(given)
        ways = make_ways(methods, main_source, guides, words)
        space = _space(main_source, ways, given)
        scorer = _scorer(given, num, where, batch)
        kept = NetworkCache(
            [main_source, *guides], where, resolve_precision(space.plain.precision, where), int(cache * _GIB)
        )
        objective = Objective(space, kept, scorer, given["metric"], batch, outdir / "features")
        pace = _check_and_time(objective, space)
        plan = Plan(rungs, budget, seed, pace)
        after = images_after(confirm or num, rungs)
        if budget.seconds is not None and budget.seconds < plan.least_images * pace:
            raise ValueError(
                f"a budget of {budget} is too small: at {pace:.3g} s per image the unguided network and one candidate "
                f"take {duration(plan.least_images * pace)}. Give a larger --budget or a smaller --num"
            )
        dist.print0(forecast(plan, space, after, pace))
        settings = {
            "space": space.describe(),
            "options": list(words),
            "metric": given["metric"],
            "reference_sha256": sha256_of(fetch(given["ref"])),
            "real": given["real"],
            "contents": contents([main_source, *guides], [*words, *shlex.split(" ".join(methods))], given["real"]),
            "rungs": list(rungs),
            "seed": seed,
        }
        total = budget.images or int(budget.seconds or 0)
        with SharedStudy(outdir, settings) as study, dist.progress_bar(total, "img" if budget.images else "s") as bar:

            def measure(candidate: Any, num_images: int) -> tuple[float, dict[str, float]]:
                measured = objective.measure(candidate, num_images)
                return objective.value(measured), dict(measured.values)

            run_search(study, space, plan, BASELINE, measure, bar)
        with file_lock(outdir / ".reporting", _someone_reports):
            baseline = space.candidate(BASELINE)
            finish = Finish(
                objective, space, study.results(), rungs, baseline, words, confirm or num, outdir, _command()
            )
            result = finish.run()
        dist.print0(_outcome(result, outdir))


def _command() -> str:
    return shlex.join(["edm2kit-tune", *sys.argv[1:]])


def _someone_reports(owner: str) -> None:
    raise ValueError(f"the search is complete; another process writes the report ({owner})")


def _outcome(result: dict[str, Any], outdir: Path) -> str:
    means, change = result["confirmation"]["means"], result["confirmation"]["change"]
    shown = "" if change is None else f" ({change:+.1%})"
    return (
        f"Best:     {result['best']}\n"
        f"Fresh:    {result['metric']} {means['best']:.4g}, unguided {means['unguided']:.4g}{shown}, mean of "
        f"{len(result['confirmation']['points']) // 2} ranges of {result['confirmation']['num_images']:,} images\n"
        f"Preset:   python generate.py --preset {outdir / PRESET} --seeds 0-63 --outdir out\n"
        f"Page:     {outdir / PAGE}"
    )


def _open(given: dict[str, Any]) -> tuple[NetworkSource, list[NetworkSource], list[str]]:
    """The main network, the guides, and the methods. Raises ValueError if two guides have the same name."""
    names = [name for name, _ in given["guides"]]
    if len(set(names)) < len(names) or "main" in names:
        raise ValueError("guides need names that differ, and none may be main; write --guide NAME=PATH")
    main_source = open_source_of_networks("main", given["main"])
    guides = [open_source_of_networks(name, path) for name, path in given["guides"]]
    methods = list(given["methods"]) or (["autoguidance"] if guides else [])
    if not methods:
        raise ValueError("there is nothing to search; give a --guide, or a --method that needs none")
    return main_source, guides, methods


def _ages(guide: NetworkSource, wanted: Sequence[int]) -> list[int]:
    """The training times of a guide to try. Raises ValueError for one that it has no snapshot of."""
    for age in wanted:
        if guide.is_run and age not in guide.times:
            listed = ", ".join(map(str, guide.times))
            raise ValueError(f"{guide.path} has no snapshot at {age} images; available: {listed}")
    return [age for age in guide.times if age in wanted] if wanted and guide.is_run else guide.times


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, each about half of the next, the last one included."""
    if len(values) <= most:
        return list(values)
    return sorted({min(values, key=lambda value: abs(value - values[-1] / 2**k)) for k in range(most)})


def _space(main_source: NetworkSource, ways: dict[str, Way], given: dict[str, Any]) -> Space:
    for length in given["ema_main"] or ():
        if main_source.is_run:
            main_source.check_length(main_source.usual.nimg, length)
    guides = {way.guide.name: way.guide for way in ways.values() if way.guide is not None}
    ages, guide_lengths = {}, {}
    for name, guide in guides.items():
        ages[name] = tuple(_spread(_ages(guide, given["ages"]), _MAX_AGES))
        for length in given["ema_guide"] or ():
            if guide.is_run:
                guide.check_length(guide.times[-1], length)
        for age in ages[name]:
            guide_lengths[name, age] = tuple(guide.lengths(age, given["ema_guide"]))
    weights = {}
    for title, way in ways.items():
        published = METHODS[way.method].weight or 1.0
        weights[title] = given["weights"] or (1.0, max(3.0, 2 * published - 1))
    first = next(iter(ways.values())).request
    plain = replace(first, guidance=NO_GUIDANCE, gnet=None, uncond=None)
    interval, sigmas = given["interval"], ()
    if interval == "search":
        if plain.sampler.levels == "gits":
            raise ValueError("--interval search needs noise levels that are known; --levels gits fits them")
        sigmas = tuple(level for level in plain.sampler.sigmas().tolist() if level > 0)
    fixed = interval if isinstance(interval, tuple) else None
    lengths = tuple(main_source.lengths(main_source.usual.nimg, given["ema_main"]))
    return Space(main_source, plain, ways, lengths, guide_lengths, ages, weights, sigmas, fixed)


def _scorer(given: dict[str, Any], num: int, device: torch.device, batch: int) -> Scorer:
    scorer = make_scorer(fetch(given["ref"]), device, [given["metric"]])
    if given["real"] is not None:
        source = open_images(given["real"])
        picked = torch.linspace(0, len(source) - 1, min(num, len(source))).long().tolist()
        features = image_features(image_batches(source, picked, batch, 2), scorer.detectors, device)
        scorer = replace(scorer, real=features)
    scorer.check_names()
    return scorer


def _check_and_time(objective: Objective, space: Space) -> float:
    """Load every way once, so that what does not fit is refused before the search; seconds per image of the slowest."""
    started = time.monotonic()
    objective.generation(space.candidate(BASELINE), quiet=False)
    paces = [objective.timed(space.candidate(start), _PACE_IMAGES) for start in space.starts()]
    dist.print0(f"Checked {len(paces)} ways to guide in {duration(time.monotonic() - started)}")
    return max(paces)


if __name__ == "__main__":
    main()
