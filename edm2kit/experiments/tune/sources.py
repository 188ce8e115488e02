"""The networks that a search chooses among: training runs whose EMAs are rebuilt in memory, or single snapshots."""

import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edm2kit.cli.generation import load_for_sampling
from edm2kit.cli.image_source import open_images, pixels_sha256
from edm2kit.ema.rebuild import check_inputs, plan_outputs, reconstruct, write_outputs
from edm2kit.snapshots.loading import Snapshot, Weights, open_sources, open_weights
from edm2kit.torch_utils.files import sampled_sha256, sha256_of

POOR_FIT = 0.1  # above it a rebuilt EMA differs from what its length says
_USUAL_LENGTH = 0.1  # of the two lengths that training stores by default, the one that suits more networks


@dataclass(frozen=True)
class Version:
    """One network of a source: seen `nimg` training images, EMA length `ema_std` (None for raw weights)."""

    source: str
    nimg: int
    ema_std: float | None

    def __str__(self) -> str:
        ema = "raw weights" if self.ema_std is None else f"EMA {self.ema_std:.4g}"
        return f"{self.source} at {self.nimg:,} images, {ema}"


@dataclass(frozen=True)
class NetworkSource:
    """A network at several training times and EMA lengths: `weights` are the snapshots of a run, or a single one."""

    name: str
    path: str
    weights: tuple[Weights, ...]

    @property
    def is_run(self) -> bool:
        """Whether there are several times or lengths to choose from."""
        return len(self.weights) > 1

    @property
    def times(self) -> list[int]:
        """The training times of the snapshots, in images."""
        return sorted({weights.header.nimg for weights in self.weights})

    @property
    def usual(self) -> Version:
        """The latest snapshot, with the stored EMA length nearest to 0.1."""
        return self.usual_at(self.times[-1])

    def usual_at(self, nimg: int) -> Version:
        """The snapshot at a training time with the stored EMA length nearest to 0.1."""
        stored = [one.header.ema_std for one in self.weights if one.header.nimg == nimg]
        return Version(self.name, nimg, min(stored, key=lambda std: abs((std or 0) - _USUAL_LENGTH)))

    def check_length(self, nimg: int, length: float) -> None:
        """Raise ValueError unless an EMA length can be rebuilt well at a training time, or is the stored one."""
        stored = {one.header.ema_std for one in self.weights if one.header.nimg == nimg}
        if length in stored or self.lengths(nimg, [length]):
            return
        possible = ", ".join(f"{one:g}" for one in self.lengths(nimg)) or "none"
        raise ValueError(
            f"an EMA of length {length:g} cannot be rebuilt well from the snapshots in {self.path} at {nimg} images; "
            f"possible: {possible}"
        )

    def lengths(self, nimg: int, wanted: Sequence[float] | None = None) -> list[float]:
        """Those of the `wanted` EMA lengths that can be rebuilt well at a time, by default of some around the stored.

        [] for a single snapshot, which has one length.
        """
        if not self.is_run:
            return []
        stored = {one.header.ema_std for one in self.weights if one.header.nimg == nimg}
        if wanted is None:
            wanted = self._usual_lengths()
        found = []
        for length in wanted:
            rounded = float(f"{length:.3g}")
            if rounded in stored or self.fit_error(nimg, rounded) <= POOR_FIT:
                found.append(rounded)
        return found

    def _usual_lengths(self) -> list[float]:
        """The stored lengths, those between them, and up to twice as short and as long."""
        stored = sorted({one.header.ema_std or 0.0 for one in self.weights})
        between = [math.sqrt(a * b) for a, b in itertools.pairwise(stored)]
        shorter, longer = [stored[0] / 2, stored[0] / math.sqrt(2)], [stored[-1] * math.sqrt(2), stored[-1] * 2]
        return sorted([*shorter, *stored, *between, *longer])

    def fit_error(self, nimg: int, length: float) -> float:
        """Error of the rebuilt averaging profile relative to the wanted one; infinite if it cannot be rebuilt."""
        try:
            [output] = plan_outputs(self.weights, [length], [nimg])
        except ValueError:
            return float("inf")
        return output.fit.error

    def rebuild(self, version: Version) -> Weights:
        """The weights of one version: a stored snapshot, or an EMA rebuilt in memory. Raises as `reconstruct`."""
        for weights in self.weights:
            if (weights.header.nimg, weights.header.ema_std) == (version.nimg, version.ema_std):
                return weights
        assert version.ema_std is not None
        state, header = reconstruct(self.weights, version.ema_std, version.nimg)
        return Weights(str(version), header, state)

    def write(self, version: Version, path: Path) -> None:
        """Write one version as a snapshot file of its own, in float32. Raises ValueError and OSError."""
        if version.ema_std is None:
            raise ValueError(f"{self.path} holds raw weights, not an EMA; use the file itself")
        outputs = plan_outputs(self.weights, [version.ema_std], [version.nimg], dtype="float32")
        write_outputs(self.weights, outputs, [path])


