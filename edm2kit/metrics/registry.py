"""The metrics by name, and which of them a run computes.

To add one, write a function from a `Sample` to a `Score` and enter it in METRICS.
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from edm2kit.metrics.detectors.registry import DETECTORS, check_names
from edm2kit.metrics.frechet_variants import fd_infinity
from edm2kit.metrics.inception_score import classifier_score, inception_score
from edm2kit.metrics.kernel_distance import cmmd, kernel_sums, kid
from edm2kit.metrics.label_agreement import cosine_neighbours, knn_agreement
from edm2kit.metrics.memorization import authpct, ct_score
from edm2kit.metrics.mind import mind
from edm2kit.metrics.pairs import PairVisitor
from edm2kit.metrics.precision_recall import coverage, density, precision, recall
from edm2kit.metrics.score import Sample, Score, ball_counts
from edm2kit.metrics.vendi import vendi

ALL = "all"
FDR = "fdr"


@dataclass(frozen=True)
class Metric:
    """How to compute a metric, and what its value means.

    `needs` are fields of `Sample` besides the generated features; `detectors` those it is defined for, all if empty.
    `better` says which values are good. "all" leaves those out that are not `in_all`. `pairs` makes what the metric
    asks `Sample.visited` for, so that metrics that compare all pairs of images share one pass over them.
    """

    compute: Callable[[Sample], Score]
    text: str
    better: str
    needs: tuple[str, ...] = ()
    detectors: tuple[str, ...] = ()
    in_all: bool = True
    pairs: Callable[[Sample], PairVisitor] | None = None


_LITE = ("fd_lite0", "fd_lite1", "fd_lite2")

METRICS: dict[str, Metric] = {
    "precision": Metric(
        precision, "share of generated images inside real neighbourhoods (k = 3)", "higher", ("real",),
        pairs=ball_counts,
    ),
    "recall": Metric(
        recall, "share of real images inside generated neighbourhoods (k = 3)", "higher", ("real",), pairs=ball_counts
    ),
    "density": Metric(
        density, "real neighbourhoods around a generated image, divided by k = 5", "near 1", ("real",),
        pairs=ball_counts,
    ),
    "coverage": Metric(
        coverage, "share of real neighbourhoods (k = 5) with a generated image", "higher", ("real",), pairs=ball_counts
    ),
    "kid": Metric(
        kid, "kernel distance from real images, cubic kernel (KDD on DINOv2)", "lower", ("real",), pairs=kernel_sums
    ),
    "mmd": Metric(cmmd, "the kernel distance of CMMD, which uses CLIP", "lower", ("real",), in_all=False),
    "mind": Metric(mind, "sliced Wasserstein distance of generated from real images", "lower", ("real",)),
    "fd_infinity": Metric(
        fd_infinity, "Frechet distance extrapolated to infinitely many images", "lower", ("reference",)
    ),
    "knn_agreement": Metric(
        knn_agreement, "share of generated images of the class that 10 real neighbours vote for", "higher",
        ("real", "real_labels"), pairs=cosine_neighbours,
    ),
    "vendi": Metric(vendi, "effective number of different generated images", "near that of real images"),
    "authpct": Metric(
        authpct, "percentage of generated images that are not near-copies of real ones", "near 50 or above", ("real",),
        pairs=ball_counts,
    ),
    "ct": Metric(
        ct_score, "below 0: generated images are nearer to real training images than held-out ones", "near 0",
        ("real", "heldout"),
    ),
    "inception_score": Metric(
        inception_score, "Inception Score of generated images, without the bias", "higher", ("head",), ("fid",)
    ),
    "classifier_score": Metric(
        classifier_score, "like an Inception Score, by this detector's classes; not IS", "higher", ("head",), _LITE
    ),
}  # fmt: skip


def check_metrics(names: Sequence[str]) -> None:
    """Raise ValueError if a name is not a detector, a metric, DETECTOR.METRIC, or "all"; suggests the nearest one."""
    for name in names:
        detector, _, metric = name.partition(".")
        if name in (ALL, FDR) or name in METRICS:
            continue
        if metric:
            check_names([detector])
            if metric not in METRICS:
                raise ValueError(f"metric {name!r} is unknown; {_hint(metric, METRICS)}")
        elif detector not in DETECTORS:
            raise ValueError(f"metric {name!r} is unknown; {_hint(name, [*DETECTORS, *METRICS, FDR, ALL])}")


def pair_visitors(metrics: Sequence[str]) -> tuple[Callable[[Sample], PairVisitor], ...]:
    """What `metrics` ask `Sample.visited` for, each once."""
    makers = [METRICS[name].pairs for name in metrics]
    return tuple(dict.fromkeys(make for make in makers if make is not None))


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"available metrics: {', '.join(known)}"


def detectors_of(names: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    """The detectors that `names` need, in order.

    If "all" or a metric comes without any detector's plain name, these are all `available` ones.
    """
    metrics_of_all = [name for name in names if name in METRICS or name in (ALL, FDR)]
    named = [name.partition(".")[0] for name in names if name not in metrics_of_all]
    has_plain_name = any(name in DETECTORS for name in names)
    if metrics_of_all and not has_plain_name:
        named = [*available, *named]
    return tuple(dict.fromkeys(named))


def applies(metric: str, detector: str) -> bool:
    """Whether `metric` is defined for the features of `detector`."""
    only = METRICS[metric].detectors
    if only:
        return detector in only
    # spatial features serve sFID alone
    return detector not in DETECTORS or DETECTORS[detector].output == "features"


def metrics_by_detector(
    names: Sequence[str], detectors: Sequence[str], given: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """The metrics besides the Frechet distance to compute with each of `detectors`.

    `given` are the fields of `Sample` that the run has. "all" means those that apply and need no more than that. Raises
    ValueError if a metric was named whose inputs are missing, or that applies to none of the detectors.
    """
    wanted: dict[str, set[str]] = {detector: set() for detector in detectors}
    for name in names:
        detector, _, own = name.partition(".")
        if name == ALL:
            for one in detectors:
                wanted[one] |= _all_of(one, given)
        elif own:
            wanted[detector].add(_checked(own, [detector], given))
        elif name in METRICS:
            _checked(name, detectors, given)
            for one in detectors:
                if applies(name, one):
                    wanted[one].add(name)
    # in the order of the table
    return {detector: tuple(metric for metric in METRICS if metric in wanted[detector]) for detector in detectors}


def _all_of(detector: str, given: Collection[str]) -> set[str]:
    """What "all" means for a detector."""
    found = set()
    for name, metric in METRICS.items():
        has_inputs = set(metric.needs) <= set(given)
        if metric.in_all and has_inputs and applies(name, detector):
            found.add(name)
    return found


def _checked(metric: str, detectors: Sequence[str], given: Collection[str]) -> str:
    if not any(applies(metric, detector) for detector in detectors):
        only = METRICS[metric].detectors
        raise ValueError(
            f"{metric} is not defined for {', '.join(detectors)}; use {', '.join(only) or 'another detector'}"
        )
    options = {
        "real": "real images; give --real PATH",
        "heldout": "heldout images; give --heldout PATH",
        "real_labels": "classes of the real images: class folders or a dataset.json",
    }
    for need in METRICS[metric].needs:
        if need in options and need not in given:
            raise ValueError(f"{metric} needs {options[need]}")
    return metric
