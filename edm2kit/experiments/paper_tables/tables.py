"""Tables of published results: rows, cells, and the files of the networks behind them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edm2kit.cli.presets import Preset, find_preset, load_presets
from edm2kit.experiments.paper_tables.raw_snapshots import STORED_STDS, fit, raw_times
from edm2kit.guidance.registry import METHODS, Choice
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.published import published_time
from edm2kit.training.config import nearest, read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
_ROW_KEYS = ("name", "group", "setting", "dataset", "note")
_CELL_KEYS = ("net", "gnet", "method", "guidance", "interval", "options", "value")


@dataclass(frozen=True)
class Network:
    """A network by its published name, RUN-KIMG-EMA; raises ValueError for a name of another form."""

    name: str

    def __post_init__(self) -> None:
        told = published_time(f"{self.name}.pkl")
        if told is None or not told[1]:
            raise ValueError(f"network {self.name!r}: expected RUN-KIMG-EMA, such as edm2-img512-s-2147483-0.130")

    @property
    def run(self) -> str:
        return published_time(f"{self.name}.pkl")[0]

    @property
    def nimg(self) -> int:
        return published_time(f"{self.name}.pkl")[1]

    @property
    def ema_std(self) -> float:
        return published_time(f"{self.name}.pkl")[2]

    @property
    def urls(self) -> tuple[str, ...]:
        """The published file; where there is none, the raw snapshots that it is rebuilt from."""
        if f"{self.name}.pkl" in published_files():
            return (published_files()[f"{self.name}.pkl"],)
        every = published()["raw_snapshots_every_nimg"]
        if self.nimg % every:
            raise ValueError(
                f"network {self.name} is not published, and no raw snapshot was taken at {self.nimg} images"
            )
        if self.ema_std in STORED_STDS:
            return (self._raw(self.nimg, self.ema_std),)
        times = raw_times(self.nimg, self.ema_std, every)
        return tuple(self._raw(nimg, std) for nimg in times for std in STORED_STDS)

    @property
    def fit(self) -> tuple[float, float | None] | None:
        """Where the network has to be rebuilt: relative error of its EMA profile, and the length that this one has."""
        if len(self.urls) == 1:
            return None
        every = published()["raw_snapshots_every_nimg"]
        return fit(raw_times(self.nimg, self.ema_std, every), self.nimg, self.ema_std)

    @property
    def fit_error(self) -> float | None:
        """The first of these."""
        return None if self.fit is None else self.fit[0]

    def _raw(self, nimg: int, std: float) -> str:
        return f"{published()['raw_snapshots_url']}{self.run}/{self.run}-{nimg // 1000:07d}-{std:.3f}.pkl"


@dataclass(frozen=True)
class Dataset:
    """What images are compared with: URL or path of reference statistics; and the shape that networks draw."""

    reference: str
    img_resolution: int
    img_channels: int
    label_dim: int


@dataclass(frozen=True)
class Cell:
    """One published number: how its images are made, and the `metric` that was `value`."""

    row: str
    metric: str
    value: float
    net: Network
    gnet: Network | None
    guidance: Choice
    dataset: Dataset

    @property
    def name(self) -> str:
        return f"{self.row}-{self.metric}"

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.net,) if self.gnet is None else (self.net, self.gnet)


@dataclass(frozen=True)
class Row:
    """Cells under one setting; `group` is what the settings of several rows vary."""

    name: str
    group: str
    setting: str
    cells: tuple[Cell, ...]
    note: str | None


@dataclass(frozen=True)
class Table:
    """A published table; `sampler` made all its images."""

    name: str
    title: str
    source: str
    sampler: Sampler
    rows: tuple[Row, ...]

    def cells(self, rows: Sequence[str] | None = None, metrics: Sequence[str] | None = None) -> list[Cell]:
        """The cells of the `rows` and `metrics` named, None meaning all; ValueError for a name that is not there."""
        there = {row.name: row for row in self.rows}
        for name in rows or ():
            if name not in there:
                raise ValueError(f"table {self.name} has no row {name!r}{nearest(name, list(there))}")
        picked = [there[name] for name in rows] if rows else self.rows
        cells = [cell for row in picked for cell in row.cells if not metrics or cell.metric in metrics]
        if not cells:
            raise ValueError(f"none of these rows has a value of {', '.join(metrics or ())}")
        return cells


@cache
def published() -> Mapping[str, Any]:
    """edm2kit/configs/published.yaml: where the published files lie, and the data sets."""
    return read_yaml(CONFIGS / "published.yaml")


@cache
def published_files() -> Mapping[str, str]:
    """URLs of the networks that are published ready-made, by file name."""
    urls = [url for preset in load_presets().values() for url in (preset.net, preset.gnet) if url is not None]
    return {url.rsplit("/", 1)[1]: url for url in urls}


def table_names() -> list[str]:
    """Names of the tables in configs/tables."""
    return sorted(path.stem for path in (CONFIGS / "tables").glob("*.yaml"))


def load_table(name: str | Path) -> Table:
    """The table `name` of configs/tables, or the one in a YAML file of your own.

    Raises ValueError, naming table, row and key, for what is unknown or missing.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in table_names():
            raise ValueError(f"unknown table {str(name)!r}{nearest(str(name), table_names())}")
        path = CONFIGS / "tables" / f"{name}.yaml"
    content = read_yaml(path)
    try:
        datasets = {**published()["datasets"], **content.get("datasets", {})}
        rows = tuple(_row(row, {key: Dataset(**value) for key, value in datasets.items()}) for row in content["rows"])
        sampler = Sampler(**content.get("sampler", {}))
        table = Table(path.stem, content["title"], content["source"], sampler, rows)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if twice := _first_twice(row.name for row in rows):
        raise ValueError(f"{path}: two rows are called {twice!r}")
    return table