def open_source_of_networks(name: str, path: str) -> NetworkSource:
    """A run folder with all its snapshots, or one snapshot: a path or URL.

    Raises ValueError if there are none, or if those in a folder are not of a single run.
    """
    if not path:
        raise ValueError(f"the path of the network {name} is empty; give a run folder or a snapshot")
    if "://" in path or not Path(path).is_dir():
        return NetworkSource(name, path, (open_weights(path),))
    found = tuple(one for one in open_sources([path]) if one.header.ema_std is not None and one.header.nimg > 0)
    if not found:
        raise ValueError(f"{path} has no snapshots with an EMA; give a run folder of train.py, or a snapshot file")
    check_inputs(found)
    return NetworkSource(name, path, found)


def contents(networks: Sequence[NetworkSource], words: Sequence[str], real: str | None) -> dict[str, str]:
    """A hash of everything behind a name that decides what a search measures, by that name.

    `words` are options of generate.py, some of which name files; `real` are the real images.
    """
    found = {}
    for network in networks:
        digest = hashlib.sha256()
        for weights in network.weights:
            assert weights.path is not None
            digest.update(f"{sampled_sha256(weights.path)} {weights.checksum()}\n".encode())
        found[network.name] = digest.hexdigest()
    for word in words:
        path = Path(word.partition("=")[2] or word)
        if path.is_file():
            found[str(path)] = sha256_of(path)
    if real is not None:
        found["--real"] = pixels_sha256(open_images(real))
    return found


class NetworkCache:
    """Networks in memory, ready to generate: the least recently used ones make room, so that memory stays bounded.

    `max_bytes` bounds the weights that are kept; the networks of the last two calls always are. Any length and time of
    a source is rebuilt when it is first asked for.
    """

    def __init__(self, sources: Sequence[NetworkSource], device: torch.device, precision: str, max_bytes: int) -> None:
        self.sources = {source.name: source for source in sources}
        self.device, self.precision, self.max_bytes = device, precision, max_bytes
        self.rebuilt = 0  # how often a network was made, not found
        self._kept: OrderedDict[Version, Snapshot] = OrderedDict()

    def get(self, version: Version) -> Snapshot:
        """The network of one version. Raises ValueError if it cannot be rebuilt or loaded."""
        if version not in self._kept:
            self.rebuilt += 1
            weights = self.sources[version.source].rebuild(version)
            self._kept[version] = load_for_sampling(weights, self.device, self.precision)
        self._kept.move_to_end(version)
        while len(self._kept) > 2 and self.num_bytes > self.max_bytes:
            self._kept.popitem(last=False)
        return self._kept[version]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights that are kept."""
        return sum(tensor.nbytes for snapshot in self._kept.values() for tensor in snapshot.net.state_dict().values())
