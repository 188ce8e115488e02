"""The feature detectors by metric name: what they are built from, and which weights they take."""

import difflib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.random_features import WEIGHTS_SHA256, RandomFeatures
from edm2kit.torch_utils.files import fetch


@dataclass(frozen=True)
class WeightFile:
    """A published .pth state dict: where to download it, and its hash."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class DetectorSpec:
    """How to build a detector. `weights` is None where the network makes its own, `sha256` being their hash."""

    build: Callable[[], nn.Module]
    num_features: int
    sha256: str
    preprocessing: str
    weights: WeightFile | None = None

    @property
    def fingerprint(self) -> str:
        """What two sets of features must have in common to be comparable."""
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


@dataclass(frozen=True)
class Detector:
    """A network that turns uint8 [N, 1 or 3, H, W] on its device into float32 features [N, num_features]."""

    name: str
    num_features: int
    fingerprint: str
    net: nn.Module

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # cuDNN rounds convolutions to TF32 unless told otherwise
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.net(images).float()


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no detector has, with the nearest one."""
    for name in names:
        if name not in DETECTORS:
            near = difflib.get_close_matches(name, DETECTORS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DETECTORS)}"
            raise ValueError(f"metric {name!r} is unknown; {hint}")


def load_detector(
    name: str,
    device: torch.device | str = "cpu",
    weights_dir: str | Path | None = None,
    spec: DetectorSpec | None = None,
) -> Detector:
    """The detector of metric `name`, ready on `device`; `spec` stands in for the registry's entry.

    Weights come from `weights_dir`, else the cache, else a download, and must have the pinned hash. Raises
    ValueError for an unknown name, and for weights that cannot be had or don't fit, saying where to put them.
    """
    if spec is None:
        check_names([name])
        spec = DETECTORS[name]
    state = None if spec.weights is None else _read_weights(name, spec.weights, weights_dir)
    net = spec.build()
    if state is not None:
        _check_state(state, net.state_dict(), spec.weights.name)
        net.load_state_dict(state)
    net.eval().requires_grad_(False)
    return Detector(name, spec.num_features, spec.fingerprint, net.to(device))


def _read_weights(name: str, weights: WeightFile, weights_dir: str | Path | None) -> object:
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise ValueError(f"--weights-dir {weights_dir}: no such folder")
    try:
        path = fetch(weights.url, weights.sha256, local_dir=weights_dir)
    except ValueError as error:
        folder = "a folder that you name by --weights-dir" if weights_dir is None else str(weights_dir)
        raise ValueError(f"{name} needs {weights.name}: {error}; or put {weights.name} into {folder}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no PyTorch state dict: {str(error).splitlines()[0]}") from error


def _check_state(state: object, expected: dict[str, torch.Tensor], file_name: str) -> None:
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file_name} holds no state dict of tensors")
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unexpected" for key in state if key not in expected]
    problems += [
        f"{key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{file_name} does not fit the network: {', '.join(problems[:3])}{more}")
