"""The feature detectors by metric name: their networks, weights and preprocessing.

To add one, write a module that turns uint8 images into features and enter it in DETECTORS.
"""

import difflib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.random_features import WEIGHTS_SHA256, RandomFeatures
from edm2kit.torch_utils.cache import fetch


@dataclass(frozen=True)
class WeightFile:
    """A published .pth state dict: its URL and hash."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class DetectorSpec:
    """How to build a detector. `sha256` is the hash of its weights; `weights` is None if the network makes its own."""

    build: Callable[[], nn.Module]
    num_features: int
    sha256: str
    preprocessing: str
    weights: WeightFile | None = None

    @property
    def fingerprint(self) -> str:
        """Text that two detectors share if and only if their features can be compared."""
        return f"weights sha256 {self.sha256}; {self.preprocessing}"


_INCEPTION = WeightFile(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
_DINOV2_VITL14 = WeightFile(
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)

DETECTORS: dict[str, DetectorSpec] = {
    "fid": DetectorSpec(
        InceptionV3,
        num_features=2048,
        sha256=_INCEPTION.sha256,
        preprocessing="TensorFlow-1 bilinear to 299x299, (x - 128) / 128",
        weights=_INCEPTION,
    ),
    "fd_dinov2": DetectorSpec(
        DINOv2ViT,
        num_features=1024,
        sha256=_DINOV2_VITL14.sha256,
        preprocessing="PyTorch bicubic antialiased to 224x224, ImageNet mean and std",
        weights=_DINOV2_VITL14,
    ),
    "fd_random": DetectorSpec(
        RandomFeatures,
        num_features=RandomFeatures.num_features,
        sha256=WEIGHTS_SHA256,
        preprocessing=RandomFeatures.preprocessing,
    ),
}


def register_detector(name: str, spec: DetectorSpec) -> None:
    """Make a detector available as the metric `name`, the Frechet distance of its features.

    Registering the same specification again does nothing. Raises ValueError if the name is taken by another detector.
    """
    if DETECTORS.setdefault(name, spec) is not spec:
        raise ValueError(f"a metric called {name!r} exists already; choose another name")


@dataclass(frozen=True)
class Detector:
    """A network that turns uint8 [N, 1 or 3, H, W] on its device into float32 features [N, num_features]."""

    name: str
    num_features: int
    fingerprint: str
    net: nn.Module

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # by default, cuDNN rounds convolutions to TF32
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.net(images).float()


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError if a name is not a key of DETECTORS, suggesting the nearest one."""
    for name in names:
        if name not in DETECTORS:
            near = difflib.get_close_matches(name, DETECTORS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"available metrics: {', '.join(DETECTORS)}"
            raise ValueError(f"metric {name!r} is unknown; {hint}")


def load_detector(
    name: str,
    device: torch.device | str = "cpu",
    weights_dir: str | Path | None = None,
    spec: DetectorSpec | None = None,
) -> Detector:
    """The detector of the metric `name`, with weights, on `device`; `spec` replaces the entry in DETECTORS.

    The weights come from `weights_dir`, else the cache, else a download, and must have the pinned hash. Raises
    ValueError for an unknown name, and for weights that cannot be loaded or do not fit, saying where to put the file.

    Example: `load_detector("fd_random")(images)` turns uint8 [N, 3, H, W] into float32 [N, 236].
    """
    if spec is None:
        check_names([name])
        spec = DETECTORS[name]
    net = spec.build()
    if spec.weights is not None:
        net.load_state_dict(_read_weights(name, spec.weights, weights_dir, net.state_dict()))
    net.eval().requires_grad_(False)
    return Detector(name, spec.num_features, spec.fingerprint, net.to(device))


def _read_weights(
    metric: str, weights: WeightFile, weights_dir: str | Path | None, expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise ValueError(f"--weights-dir {weights_dir}: no such folder")
    try:
        path = fetch(weights.url, weights.sha256, local_dir=weights_dir)
    except ValueError as error:
        folder = "a folder and pass it as --weights-dir" if weights_dir is None else str(weights_dir)
        raise ValueError(f"{metric} needs {weights.name}: {error}; or put {weights.name} into {folder}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a PyTorch state dict: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{weights.name} is not a state dict of tensors")
    if problems := _misfits(state, expected):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{weights.name} does not fit the network: {', '.join(problems[:3])}{more}")
    return state


def _misfits(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    found = {key: list(value.shape) for key, value in state.items()}
    problems = []
    for key, value in expected.items():
        shape, expected_shape = found.pop(key, None), list(value.shape)
        if shape is None:
            problems.append(f"{key} is missing")
        elif shape != expected_shape:
            problems.append(f"{key} has shape {shape}, expected {expected_shape}")
    return [*problems, *(f"{key} is unexpected" for key in found)]