def _row(fields: Mapping[str, Any], datasets: Mapping[str, Dataset]) -> Row:
    metrics = [key for key in fields if key in DETECTORS]
    if unknown := [key for key in fields if key not in (*_ROW_KEYS, *metrics)]:
        raise ValueError(f"row {fields.get('name')}: unknown key {unknown[0]!r}{nearest(unknown[0], list(_ROW_KEYS))}")
    if not re.fullmatch(r"[\w.-]+", str(fields["name"])):
        raise ValueError(f"row {fields['name']!r}: its name becomes that of a file; use letters, digits, - and _")
    if fields["dataset"] not in datasets:
        raise ValueError(
            f"row {fields['name']}: unknown data set {fields['dataset']!r}; there is {', '.join(datasets)}"
        )
    dataset = datasets[fields["dataset"]]
    cells = tuple(_cell(fields["name"], metric, fields[metric], dataset) for metric in metrics)
    return Row(fields["name"], fields["group"], fields["setting"], cells, fields.get("note"))


def _cell(row: str, metric: str, fields: Mapping[str, Any], dataset: Dataset) -> Cell:
    if "preset" in fields:
        preset = find_preset(fields["preset"])
        if preset.metric != metric:
            raise ValueError(f"row {row}: preset {fields['preset']} is for {preset.metric}, not {metric}")
        fields = {**_of_preset(preset), **{key: value for key, value in fields.items() if key != "preset"}}
    if unknown := [key for key in fields if key not in _CELL_KEYS]:
        raise ValueError(f"row {row}, {metric}: unknown key {unknown[0]!r}{nearest(unknown[0], list(_CELL_KEYS))}")
    gnet = fields.get("gnet")
    method = fields.get("method", "pair" if gnet else "none")
    if method not in METHODS:
        raise ValueError(f"row {row}, {metric}: unknown guidance method {method!r}{nearest(method, list(METHODS))}")
    if METHODS[method].needs_gnet != (gnet is not None):
        raise ValueError(f"row {row}, {metric}: method {method} {'takes no' if gnet else 'needs a'} gnet")
    weight = float(fields.get("guidance", 1.0))
    try:
        choice = Choice(method, weight, _interval(fields.get("interval")), _options(method, fields.get("options", {})))
    except ValueError as error:
        raise ValueError(f"row {row}, {metric}: {error}") from error
    return Cell(
        row,
        metric,
        float(fields["value"]),
        Network(fields["net"]),
        None if gnet is None else Network(gnet),
        choice,
        dataset,
    )


def _interval(ends: Any) -> tuple[float, float] | None:
    if ends is None:
        return None
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise ValueError(f"interval is {ends!r}; expected two noise levels, such as [0.28, 2.90]")
    return float(ends[0]), float(ends[1])


def _options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a method: as given, in the words of the command line, or its default."""
    known = {option.keyword: option for option in METHODS[method].options}
    taken = {keyword: option.default for keyword, option in known.items()}
    for name, value in given.items():
        keyword = name.replace("-", "_")
        if keyword not in known:
            raise ValueError(f"method {method} has no option {name!r}{nearest(keyword, list(known))}")
        taken[keyword] = known[keyword].parse(str(value))
    return taken


def _of_preset(preset: Preset) -> dict[str, Any]:
    names = {key: Path(url).stem for key, url in (("net", preset.net), ("gnet", preset.gnet)) if url is not None}
    settings = {"guidance": preset.guidance, "interval": preset.interval, "value": preset.value}
    return names | {key: value for key, value in settings.items() if value is not None}


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
