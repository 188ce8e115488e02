"""What reproducing some cells will need: downloads, evaluations, multiply-adds, time."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from edm2kit.denoiser import for_images
from edm2kit.experiments.paper_tables.tables import Cell, Dataset, Network
from edm2kit.guidance.registry import Parts, guide
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.models.cost import Cost, evaluation_cost
from edm2kit.models.edm2 import Precond, full_architecture
from edm2kit.models.frozen import freeze_
from edm2kit.models.vae import PINNED_REVISIONS, STABILITY_VAE, VAE_FILES
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.weights import open_weights
from edm2kit.torch_utils.files import cached, pinned
from edm2kit.torch_utils.precision import PRECISIONS
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.config import config_from_dict, preset_names, preset_path, read_yaml

_VAE_URLS = tuple(f"hf://{STABILITY_VAE}@{PINNED_REVISIONS[STABILITY_VAE]}/{name}" for name in VAE_FILES)
_HALF_BYTES = 2  # published networks are stored in float16
_PUBLISHED_METRICS = ("fid", "fd_dinov2")
# float64 mean and covariance of each
_REFERENCE_BYTES = sum(8 * (n + n * n) for n in (DETECTORS[name].num_features for name in _PUBLISHED_METRICS))


class CountedCalls:
    """Stands in for a network of `architecture`: does nothing, and counts how often its area was evaluated."""

    def __init__(self, architecture: Mapping[str, Any]):
        self.architecture, self.calls = architecture, 0.0
        self.label_dim = architecture["label_dim"]

    @property
    def attention_blocks(self) -> list[str]:
        return _attention_blocks(json.dumps(dict(self.architecture)))

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        return_attention: Sequence[str] = (),
        **edits: Any,
    ) -> Any:
        whole = self.architecture["img_channels"] * self.architecture["img_resolution"] ** 2
        self.calls += x.numel() / whole  # several calls may come as one batch, and crops are less than one
        sides = {block: int(block.partition("x")[2].partition("_")[0]) for block in return_attention}
        maps = {block: torch.full([len(x), 1, side**2, side**2], side**-2.0) for block, side in sides.items()}
        return (x * 0, maps) if return_attention else x * 0


@dataclass(frozen=True)
class Download:
    """A file to be had: `num_bytes` where it is known or follows from the network's size, else None."""

    url: str
    num_bytes: int | None
    is_here: bool


@dataclass(frozen=True)
class Need:
    """What one image of a cell takes: evaluations of either network, and multiply-adds of both together.

    Decoding and scoring come on top: a few per cent for the larger networks.
    """

    cell: Cell
    net_evaluations: float
    gnet_evaluations: float
    multiply_adds: float
    downloads: Sequence[Download] = field(repr=False)


def need_of(cell: Cell, sampler: Sampler) -> Need:
    """The needs of one image; nothing is downloaded where the network's run has a configuration in configs/train."""
    main, guide_calls = count_evaluations(cell, sampler)
    costs = [cost_of(network, cell.dataset) for network in cell.networks]
    total = sum(n * cost.multiply_adds for n, cost in zip((main, guide_calls), costs, strict=False))
    networks = [
        Download(url, _size(url, cost.parameters * _HALF_BYTES), cached(url) is not None)
        for network, cost in zip(cell.networks, costs, strict=True)
        for url in network.urls
    ]
    files = [Download(url, _size(url, size), cached(url) is not None) for url, size in files_beside(cell).items()]
    return Need(cell, main, guide_calls, total, (*networks, *files))


def files_beside(cell: Cell) -> dict[str, int | None]:
    """What a cell needs besides its networks: URLs, and sizes in bytes where they follow from what is inside."""
    weights = DETECTORS[cell.metric].weights
    files = {cell.dataset.reference: _REFERENCE_BYTES} | ({weights.url: None} if weights else {})
    if _architecture(cell.net, cell.dataset)["img_channels"] == 4:
        files |= {url: None for url in _VAE_URLS}
    return files


def count_evaluations(cell: Cell, sampler: Sampler) -> tuple[float, float]:
    """Evaluations of the main and the guide network for one image, counted by a run on networks that do nothing.

    Raises ValueError where the method refuses its settings.
    """
    nets = [CountedCalls(_architecture(network, cell.dataset)) for network in cell.networks]
    denoiser = for_images(guide(cell.guidance, Parts(*nets)), StackedGenerator(torch.device("cpu"), [0]))
    shape = (1, cell.dataset.img_channels, cell.dataset.img_resolution, cell.dataset.img_resolution)
    labels = torch.eye(1, nets[0].label_dim) if nets[0].label_dim else None
    sampler(denoiser, torch.zeros(shape), labels)
    counts = [int(net.calls) if net.calls.is_integer() else net.calls for net in nets]
    return counts[0], counts[1] if len(counts) > 1 else 0


def cost_of(network: Network, dataset: Dataset) -> Cost:
    """Parameters and multiply-adds of one evaluation."""
    return _cost(json.dumps(_architecture(network, dataset)))


@cache
def _cost(architecture: str) -> Cost:
    # seconds for a large network, and a table names each of them many times
    return evaluation_cost(json.loads(architecture))


@cache
def _attention_blocks(architecture: str) -> list[str]:
    with torch.device("meta"):
        return Precond(**json.loads(architecture)).attention_blocks


@cache
def _architecture(network: Network, dataset: Dataset) -> Mapping[str, Any]:
    preset = network.run.removesuffix("-uncond")
    if preset not in preset_names():
        return open_weights(network.urls[-1]).header.architecture
    config = config_from_dict(read_yaml(preset_path(preset)), preset)
    label_dim = 0 if network.run.endswith("-uncond") else dataset.label_dim
    return full_architecture(dataset.img_resolution, dataset.img_channels, label_dim, config.sigma_data, config.network)


def _size(url: str, otherwise: int | None) -> int | None:
    if (path := cached(url)) is not None:
        return path.stat().st_size
    pin = pinned(url)
    return pin.size_bytes if pin is not None and pin.size_bytes is not None else otherwise


def measure_flops(cell: Cell, device: torch.device, precision: str, batch: int, min_sec: float = 2.0) -> float:
    """Floating-point operations per second of the cell's main network on `device`, with random weights.

    `precision` is a key of PRECISIONS; two operations make a multiply-add.
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
