"""CLIP and SigLIP image encoders from a folder or the Hugging Face hub, through transformers (extra "clip")."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edm2kit.metrics.detectors.preprocess import Preprocessing
from edm2kit.metrics.detectors.registry import NOT_FID, DetectorSpec

# The encoder of CMMD, by name and by shape. Jayasumana et al. 2023 (arXiv 2401.09603)
CMMD_MODEL = "openai/clip-vit-large-patch14-336"
_CMMD_SHAPE = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "projection_dim": 768}
# Not verified: the paper does not say how images are resized. This is the default bicubic resize of PyTorch.
_CMMD_RESIZE = "bicubic-no-antialias"
# model_type in config.json -> class of transformers, and the output that holds the image embedding
KINDS = {"clip": ("CLIPVisionModelWithProjection", "image_embeds"), "siglip": ("SiglipVisionModel", "pooler_output")}
_RESAMPLE = {2: "bilinear-pil", 3: "bicubic-pil"}  # numbers of Pillow in preprocessor_config.json
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def clip_detector(source: str | Path = CMMD_MODEL) -> DetectorSpec:
    """The image embedding of a CLIP or SigLIP model, for `register_detector`.

    `source` is a folder that `save_pretrained` wrote, or a name on the Hugging Face hub, which downloads the model. The
    images are prepared as its preprocessor_config.json says, except that they are resized to a square without a crop,
    and for CLIP ViT-L/14-336, the model of CMMD, in PyTorch. With that model the metric "mmd" is CMMD. The fingerprint
    is the hash of the weights. Raises ValueError if transformers is not installed, the model cannot be loaded, is of
    another kind or incomplete.

    Example: `register_detector("clip", clip_detector())`, then "clip.mmd" is a name for `score_images`.
    """
    name = str(source)
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise ValueError(f"{name} is neither a folder nor a name on the Hugging Face hub such as {CMMD_MODEL}")
    net = ImageEncoder(name)
    return DetectorSpec(
        partial(ImageEncoder, name),
        num_features=net.num_features,
        sha256=_sha256_of_tensors(net),
        preprocessing=f"{net.kind} image embedding; {net.preprocessing}",
        caution=NOT_FID,
    )


class ImageEncoder(nn.Module):
    """Embeddings of a CLIP or SigLIP model: uint8 [N, 1 or 3, H, W] -> float32 [N, num_features]."""

    def __init__(self, source: str) -> None:
        super().__init__()
        transformers = _transformers(source)
        with _explained(source), _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(source)
            if config.model_type not in KINDS:
                raise ValueError(f"{source} is a model of kind {config.model_type}; expected {' or '.join(KINDS)}")
            self.kind = config.model_type
            class_name, self._output = KINDS[self.kind]
            model, loading = getattr(transformers, class_name).from_pretrained(source, output_loading_info=True)
            if loading["missing_keys"]:
                raise ValueError(f"{source} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
            prepared, _ = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(source)
        self.model = model.float().eval().requires_grad_(False)
        vision = model.config
        self.num_features = int(vision.projection_dim if self.kind == "clip" else vision.hidden_size)
        self.preprocessing = _preprocessing(source, prepared, int(vision.image_size))
        if all(getattr(vision, name, None) == value for name, value in _CMMD_SHAPE.items()):
            self.preprocessing = replace(self.preprocessing, resize=_CMMD_RESIZE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(pixel_values=self.preprocessing(images)), self._output)


def _transformers(source: str) -> Any:
    try:
        import transformers
        import transformers.image_processing_utils
    except ImportError as error:
        raise ValueError(
            f"{source} is a model of transformers, which is not installed; run `pip install 'edm2kit[clip]'`"
        ) from error
    return transformers


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Errors of transformers and the hub in one line with the next step."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, RuntimeError):  # the report with the details is not shown
            reason = ["its weights do not fit its config.json"]
        hint = "Check the folder"
        if not Path(source).is_dir():
            hint = f"Run `hf download {source} --local-dir DIR` where there is a connection, and give DIR instead"
        raise ValueError(f"{source} cannot be loaded: {reason[0].rstrip('.')}. {hint}") from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the report that the text encoder's weights are not used, and without progress bars."""
    logging = transformers.logging
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


def _preprocessing(source: str, content: dict[str, Any], image_size: int) -> Preprocessing:
    """What preprocessor_config.json says, as far as it is of the usual form; raises ValueError otherwise."""
    size = content.get("crop_size") if content.get("do_center_crop") else content.get("size")
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if sides != {image_size}:
        raise ValueError(f"{source} resizes images to {size}; its encoder takes {image_size}x{image_size} pixels")
    if not (content.get("do_rescale", True) and content.get("do_normalize", True)):
        raise ValueError(f"{source} does not scale and normalise images; its preprocessor_config.json is not supported")
    resample = content.get("resample")
    if resample not in _RESAMPLE:
        raise ValueError(f"{source} resizes with filter {resample}; expected {' or '.join(map(str, _RESAMPLE))}")
    scale = round(255 * float(content.get("rescale_factor", 1 / 255)), 6)  # 1 / 255 may be written with few digits
    content = {
        "size": image_size,
        "resize": _RESAMPLE[resample],
        "value_range": [0.0, scale],
        "mean": content.get("image_mean"),
        "std": content.get("image_std"),
    }
    try:
        return Preprocessing.from_mapping(content)
    except ValueError as error:
        raise ValueError(f"{source}: preprocessor_config.json: {error}") from error


def _sha256_of_tensors(net: nn.Module) -> str:
    """The hash of all tensors, whatever kind of file they came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
