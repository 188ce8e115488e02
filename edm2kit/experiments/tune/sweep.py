"""Scores over guidance weights, guides, EMA lengths and intervals, from Python: `edm2kit.sweep`."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.presets import load_presets, preset_file
from edm2kit.experiments.tune.objective import FIRST_SEED, Objective
from edm2kit.experiments.tune.sources import NetworkCache, NetworkSource, Version, open_source_of_networks
from edm2kit.experiments.tune.space import UNGUIDED, Candidate, Space, make_ways
from edm2kit.experiments.tune.table import UNGUIDED as UNGUIDED_ROW
from edm2kit.experiments.tune.table import SweepTable, finite_or_none
from edm2kit.guidance.registry import NO_GUIDANCE
from edm2kit.metrics.reference import Reference
from edm2kit.metrics.scoring import REPLICATES, Images, Measurement, image_features, make_scorer
from edm2kit.models.preconditioning import resolve_precision
from edm2kit.snapshots.loading import Snapshot, Weights
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import sha256_of

_KEPT_BYTES = 4 << 30  # of rebuilt networks
SweptNetwork: TypeAlias = str | Path | Snapshot
Interval: TypeAlias = tuple[float, float] | None


def sweep(
    main: SweptNetwork,
    reference: Reference | str | Path,
    weights: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    *,
    guides: Mapping[str, SweptNetwork] | SweptNetwork | None = None,
    methods: Sequence[str] = (),
    ages: Sequence[int] = (),
    ema_main: Sequence[float] = (),
    ema_guide: Sequence[float] = (),
    intervals: Sequence[Interval] | None = None,
    metrics: Sequence[str] | None = None,
    real: Images | None = None,
    options: str = "",
    num: int = 500,
    batch: int = 32,
    confidence: bool = False,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
) -> SweepTable:
    """Score every combination of guidance weights, guides, EMA lengths and intervals: a table, with a figure.

    - `main`: a snapshot (path, URL, or loaded), a folder of snapshots, or a preset of generate.py, which also gives the
      guide, the method, the interval and the sampler. `guides`: one, or several by name.
    - `reference`: from `measure_reference`, or a file; `metrics` as for `--metrics`, by default its detectors; `real`
      images for metrics that need them.
    - `weights`: 1 is the unguided network, which is measured once. `methods`: names of guidance methods, possibly with
      options ("pag --pag-match yes"), by default the preset's or autoguidance. `intervals`: (sigma_lo, sigma_hi]; None
      is everywhere.
    - `ema_main`, `ema_guide`: EMA lengths, rebuilt in memory; `ages`: training images of the guide. They need folders
      of a run. By default the latest snapshot, with the length nearest to 0.1.
    - `options` of generate.py for all images, such as "--steps 16 --class 3,7".
    - `num` images for each combination, all from the same seeds; `confidence` adds 95% intervals.
    - `cache`: a folder that keeps the features of generated images. A sweep that was interrupted resumes from it, and
      one with more images or further weights generates only those. Other weights of the networks, options or detectors
      never meet old features.

    A combination that cannot be generated (images that are not finite) has no value and says why in its row. Raises
    ValueError if networks, methods, metrics or options do not exist or do not fit.

    Example: `table = sweep("runs/main", "real.npz", guides="runs/guide", ema_guide=[0.05, 0.1], cache="runs/sweep")`
    """
    if num < 2 or not weights:
        raise ValueError(f"a sweep needs at least two images and a weight; got num={num}, weights={list(weights)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    words = shlex.split(options)
    start: list[str] | None = None
    if _is_preset(main):
        start = ["--preset", str(main)]
        preset = parse_request(start)
        main, guides = preset.net, guides or preset.gnet
        methods = methods or [preset.guidance.method]
        intervals = intervals or [preset.guidance.interval]
    guides = {} if guides is None else guides
    guides = dict(guides) if isinstance(guides, Mapping) else {"guide": guides}
    methods = methods or (["autoguidance"] if guides else [])
    if not methods:
        raise ValueError("there is nothing to guide with; give guides=..., or methods=[...] that need none")
    main_source = _source("main", main)
    sources = [_source(name, guide) for name, guide in guides.items()]
    ways = make_ways(methods, main_source, sources, words, start)
    plain = dataclasses.replace(next(iter(ways.values())).request, guidance=NO_GUIDANCE, gnet=None, uncond=None)
    space = Space(main_source, plain, ways, (), {}, {}, {})
    candidates = list(dict.fromkeys(_candidates(space, weights, ages, ema_main, ema_guide, intervals or [None])))

    if not isinstance(reference, Reference):
        reference = fetch(reference)
    scorer = make_scorer(reference, where, metrics)
    if real is not None:
        scorer = dataclasses.replace(scorer, real=image_features(real, scorer.detectors, where))
    scorer = dataclasses.replace(scorer, replicates=REPLICATES if confidence else 0)
    scorer.check_names()
    networks = NetworkCache([main_source, *sources], where, resolve_precision(plain.precision, where), _KEPT_BYTES)
    objective = Objective(space, networks, scorer, "", batch, Path())
    identity = _identity(objective)  # also shows whether everything fits, before anything is generated
    if cache is not None:
        objective = dataclasses.replace(objective, folder=Path(cache, identity))
    rows, names = [], dict[str, None]()
    with progress_bar(len(candidates) * num, what="sweep") as bar:
        objective = dataclasses.replace(objective, on_images=bar.update)
        for k, candidate in enumerate(candidates, 1):
            measured, error = _measured(objective, candidate, num, is_cached=cache is not None)
            if measured is not None:
                names |= dict.fromkeys(measured.values)
            rows.append(_row(space, candidate, measured, error))
            bar.update(k * num - bar.n)  # images that the cache had, or that were given up
    ends = [f"{name}_{end}" for name in names for end in ("low", "high")] if confidence else []
    empty = dict.fromkeys([*names, *ends])
    return SweepTable(tuple({**empty, **row} for row in rows), tuple(names), num)


def _measured(
    objective: Objective, candidate: Candidate, num: int, is_cached: bool
) -> tuple[Measurement | None, str | None]:
    """The scores of a combination, or why it has none."""
    try:
        if is_cached:
            return objective.measure(candidate, num), None
        seeds = range(FIRST_SEED, FIRST_SEED + num)
        return objective.measure_seeds(candidate, seeds, objective.scorer.replicates), None
    except ValueError as error:
        return None, str(error)


def _is_preset(main: SweptNetwork) -> bool:
    if not isinstance(main, str | Path) or Path(main).is_dir():
        return False
    return preset_file(str(main)) is not None or str(main) in load_presets()


def _source(name: str, network: SweptNetwork) -> NetworkSource:
    if isinstance(network, Snapshot):
        weights = Weights(f"{name} in memory", network.header, network.net.state_dict())
        return NetworkSource(name, weights.name, (weights,))
    return open_source_of_networks(name, str(network))


def _candidates(
    space: Space,
    weights: Sequence[float],
    ages: Sequence[int],
    ema_main: Sequence[float],
    ema_guide: Sequence[float],
    intervals: Sequence[Interval],
) -> Iterator[Candidate]:
    """Every combination, the unguided network first."""
    mains = list(_versions(space.main, [space.main.usual.nimg], ema_main))
    for main in mains:
        if 1 in weights or all(way.method == UNGUIDED for way in space.ways.values()):
            yield Candidate(UNGUIDED, 1.0, main)
    for title, way in space.ways.items():
        if way.method == UNGUIDED:
            continue
        guides: list[Version | None] = [None]
        if way.guide is not None:
            guides = list(_versions(way.guide, ages or [way.guide.usual.nimg], ema_guide))
        for main in mains:
            for guide in guides:
                for interval in intervals:
                    for weight in weights:
                        if weight != 1:
                            yield Candidate(title, float(weight), main, guide, interval)


def _versions(source: NetworkSource, times: Sequence[int], lengths: Sequence[float]) -> Iterator[Version]:
    for nimg in times:
        if nimg not in source.times:
            raise ValueError(f"{source.path} has no snapshot at {nimg} images; available: {source.times}")
        for length in lengths:
            source.check_length(nimg, length)
            yield Version(source.name, nimg, length)
        if not lengths:
            yield source.usual_at(nimg)


def _identity(objective: Objective) -> str:
    """A name for everything but the candidate that decides the features of an image. Raises as `generation`."""
    space, cache = objective.space, objective.cache
    settings = {}
    for title, way in space.ways.items():
        guide = None if way.guide is None else way.guide.usual
        candidate = Candidate(title, 2.0, space.main.usual, guide)
        if way.method == UNGUIDED:
            candidate = Candidate(UNGUIDED, 1.0, space.main.usual)
        settings[title] = objective.generation(candidate, quiet=False).settings
    content = {
        "networks": {name: [_hash(weights) for weights in source.weights] for name, source in cache.sources.items()},
        "settings": settings,
        "detectors": {detector.name: detector.fingerprint for detector in objective.scorer.detectors},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _hash(weights: Weights) -> str:
    if weights.path is not None:
        return sha256_of(weights.path)
    digest = hashlib.sha256(weights.header.to_json().encode())
    for name, tensor in sorted(weights.tensors.items()):
        assert isinstance(tensor, torch.Tensor)
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _row(space: Space, candidate: Candidate, measured: Measurement | None, error: str | None) -> dict[str, Any]:
    guide, interval = candidate.guide, candidate.interval
    method = UNGUIDED_ROW
    if candidate.method != UNGUIDED:
        way = space.ways[candidate.method]
        method = shlex.join([way.method, *way.own])
    row: dict[str, Any] = {
        "method": method,
        "guide": None if guide is None else guide.source,
        "age": None if guide is None else guide.nimg,
        "ema_main": candidate.main.ema_std,
        "ema_guide": None if guide is None else guide.ema_std,
        "sigma_lo": None if interval is None else interval[0],
        "sigma_hi": None if interval is None else interval[1],
        "weight": candidate.weight,
        "error": error,
    }
    if measured is not None:
        row |= {name: finite_or_none(value) for name, value in measured.values.items()}
        for name, (low, high) in measured.intervals.items():
            row |= {f"{name}_low": low, f"{name}_high": high}
    return row
