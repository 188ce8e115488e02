"""What measuring a cell takes: downloads, network evaluations, multiply-adds, time."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from edm2kit.denoiser import AttentionRole, for_images
from edm2kit.experiments.paper_tables.networks import PublishedNetwork
from edm2kit.experiments.paper_tables.tables import Cell, ReferenceSet
from edm2kit.guidance.registry import Parts, guide
from edm2kit.metrics.detectors.registry import DETECTORS, WeightFile
from edm2kit.models import Precond, full_architecture
from edm2kit.models.cost import Cost, evaluation_cost
from edm2kit.models.edm2 import freeze_
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.models.vae import PINNED_REVISIONS, STABILITY_VAE, VAE_FILES
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.loading import open_weights
from edm2kit.torch_utils.cache import cached, pinned
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.config import config_from_dict, preset_names, preset_path, read_yaml

_VAE_URLS = tuple(f"hf://{STABILITY_VAE}@{PINNED_REVISIONS[STABILITY_VAE]}/{name}" for name in VAE_FILES)
_HALF_BYTES = 2  # published networks are stored in float16
_PUBLISHED_METRICS = ("fid", "fd_dinov2")
# a float64 mean and covariance for each
_REFERENCE_BYTES = sum(8 * (n + n * n) for n in (DETECTORS[name].num_features for name in _PUBLISHED_METRICS))


class CallCounter:
    """Stands in for a network: computes nothing, and counts how often its full area was evaluated."""

    def __init__(self, architecture: Mapping[str, Any]):
        self.calls = 0.0
        self.label_dim = architecture["label_dim"]
        self._image_size = architecture["img_channels"] * architecture["img_resolution"] ** 2
        self._architecture = json.dumps(dict(architecture))

    @property
    def attention_blocks(self) -> list[str]:
        return list(self.attention_roles)

    @property
    def attention_roles(self) -> Mapping[str, AttentionRole]:
        return _interior(self._architecture)[0]

    @property
    def supported_edits(self) -> frozenset[str]:
        return _interior(self._architecture)[1]

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        condition: Any = None,
        /,
        *,
        return_attention: Sequence[str] = (),
        **edits: Any,
    ) -> Any:
        self.calls += x.numel() / self._image_size  # several calls may come as one batch, and a crop counts by its area
        D = torch.zeros_like(x)
        if not return_attention:
            return D
        maps = {}
        for block in return_attention:
            tokens = self.attention_roles[block].resolution ** 2
            maps[block] = torch.full([len(x), 1, tokens, tokens], 1 / tokens)
        return D, maps


@dataclass(frozen=True)
class NeededFile:
    """A file that a cell needs; `num_bytes` is None if its size is unknown before the download."""

    url: str
    num_bytes: int | None
    is_here: bool


@dataclass(frozen=True)
class CellCost:
    """What one image of a cell takes: evaluations of both networks, and multiply-adds of both together.

    Decoding and scoring come on top: a few per cent for the larger networks.
    """

    cell: Cell
    net_evaluations: float
    gnet_evaluations: float
    multiply_adds: float
    files: Sequence[NeededFile] = field(repr=False)


def cell_cost(cell: Cell, sampler: Sampler) -> CellCost:
    """The cost per image; downloads nothing if each network's run has a preset in edm2kit/configs/train."""
    net_evaluations, gnet_evaluations = count_evaluations(cell, sampler)
    costs = [network_cost(network, cell.dataset) for network in cell.networks]
    multiply_adds = net_evaluations * costs[0].multiply_adds
    if cell.gnet is not None:
        multiply_adds += gnet_evaluations * costs[1].multiply_adds
    files = []
    for network, cost in zip(cell.networks, costs, strict=True):
        files += [_needed_file(url, cost.parameters * _HALF_BYTES) for url in network.urls]
    files += [_needed_file(url, size) for url, size in other_files(cell).items()]
    return CellCost(cell, net_evaluations, gnet_evaluations, multiply_adds, files)


