"""Tables of published results: rows and cells with their networks, guidance and values, read from YAML."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.cli.presets import Preset, find_preset
from edm2kit.experiments.paper_tables.networks import CONFIGS, PublishedNetwork, published
from edm2kit.guidance.registry import ALIASES, METHODS, OPTION_ALIASES, Choice
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.sampling.solvers import Sampler
from edm2kit.training.config import nearest, read_yaml

_ROW_KEYS = ("name", "group", "setting", "dataset", "note")
_CELL_KEYS = ("preset", "net", "gnet", "method", "guidance", "interval", "options", "value")


@dataclass(frozen=True)
class ReferenceSet:
    """What images are compared with: path or URL of reference statistics, and the shape that networks generate."""

    reference: str
    img_resolution: int
    img_channels: int
    label_dim: int


@dataclass(frozen=True)
class Cell:
    """One published number: `metric` of images made by these networks and this guidance was `value`."""

    row: str
    metric: str
    value: float
    net: PublishedNetwork
    gnet: PublishedNetwork | None
    guidance: Choice
    dataset: ReferenceSet

    @property
    def name(self) -> str:
        return f"{self.row}-{self.metric}"

    @property
    def networks(self) -> tuple[PublishedNetwork, ...]:
        return (self.net,) if self.gnet is None else (self.net, self.gnet)


@dataclass(frozen=True)
class TableRow:
    """The cells of one setting, one per metric; rows of the same `group` vary the setting."""

    name: str
    group: str
    setting: str
    cells: tuple[Cell, ...]
    note: str | None


@dataclass(frozen=True)
class Table:
    """A published table; `sampler` generated all of its images."""

    name: str
    title: str
    source: str
    sampler: Sampler
    rows: tuple[TableRow, ...]

    def cells(self, rows: Sequence[str] | None = None, metrics: Sequence[str] | None = None) -> list[Cell]:
        """The cells of these rows and metrics; None means all.

        Raises ValueError if the table has no row of a name, or if no cell is left.
        """
        by_name = {row.name: row.cells for row in self.rows}
        picked: list[Cell] = []
        for name in rows or by_name:
            if name not in by_name:
                raise ValueError(f"table {self.name} has no row {name!r}{nearest(name, list(by_name))}")
            picked += by_name[name]
        if metrics:
            picked = [cell for cell in picked if cell.metric in metrics]
        if not picked:
            raise ValueError(f"none of these rows has a value of {', '.join(metrics or ())}")
        return picked


def table_names() -> list[str]:
    """Names of the tables in edm2kit/configs/tables."""
    return sorted(path.stem for path in (CONFIGS / "tables").glob("*.yaml"))


def load_table(name: str | Path) -> Table:
    """The table of that name in edm2kit/configs/tables, or the one in your own YAML file.

    Raises ValueError, naming table, row and key, if something is unknown or missing.
    """
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if str(name) not in table_names():
            raise ValueError(f"unknown table {str(name)!r}{nearest(str(name), table_names())}")
        path = CONFIGS / "tables" / f"{name}.yaml"
    content = read_yaml(path)
    try:
        return _table(path.stem, content)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _table(name: str, content: Mapping[str, Any]) -> Table:
    datasets = {}
    for key, fields in {**published()["datasets"], **content.get("datasets", {})}.items():
        datasets[key] = ReferenceSet(**fields)
    rows: dict[str, TableRow] = {}
    for fields in content["rows"]:
        row = _row(fields, datasets)
        if row.name in rows:
            raise ValueError(f"two rows have the name {row.name!r}")
        rows[row.name] = row
    sampler = Sampler(**content.get("sampler", {}))
    return Table(name, content["title"], content["source"], sampler, tuple(rows.values()))


def _row(fields: Mapping[str, Any], datasets: Mapping[str, ReferenceSet]) -> TableRow:
    name = fields["name"]
    if not re.fullmatch(r"[\w.-]+", str(name)):
        raise ValueError(f"row {name!r}: the name becomes a file name; use letters, digits, dots, - and _")
    metrics = [key for key in fields if key in DETECTORS]
    _refuse_unknown(f"row {name}", fields, (*_ROW_KEYS, *metrics))
    if fields["dataset"] not in datasets:
        raise ValueError(f"row {name}: unknown data set {fields['dataset']!r}; available: {', '.join(datasets)}")
    dataset = datasets[fields["dataset"]]
    cells = tuple(_cell(name, metric, fields[metric], dataset) for metric in metrics)
    return TableRow(name, fields["group"], fields["setting"], cells, fields.get("note"))


def _cell(row: str, metric: str, fields: Mapping[str, Any], dataset: ReferenceSet) -> Cell:
    where = f"row {row}, {metric}"
    _refuse_unknown(where, fields, _CELL_KEYS)
    if "preset" in fields:
        preset = find_preset(fields["preset"])
        if preset.metric != metric:
            raise ValueError(f"{where}: preset {fields['preset']} is for {preset.metric}, not {metric}")
        fields = {**_preset_fields(preset), **fields}
    gnet = fields.get("gnet")
    try:
        guidance = _guidance(fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Cell(
        row,
        metric,
        float(fields["value"]),
        PublishedNetwork.named(fields["net"]),
        None if gnet is None else PublishedNetwork.named(gnet),
        guidance,
        dataset,
    )


def _preset_fields(preset: Preset) -> dict[str, Any]:
    """A preset as fields of a cell."""
    fields: dict[str, Any] = {"net": Path(preset.net).stem, "value": preset.value}
    if preset.gnet is not None:
        fields["gnet"] = Path(preset.gnet).stem
    if preset.guidance is not None:
        fields["guidance"] = preset.guidance
    if preset.interval is not None:
        fields["interval"] = preset.interval
    return fields


def _guidance(fields: Mapping[str, Any]) -> Choice:
    has_gnet = fields.get("gnet") is not None
    method = fields.get("method", "autoguidance" if has_gnet else "none")
    method = ALIASES.get(method, method)
    if method not in METHODS:
        raise ValueError(f"unknown guidance method {method!r}{nearest(method, list(METHODS))}")
    needs_gnet = METHODS[method].needs_gnet
    if needs_gnet and not has_gnet:
        raise ValueError(f"method {method} needs a gnet")
    if has_gnet and not (needs_gnet or METHODS[method].takes_gnet):
        raise ValueError(f"method {method} takes no gnet")
    interval = fields.get("interval")
    if interval is not None:
        if not isinstance(interval, list | tuple) or len(interval) != 2:
            raise ValueError(f"interval is {interval!r}; expected two noise levels, such as [0.28, 2.90]")
        interval = float(interval[0]), float(interval[1])
    return Choice(method, float(fields.get("guidance", 1.0)), interval, _options(method, fields.get("options", {})))


def _options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method: as given, spelled as on the command line, else the default."""
    known = {option.keyword: option for option in METHODS[method].options}
    values = {keyword: option.default for keyword, option in known.items()}
    for name, value in given.items():
        keyword = name.replace("-", "_")
        keyword = OPTION_ALIASES.get(keyword, keyword)
        if keyword not in known:
            raise ValueError(f"method {method} has no option {name!r}{nearest(keyword, list(known))}")
        values[keyword] = known[keyword].parse(str(value))
    return values


def _refuse_unknown(where: str, fields: Mapping[str, Any], known: Collection[str]) -> None:
    for key in fields:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, list(known))}")
