"""The plain way for files, averages, statistics and the toy's score: straightforward code.

The baseline of the benchmarks and an oracle of the tests: one file, one output, one batch at a time, eager.
"""

import copy
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from edm2kit.models.edm2 import Precond


class PlainDataset:
    """The PNG or .npy files of a zip, read by zipfile and decoded one at a time; labels from dataset.json."""

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path)
        self._names = sorted(name for name in self._zip.namelist() if name.endswith((".png", ".npy")))
        entries = json.loads(self._zip.read("dataset.json"))["labels"] if "dataset.json" in self._zip.namelist() else []
        self._labels = dict(entries or [])
        self._num_classes = 1 + max(self._labels.values(), default=-1)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self._names[index]
        file = io.BytesIO(self._zip.read(name))
        raw = np.load(file) if name.endswith(".npy") else np.array(Image.open(file))
        if name.endswith(".png"):
            raw = raw.reshape(*raw.shape[:2], -1).transpose(2, 0, 1)
        label = np.zeros(self._num_classes, np.float32)
        if self._labels:
            label[self._labels[name]] = 1
        return raw, label

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The items `indices` as one batch."""
        raws, labels = zip(*[self[int(k)] for k in indices], strict=True)
        return torch.from_numpy(np.stack(raws)), torch.from_numpy(np.stack(labels))


def save_network(path: Path, net: Precond) -> None:
    """Copy the network in half precision and write its state dict with torch.save."""
    half = copy.deepcopy(net).cpu().to(torch.float16)
    torch.save(half.state_dict(), path)


def load_network(path: Path, **architecture: object) -> Precond:
    """Create a network and replace its weights by those in the file."""
    net = Precond(**architecture)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def posthoc_ema(paths: Sequence[Path], coefficients: np.ndarray, out: Path) -> None:
    """Sum stored state dicts with weights, file after file, and write the result in half precision."""
    total: dict[str, torch.Tensor] = {}
    for path, coefficient in zip(paths, coefficients.tolist(), strict=True):
        for name, value in load_file(path).items():
            term = value.to(torch.float32) * coefficient
            total[name] = total[name].add_(term) if name in total else term
    save_file({name: value.to(torch.float16) for name, value in total.items()}, out)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The formula as it is stated, with scipy's matrix square root."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * np.real(root)))


class PlainMoments:
    """Mean and covariance from float64 sums, with an outer product for each batch."""

    def __init__(self, num_features: int):
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """Add rows [N, F]."""
        rows = features.to(torch.float64)
        self.count += len(rows)
        self.sum += rows.sum(dim=0)
        self.outer += rows.T @ rows

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [F] and covariance [F, F] (divided by n - 1)."""
        mean = self.sum / self.count
        covariance = (self.outer - torch.outer(self.sum, mean)) / (self.count - 1)
        return mean.numpy(), covariance.numpy()


class EigenMixture:
    """The toy's mixture of Gaussians; inverts the smoothed covariances of each point by batched eigenvectors."""

    def __init__(self, phi: np.ndarray, mu: np.ndarray, Sigma: np.ndarray):
        self.phi, self.mu, self.Sigma = (torch.from_numpy(part).float() for part in (phi, mu, Sigma))

    def score(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Gradient [N,2] of the log-density at the noisy points `x` [N,2] with noise levels `sigma` [N]."""
        values, vectors = torch.linalg.eigh(self.Sigma + sigma[:, None, None, None] ** 2 * torch.eye(2))  # [N,K,2,2]
        along = torch.einsum("nkij,nki->nkj", vectors, x[:, None] - self.mu)
        log_parts = self.phi.log() - (along**2 / values).sum(2) / 2 - values.log().sum(2) / 2
        pull = torch.einsum("nkij,nkj->nki", vectors, along / values)
        return -torch.einsum("nk,nki->ni", log_parts.softmax(1), pull)
