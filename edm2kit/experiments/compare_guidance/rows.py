"""A comparison, read from YAML: how it is scored, and its rows, each a way to guide with the weights to try."""

import re
import shlex
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.cli.generation import Request
from edm2kit.cli.generation_options import parse_request
from edm2kit.guidance.registry import METHODS, methods_of
from edm2kit.torch_utils.files import check_type
from edm2kit.training.config import nearest, read_yaml

ROWS_FILE = Path(__file__).parents[2] / "configs" / "comparison.yaml"
_FEWEST_IMAGES = 6  # that precision and recall can be measured on
# the keys of a comparison and their types
_CONTENT: Mapping[str, Any] = {
    "metric": str,
    "tune": Mapping[str, Any],
    "report": Mapping[str, Any],
    "common": str,
    "rows": Mapping[str, Any],
    "about": str,
}


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
        _check("", content, _CONTENT, optional=("about",))
        common, rows = content.pop("common"), content.pop("rows")
        return Comparison(
            {name: _row(name, common, fields) for name, fields in rows.items()},
            tune=_image_set("tune", content.pop("tune")),
            report=_image_set("report", content.pop("report")),
            **content,
        )
    except ValueError as error:
        raise ValueError(f"{path} is not a comparison: {error}") from error


def _check(where: str, fields: Any, known: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Raise ValueError unless `fields` have the keys `known`, of these types; `where` ends in a dot, or is empty."""
    check_type(fields, Mapping[str, Any], where.rstrip(".") or "the file")
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown key {f'{where}{key}'!r:.60}{nearest(key, list(known))}")
    for key, hint in known.items():
        if key in fields:
            check_type(fields[key], hint, f"{where}{key}")
        elif key not in optional:
            raise ValueError(f"{where}{key} is missing")


def _image_set(name: str, fields: Any) -> ImageSet:
    _check(f"{name}.", fields, {"images": int, "seeds": list[int]})
    if fields["images"] < _FEWEST_IMAGES or not fields["seeds"] or min(fields["seeds"]) < 0:
        raise ValueError(f"{name} needs {_FEWEST_IMAGES} images or more, and seeds from 0, such as [0]")
    return ImageSet(fields["images"], tuple(dict.fromkeys(fields["seeds"])))


def _row(name: str, common: str, fields: Any) -> ComparisonRow:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"row {name!r:.60}: the name becomes a file name; use letters, digits, dots, +, - and _")
    hints = {"title": str, "options": str, "weights": list[float]}
    _check(f"rows.{name}.", fields, hints, optional=("weights",))
    weights = tuple(float(weight) for weight in fields.get("weights", ()))
    row = ComparisonRow(name, fields["title"], f"{common} {fields['options']}".strip(), weights)
    try:
        shlex.split(row.options)
        parts = list(string.Formatter().parse(row.options))
    except ValueError as error:
        raise ValueError(f"rows.{name}: options are {error}") from error
    for _, file, form, change in parts:
        if file is not None and (form or change or not file.isidentifier()):
            raise ValueError(f"rows.{name}: options have {{{file}}}, which is not a name in braces such as {{main}}")
    return row


def rows_named(rows: Mapping[str, ComparisonRow], names: Sequence[str] | None) -> list[ComparisonRow]:
    """The rows of these names, None for all. Raises ValueError for an unknown name."""
    if names is None:
        return list(rows.values())
    for name in names:
        if name not in rows:
            raise ValueError(f"no row has the name {name!r}{nearest(name, list(rows))}")
    return [rows[name] for name in dict.fromkeys(names)]
