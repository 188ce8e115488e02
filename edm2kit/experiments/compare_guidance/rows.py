"""What is compared: rows of a YAML file, each a way to guide and the weights to try."""

import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edm2kit.cli.generation import Request
from edm2kit.cli.generation_options import parse_request
from edm2kit.guidance.registry import METHODS, methods_of
from edm2kit.training.config import nearest, read_yaml

ROWS_FILE = Path(__file__).parents[2] / "configs" / "comparison.yaml"


@dataclass(frozen=True)
class Row:
    """`options` of generate.py, with names of networks in braces; `weights` to try, none where there is none to try."""

    name: str
    title: str
    options: str
    weights: tuple[float, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The names in braces."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.options) if name))

    def request(self, weight: float | None, networks: Mapping[str, str], *more: str) -> Request:
        """What to draw at `weight`, None for a row without weights; `networks` maps names to paths."""
        words = [*(word.format(**networks) for word in shlex.split(self.options)), *more]
        return parse_request(words if weight is None else [*words, "--guidance", f"{weight:g}"])

    def cost(self, networks: Mapping[str, str]) -> str:
        """Evaluations of networks in one guided evaluation, in words."""
        names = methods_of(self.request(self.weights[0] if self.weights else None, networks).guidance)
        return "; ".join(METHODS[name].evaluations for name in names)


def load_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by name; ValueError for one that lacks a part, or holds one that is not known."""
    content = read_yaml(path)
    try:
        return {
            name: Row(name, weights=tuple(map(float, fields.pop("weights", []))), **_row(content, fields))
            for name, fields in content["rows"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no rows to compare: {type(error).__name__}, {error}") from error


def _row(content: Mapping, fields: Mapping) -> dict[str, str]:
    return {**fields, "options": f"{content['common']} {fields['options']}".strip()}


def chosen(rows: Mapping[str, Row], names: list[str] | None) -> list[Row]:
    """The rows called `names`, None for all; ValueError for a name that no row has."""
    for name in names or []:
        if name not in rows:
            raise ValueError(f"no row is called {name!r}{nearest(name, list(rows))}")
    return [rows[name] for name in (rows if names is None else names)]