def other_files(cell: Cell) -> dict[str, int | None]:
    """What a cell needs besides its networks: URLs, with the size in bytes if it follows from the content."""
    files: dict[str, int | None] = {cell.dataset.reference: _REFERENCE_BYTES}
    weights = DETECTORS[cell.metric].weights
    if isinstance(weights, WeightFile):
        files[weights.url] = None
    if _architecture(cell.net, cell.dataset)["img_channels"] == 4:
        files |= dict.fromkeys(_VAE_URLS)
    return files


def _needed_file(url: str, expected_bytes: int | None) -> NeededFile:
    path = cached(url)
    if path is not None:
        return NeededFile(url, path.stat().st_size, True)
    pin = pinned(url)
    if pin is not None and pin.size_bytes is not None:
        expected_bytes = pin.size_bytes
    return NeededFile(url, expected_bytes, False)


def count_evaluations(cell: Cell, sampler: Sampler) -> tuple[float, float]:
    """Evaluations of the main and the guide network for one image, counted by sampling with `CallCounter`s.

    Raises ValueError if the guidance method refuses its settings.
    """
    counters = [CallCounter(_architecture(network, cell.dataset)) for network in cell.networks]
    parts = Parts(counters[0], counters[1] if len(counters) > 1 else None)
    denoiser = for_images(guide(cell.guidance, parts), StackedGenerator(torch.device("cpu"), [0]))
    shape = (1, cell.dataset.img_channels, cell.dataset.img_resolution, cell.dataset.img_resolution)
    labels = torch.eye(1, counters[0].label_dim) if counters[0].label_dim else None
    sampler(denoiser, torch.zeros(shape), labels)
    counts = [counter.calls for counter in counters]
    main, guide_calls = counts if len(counts) == 2 else (counts[0], 0)
    return _integer_if_possible(main), _integer_if_possible(guide_calls)


def _integer_if_possible(count: float) -> float:
    return int(count) if float(count).is_integer() else count


def network_cost(network: PublishedNetwork, dataset: ReferenceSet) -> Cost:
    """Parameters, and multiply-adds of one evaluation."""
    return _cost(json.dumps(_architecture(network, dataset)))


@cache
def _cost(architecture: str) -> Cost:
    # takes seconds for a large network, and a table names each network many times
    return evaluation_cost(json.loads(architecture))


@cache
def _interior(architecture: str) -> tuple[Mapping[str, AttentionRole], frozenset[str]]:
    with torch.device("meta"):
        net = Precond(**json.loads(architecture))
    return net.attention_roles, net.supported_edits


@cache
def _architecture(network: PublishedNetwork, dataset: ReferenceSet) -> Mapping[str, Any]:
    """Arguments of the network, from the preset of its run or, without one, from its file."""
    preset = network.run.removesuffix("-uncond")
    if preset not in preset_names():
        return open_weights(network.urls[-1]).header.architecture
    config = config_from_dict(read_yaml(preset_path(preset)), preset)
    label_dim = 0 if network.run.endswith("-uncond") else dataset.label_dim
    return full_architecture(dataset.img_resolution, dataset.img_channels, label_dim, config.sigma_data, config.network)


def measure_flops(cell: Cell, device: torch.device, precision: str, batch: int, min_sec: float = 2.0) -> float:
    """Floating-point operations per second of the cell's main network on `device`, with random weights.

    `precision` is a key of PRECISIONS. A multiply-add is two operations.
    """
    architecture = _architecture(cell.net, cell.dataset)
    net = Precond(**architecture).to(device)
    net.compute_dtype = PRECISIONS[precision]
    freeze_(net)
    x = torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution, device=device)
    labels = torch.zeros(batch, net.label_dim, device=device) if net.label_dim else None
    sigma = torch.ones(batch, device=device)
    net(x, sigma, labels).sum().item()  # the first call compiles and allocates
    started, calls = time.monotonic(), 0
    while time.monotonic() - started < min_sec:
        net(x, sigma, labels).sum().item()
        calls += 1
    return 2 * evaluation_cost(architecture).multiply_adds * batch * calls / (time.monotonic() - started)
