"""A detector of your own: a program of torch.export in a .pt2 file, with its preprocessing declared beside it."""

import io
import json
import logging
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from edm2kit.metrics.detectors.preprocess import Preprocessing
from edm2kit.metrics.detectors.registry import NOT_FID, DetectorSpec
from edm2kit.torch_utils.files import atomic_write, sha256_of

ENTRY = "preprocessing.json"  # the extra file inside the .pt2
_MAX_CHARS = 1 << 16  # of the preprocessing
MAX_FEATURES = 16384  # their covariance takes 2 GiB
_TRIAL_IMAGES = 3
_INDEPENDENT = 1e-3  # largest relative change of features if the other images of a batch change


def export_detector(net: nn.Module, path: str | Path, preprocessing: Preprocessing) -> None:
    """Write a network as a .pt2 file for `--detector NAME=path` and `exported_detector`.

    `net` maps float32 [N, 3, size, size], prepared as `preprocessing` says, to features [N, F] for any N. It is
    exported in evaluation mode. Raises what `torch.export.export` raises if the network cannot be exported.

    Example: `export_detector(net, "my.pt2", Preprocessing(224, "bicubic", (0, 1), (0.5,) * 3, (0.5,) * 3))`
    """
    example = torch.zeros(_TRIAL_IMAGES, 3, preprocessing.size, preprocessing.size)
    program = torch.export.export(net.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = {name: getattr(preprocessing, name) for name in Preprocessing.__dataclass_fields__}
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ENTRY: json.dumps(content)})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def exported_detector(path: str | Path) -> DetectorSpec:
    """The detector in a .pt2 file of torch.export, for `register_detector`; its fingerprint is the hash of the file.

    The preprocessing is the extra file "preprocessing.json" inside (`export_detector` writes it), or a file of the same
    name with the suffix .yaml: the fields of `Preprocessing`. The program runs once, on random images. Raises
    ValueError if the preprocessing is missing or wrong, if the program does not turn N images into floats [N, F] for
    any N, or if the features of an image depend on the other images of its batch.

    Loading a .pt2 file can execute code in it: use only files that you trust.

    Example: `register_detector("my", exported_detector("my.pt2"))`, then "my" is a name for `measure_reference`.
    """
    path = Path(path)
    program, entry = _load(path)
    preprocessing = read_preprocessing(path, entry)
    return DetectorSpec(
        partial(ExportedDetector, path, preprocessing),
        num_features=_try(path, ExportedDetector(path, preprocessing, program)),
        sha256=sha256_of(path),
        preprocessing=str(preprocessing),
        caution=NOT_FID,
    )


class ExportedDetector(nn.Module):
    """The program in a .pt2 file after its preprocessing: uint8 [N, 1 or 3, H, W] -> features [N, F]."""

    def __init__(self, path: Path, preprocessing: Preprocessing, program: nn.Module | None = None) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.program = _load(path)[0] if program is None else program

    def train(self, mode: bool = True) -> "ExportedDetector":
        return self  # a program keeps the mode it was exported in, and refuses another

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.program(self.preprocessing(images))


def _load(path: Path) -> tuple[nn.Module, str | None]:
    """The program as a module, and the text of its extra file if it has one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a .pt2 file of torch.export")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .pt2 file of torch.export, or it is truncated")
    entries: dict[str, Any] = {ENTRY: ""}
    log = logging.getLogger("torch.export")
    was_disabled, log.disabled = log.disabled, True  # it logs tracebacks; the error below says what is needed
    try:
        program = torch.export.load(path, extra_files=entries).module()
    except Exception as error:  # a file of any other kind can lead to any error inside torch
        raise ValueError(
            f"{path} cannot be loaded by torch {torch.__version__} ({_reason(error)}). Write it again with "
            "torch.export.save"
        ) from error
    finally:
        log.disabled = was_disabled
    text = entries[ENTRY]
    return program, (text.decode() if isinstance(text, bytes) else text) or None


def read_preprocessing(path: Path, entry: str | None = None) -> Preprocessing:
    """The preprocessing of the program at `path`: the text `entry` in it, or the .yaml beside it.

    Raises ValueError if there is none or it is wrong, or if there are two.
    """
    beside = path.with_suffix(".yaml")
    if entry is not None and beside.exists():
        raise ValueError(f"{path} contains its preprocessing, and {beside} declares another; remove that file")
    if entry is None and not beside.exists():
        names = ", ".join(Preprocessing.__dataclass_fields__)
        raise ValueError(
            f"{path} does not say how images are prepared. Write {beside} with {names}, or export it with "
            "edm2kit.metrics.export_detector"
        )
    try:
        text = beside.read_text(encoding="utf-8") if entry is None else entry
        if len(text) > _MAX_CHARS:
            raise ValueError(f"it has {len(text)} characters; at most {_MAX_CHARS} are read")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few lines may stand for gigabytes
            raise ValueError("it repeats a part by its name (*name); write the values out")
        return Preprocessing.from_mapping(yaml.safe_load(text))  # JSON is YAML
    except Exception as error:  # of PyYAML, and those of Python for values that do not fit their tags
        where = beside if entry is None else f"{ENTRY} in {path}"
        raise ValueError(f"{where}: {_reason(error)}") from error


@torch.no_grad()
def _try(path: Path, detector: ExportedDetector) -> int:
    """The number of features that the program returns. Raises ValueError if it cannot be a detector."""
    side = detector.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (_TRIAL_IMAGES, 3, side, side), np.uint8)
    images = torch.from_numpy(pixels)
    found: list[torch.Tensor] = []
    for batch in (images, images[:2]):
        try:
            features = detector(batch)
        except Exception as error:
            raise ValueError(
                f"{path} fails on {len(batch)} images of {side}x{side} pixels ({_reason(error)}). Export it with a "
                "dynamic number of images and this size"
            ) from error
        if not isinstance(features, torch.Tensor):
            raise ValueError(f"{path} returns a {type(features).__name__}; expected one tensor of features [N, F]")
        if features.ndim != 2 or len(features) != len(batch) or not features.is_floating_point():
            raise ValueError(
                f"{path} returns {features.dtype} of shape {list(features.shape)} for {len(batch)} images; expected "
                f"floats of shape [{len(batch)}, F]"
            )
        found.append(features.double())
    num_features = found[0].shape[1]
    if not 1 <= num_features <= MAX_FEATURES:
        raise ValueError(f"{path} returns {num_features} features; expected 1 to {MAX_FEATURES}")
    if not found[0].isfinite().all():
        raise ValueError(f"{path} returns features that are not finite (NaN or infinity) for random images")
    if (found[0][:2] - found[1]).abs().max() > _INDEPENDENT * found[0].abs().max():
        raise ValueError(
            f"{path} returns other features for an image if the rest of its batch changes; call .eval() before "
            "exporting it"
        )
    return num_features


def _reason(error: Exception) -> str:
    """The first line of an error of torch, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
