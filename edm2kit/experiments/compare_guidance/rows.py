"""A comparison, read from YAML: how it is scored, and its rows, each a way to guide with the weights to try."""

import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.cli.generation import Request
from edm2kit.cli.generation_options import parse_request
from edm2kit.guidance.registry import METHODS, methods_of
from edm2kit.training.config import nearest, read_yaml

ROWS_FILE = Path(__file__).parents[2] / "configs" / "comparison.yaml"


@dataclass(frozen=True)
class ComparisonRow:
    """One way to guide: `options` of generate.py, with names of files in braces, and the `weights` to try.

    A row without weights has nothing to tune, for example the network alone.
    """

    name: str
    title: str
    options: str
    weights: tuple[float, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The names in braces."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.options) if name]
        return tuple(dict.fromkeys(names))

    def request(self, weight: float | None, networks: Mapping[str, str], *more: str) -> Request:
        """The request at `weight` (None for a row without weights); `networks` maps names to paths."""
        words = [*(word.format(**networks) for word in shlex.split(self.options)), *more]
        if weight is not None:
            words += ["--guidance", f"{weight:g}"]
        return parse_request(words)

    def cost(self, networks: Mapping[str, str]) -> str:
        """Network evaluations in one guided evaluation, in words."""
        request = self.request(self.weights[0] if self.weights else None, networks)
        return "; ".join(METHODS[name].evaluations for name in methods_of(request.guidance))


@dataclass(frozen=True)
class ImageSet:
    """The images of one value: `images` with consecutive seeds, from each of the first seeds `seeds`."""

    images: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Rows by name, the detector of the distance, and the images that weights are tuned on and reported on.

    `about` is a sentence on the networks for the table.
    """

    rows: Mapping[str, ComparisonRow]
    metric: str
    tune: ImageSet
    report: ImageSet
    about: str = ""


def load_comparison(path: Path) -> Comparison:
    """The comparison in a YAML file. Raises ValueError if a part is missing or unknown.

    With `extends: default` the file only has what differs from the comparison of the package.
    """
    content = dict(read_yaml(path))
    try:
        if (base := content.pop("extends", None)) is not None:
            if base != "default":
                raise ValueError(f"extends: {base!r}; only default can be extended")
            content = {**read_yaml(ROWS_FILE), **content}
        common, rows = content.pop("common"), content.pop("rows")
        return Comparison(
            {name: _row(name, common, **fields) for name, fields in rows.items()},
            tune=_image_set(**content.pop("tune")),
            report=_image_set(**content.pop("report")),
            **content,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a comparison: {type(error).__name__}, {error}") from error


def _image_set(images: int, seeds: Sequence[int]) -> ImageSet:
    return ImageSet(int(images), tuple(int(seed) for seed in seeds))


def _row(name: str, common: str, title: str, options: str, weights: Sequence[Any] = ()) -> ComparisonRow:
    return ComparisonRow(name, title, f"{common} {options}".strip(), tuple(float(weight) for weight in weights))


def rows_named(rows: Mapping[str, ComparisonRow], names: Sequence[str] | None) -> list[ComparisonRow]:
    """The rows of these names, None for all. Raises ValueError for an unknown name."""
    if names is None:
        return list(rows.values())
    for name in names:
        if name not in rows:
            raise ValueError(f"no row has the name {name!r}{nearest(name, list(rows))}")
    return [rows[name] for name in names]
