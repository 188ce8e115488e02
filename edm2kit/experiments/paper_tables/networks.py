"""Published networks by name: where their files are, and how those that are not published are rebuilt."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.cli.presets import load_presets
from edm2kit.ema.power_function import profile_fit, solve_posthoc_coefficients
from edm2kit.ema.rebuild import plan_outputs, write_outputs
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import open_weights
from edm2kit.snapshots.published import published_time
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.cache import fetch
from edm2kit.training.config import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
STORED_STDS = (0.050, 0.100)  # EMA lengths of the raw snapshots
_GOOD_FIT = 0.005  # relative error of the rebuilt profile; with more snapshots no measurable difference remains
_COARSEST = 16  # try every 16th raw snapshot first, then every 8th, ...


@cache
def published() -> Mapping[str, Any]:
    """The contents of edm2kit/configs/published.yaml: addresses of the published files, and data sets."""
    return read_yaml(CONFIGS / "published.yaml")


@cache
def published_files() -> Mapping[str, str]:
    """URLs of the networks that can be downloaded as they are, by file name."""
    files = {}
    for preset in load_presets().values():
        for url in (preset.net, preset.gnet):
            if url is not None:
                files[url.rsplit("/", 1)[1]] = url
    return files


@dataclass(frozen=True)
class ProfileFit:
    """How well raw snapshots rebuild an EMA.

    `error` is the L2 distance of the rebuilt averaging profile from the wanted one, relative to the norm of the wanted
    one (Karras et al. 2023, Section 3.2): 0 is perfect, 0.1 changes the EMA length by about 5 %. `ema_std` is the
    length of the rebuilt profile, None if it has none.
    """

    error: float
    ema_std: float | None


@dataclass(frozen=True)
class PublishedNetwork:
    """A network by its published name, RUN-KIMG-EMA, e.g. edm2-img512-s-2147483-0.130; make it with `named`."""

    name: str
    run: str
    nimg: int
    ema_std: float

    @classmethod
    def named(cls, name: str) -> "PublishedNetwork":
        """Raises ValueError if `name` is not of the form RUN-KIMG-EMA."""
        parts = published_time(f"{name}.pkl")
        if parts is None or parts[1] == 0:
            raise ValueError(f"network {name!r}: expected RUN-KIMG-EMA, such as edm2-img512-s-2147483-0.130")
        return cls(name, *parts)

    @property
    def urls(self) -> tuple[str, ...]:
        """The published file or, if there is none, the raw snapshots from which the network is rebuilt."""
        url = published_files().get(f"{self.name}.pkl")
        if url is not None:
            return (url,)
        if self.nimg % _raw_interval_nimg():
            raise ValueError(
                f"network {self.name} is not published, and no raw snapshot was taken at {self.nimg} images"
            )
        if self.ema_std in STORED_STDS:
            return (self._raw_url(self.nimg, self.ema_std),)
        times = raw_times(self.nimg, self.ema_std, _raw_interval_nimg())
        return tuple(self._raw_url(nimg, std) for nimg in times for std in STORED_STDS)

    @property
    def fit(self) -> ProfileFit | None:
        """How well the raw snapshots rebuild the network; None if it is one file."""
        if len(self.urls) == 1:
            return None
        times = raw_times(self.nimg, self.ema_std, _raw_interval_nimg())
        return profile_fit_of(times, self.nimg, self.ema_std)

    def _raw_url(self, nimg: int, std: float) -> str:
        return f"{published()['raw_snapshots_url']}{self.run}/{self.run}-{nimg // 1000:07d}-{std:.3f}.pkl"


def _raw_interval_nimg() -> int:
    return published()["raw_snapshots_every_nimg"]


@cache
def raw_times(nimg: int, ema_std: float, every_nimg: int) -> tuple[int, ...]:
    """Times of the raw snapshots to use: the fewest, evenly spaced up to `nimg`, with a good fit, else all.

    A run stored two snapshots, of the lengths STORED_STDS, every `every_nimg` images. For long runs a quarter to a half
    of them are enough.
    """
    spacing = _COARSEST * every_nimg
    while True:
        times = tuple(range(nimg, 0, -spacing))[::-1]
        if spacing == every_nimg:
            return times
        if len(times) > 1 and profile_fit_of(times, nimg, ema_std).error <= _GOOD_FIT:
            return times
        spacing //= 2


@cache
def profile_fit_of(times: tuple[int, ...], nimg: int, ema_std: float) -> ProfileFit:
    """The fit of snapshots at `times`, of both STORED_STDS each, to an EMA of length `ema_std` at `nimg` images."""
    t = np.repeat(np.array(times, dtype=np.float64), len(STORED_STDS))
    stds = np.tile(STORED_STDS, len(times))
    coefficients = solve_posthoc_coefficients(t, stds, [nimg], [ema_std])[:, 0]
    return ProfileFit(*profile_fit(coefficients, t, stds, nimg, ema_std))


def snapshot_of(network: PublishedNetwork, folder: Path) -> Path:
    """The network as a file on this machine: downloaded, or rebuilt into `folder`, where it stays for other cells.

    Call on one rank. Raises ValueError if a download fails or the raw snapshots do not belong together.
    """
    if len(network.urls) == 1:
        return fetch(network.urls[0])
    path = folder / f"{network.name}.safetensors"
    if not path.exists():
        dist.print0(f"{network.name} is not published. Rebuilding it from {len(network.urls)} raw snapshots")
        inputs = [open_weights(url) for url in network.urls]
        outputs = plan_outputs(inputs, [network.ema_std], [network.nimg])
        dist.print0(f"fit error {outputs[0].fit.error:.2g}, rounding {outputs[0].fit.rounding:.2g}")
        write_outputs(inputs, outputs, [path])
    header = read_header(path)
    if (header.nimg, header.ema_std) != (network.nimg, network.ema_std) or header.recipe is None:
        raise ValueError(
            f"{path} is not {network.name}: it was trained for {header.nimg} images and has EMA length "
            f"{header.ema_std}. Delete it to rebuild the network"
        )
    return path
