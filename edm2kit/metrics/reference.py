"""Reference statistics on disk: mean and covariance of real images' features, and where they come from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.torch_utils.arrays import read_npz
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.file_kinds import START_BYTES, kind_of_file
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.pickles.reader import load_pickle
from edm2kit.torch_utils.pickles.writer import dump_arrays

FORMAT_VERSION = 1
PUBLISHED_METRICS = ("fid", "fd_dinov2")  # that EDM2's own calculate_metrics.py knows
_MAX_BYTES = 1 << 28  # statistics of three detectors take a quarter of it
# the errors that values of an unexpected kind lead to
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Reference:
    """Statistics by metric name, of `num_images` images (None if the file does not say).

    `source` holds JSON values that say where the statistics come from.
    """

    num_images: int | None
    statistics: Mapping[str, FeatureStatistics]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = "an unknown number of" if self.num_images is None else f"{self.num_images:,}"
        return f"Reference: {', '.join(self.statistics)} of {count} images"

    def of(self, metric: str) -> FeatureStatistics:
        """The statistics of `metric`, computed with this project's detector of that name.

        Raises ValueError if the reference lacks the metric or used another detector.
        """
        if metric not in self.statistics:
            raise ValueError(f"the reference has no {metric}, only {', '.join(self.statistics)}; choose with --metrics")
        statistics, expected = self.statistics[metric], DETECTORS[metric].fingerprint
        # published files do not name their detector: the name of the metric has to do
        if statistics.fingerprint not in (None, expected):
            raise ValueError(
                f"the reference's {metric} was made with another detector ({statistics.fingerprint}) than this one "
                f"({expected}); create it again with `calculate_metrics.py ref`"
            )
        return statistics


def save_reference(path: str | Path, reference: Reference) -> None:
    """Write `reference` as an .npz file of float64 arrays and a JSON header. Raises OSError."""
    header = {
        "format_version": FORMAT_VERSION,
        "num_images": reference.num_images,
        "fingerprints": {metric: statistics.fingerprint for metric, statistics in reference.statistics.items()},
        "source": dict(reference.source),
    }
    arrays: dict[str, Any] = {"header": np.array(json.dumps(header))}
    for metric, statistics in reference.statistics.items():
        arrays |= {f"{metric}.mu": statistics.mean, f"{metric}.sigma": statistics.covariance}
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def save_published_reference(path: str | Path, reference: Reference) -> None:
    """Write `reference` as the .pkl file that EDM2's own calculate_metrics.py reads: float64 arrays in dictionaries.

    The format has neither detectors nor origin. Raises ValueError for statistics other than PUBLISHED_METRICS.
    """
    check_published(list(reference.statistics))
    content: dict[str, Any] = {} if reference.num_images is None else {"num_images": reference.num_images}
    for metric, statistics in reference.statistics.items():
        content[metric] = {"mu": statistics.mean, "sigma": statistics.covariance}
    with atomic_write(path) as file:
        dump_arrays(content, file)


def check_published(metrics: Sequence[str]) -> None:
    """Raise ValueError if any of `metrics` does not belong into the published format."""
    others = [metric for metric in metrics if metric not in PUBLISHED_METRICS]
    if others:
        raise ValueError(
            f"a .pkl for EDM2's calculate_metrics.py holds {' and '.join(PUBLISHED_METRICS)}, not {', '.join(others)}; "
            "choose with --metrics, or write an .npz"
        )


def save_adm_reference(path: str | Path, reference: Reference, images: np.ndarray) -> None:
    """Write a reference batch as the evaluation of ADM reads it (arXiv 2105.05233).

    `images` are uint8 [N, H, W, 3], stored as `arr_0`; the statistics of "fid" and "sfid" as mu, sigma, mu_s, sigma_s.
    Raises ValueError if the reference lacks one of them.
    """
    pool, spatial = reference.of("fid"), reference.of("sfid")
    with atomic_write(path) as file:
        np.savez(
            file,
            arr_0=images,
            mu=pool.mean,
            sigma=pool.covariance,
            mu_s=spatial.mean,
            sigma_s=spatial.covariance,
        )


def reference_file(path_or_url: str) -> Path:
    """The file of a reference, downloaded if it is given as a URL. Raises ValueError if there is none."""
    path = Path(path_or_url)
    return path if path.is_file() else fetch(path_or_url)


def load_reference(path: str | Path) -> Reference:
    """Read reference statistics: this project's .npz, EDM2's .pkl, ADM's .npz (fid and sfid), or the older .npz of
    `mu` and `sigma` (fid only).

    Nothing in the file is executed. Raises ValueError, in one line, if the file is of another kind or damaged, and
    OSError if it cannot be opened.

    Example: `load_reference("img512.pkl").of("fid").mean`
    """
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder; it takes reference statistics. Make them with "
            f"`python calculate_metrics.py ref --data {path} --dest ref.npz`"
        )
    with open(path, "rb") as file:
        start = file.read(START_BYTES)
    is_zip = start.startswith(b"PK")
    if not is_zip and not start.startswith(b"\x80"):
        what = f"is {kind_of_file(start) or 'empty'}"
        if start and kind_of_file(start) is None:
            what = f"starts with {start[:16]!r}"
        raise ValueError(
            f"{path} is damaged or does not contain reference statistics: it {what}. Make them with "
            "`python calculate_metrics.py ref`, or download them again"
        )
    try:
        reference = _read_npz(path) if is_zip else _read_pickle(path)
    except _MALFORMED as error:
        reason = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged or does not contain reference statistics: {reason.splitlines()[0]}"
        ) from error
    if not reference.statistics:
        raise ValueError(f"{path} has no statistics of {', '.join(DETECTORS)}")
    for metric, statistics in reference.statistics.items():
        _check(path, metric, statistics)
    return reference


def _read_npz(path: str | Path) -> Reference:
    # arr_0 holds the images in a reference batch of ADM: up to gigabytes
    arrays = read_npz(path, skip=("arr_0",), max_bytes=_MAX_BYTES)
    if "header" not in arrays:
        if not arrays:
            raise ValueError("it holds images without statistics; compute them with `calculate_metrics.py ref --data`")
        statistics = {"fid": _statistics(arrays["mu"], arrays["sigma"], None)}
        if "mu_s" in arrays:
            statistics["sfid"] = _statistics(arrays["mu_s"], arrays["sigma_s"], None)
        return Reference(None, statistics)
    header = json.loads(str(arrays["header"]))
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format is version {header['format_version']}; this program reads {FORMAT_VERSION}")
    for name, kind in {"fingerprints": dict, "source": dict, "num_images": int | None}.items():
        if not isinstance(header[name], kind):
            raise ValueError(f"its header has {name} {header[name]!r:.60}, which is of the wrong type")
    statistics = {
        metric: _statistics(arrays[f"{metric}.mu"], arrays[f"{metric}.sigma"], fingerprint)
        for metric, fingerprint in header["fingerprints"].items()
    }
    return Reference(header["num_images"], statistics, header["source"])


def _read_pickle(path: str | Path) -> Reference:
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise ValueError("expected a dictionary of metrics")
    statistics = {
        metric: _statistics(content[metric]["mu"], content[metric]["sigma"], None)
        for metric in DETECTORS
        if metric in content
    }
    num_images = content.get("num_images")
    return Reference(None if num_images is None else int(num_images), statistics)


def _statistics(mean: Any, covariance: Any, fingerprint: str | None) -> FeatureStatistics:
    mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    return FeatureStatistics(mean, covariance, fingerprint)


def _check(path: str | Path, metric: str, statistics: FeatureStatistics) -> None:
    """Raise ValueError if statistics cannot belong to this metric: before hours of generation, not after."""
    if metric not in DETECTORS:
        raise ValueError(
            f"{path} has statistics of {metric!r}; known metrics: {', '.join(DETECTORS)}. If it is a detector of your "
            f"own, give --detector {metric}=FILE.pt2"
        )
    size = DETECTORS[metric].num_features
    shapes = statistics.mean.shape, statistics.covariance.shape
    if shapes != ((size,), (size, size)):
        raise ValueError(f"{path}: {metric} has shapes {shapes}; expected {(size,)} and {(size, size)}")
    if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.covariance).all()):
        raise ValueError(f"{path}: {metric} has values that are not finite")
