"""EDM2 snapshots as users of diffusers expect them: a folder with configurations, and a pipeline to call.

Loading takes this package, not code from the folder, so `trust_remote_code` is not needed.
"""

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edm2kit.conditions import class_named
from edm2kit.guidance.base import Parts
from edm2kit.guidance.registry import Choice
from edm2kit.guidance.registry import guide as guided_by
from edm2kit.models.encoders import to_image
from edm2kit.sampling.engine import Engine
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import Snapshot, load_snapshot
from edm2kit.torch_utils.files import atomic_write, write_json

_INDEX, _CONFIG, _WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"
_NAME = "EDM2Pipeline"


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL images, one per class label; or uint8 [N, C, H, W] with output_type "pt"."""

    images: Any


class EDM2Pipeline:
    """A network, ready to be called with class labels; `snapshot` is what `load_snapshot` returns.

    Example:

        pipe = EDM2Pipeline.from_pretrained("edm2-s", "cuda", torch.float16)
        weaker = EDM2Pipeline.from_pretrained("edm2-xs", "cuda", torch.float16)
        image = pipe(class_labels=[207], num_inference_steps=32, guide=weaker, guidance_scale=2.1).images[0]
    """

    def __init__(self, snapshot: Snapshot, device: torch.device | str = "cpu", source: Path | None = None):
        self.snapshot, self.device, self._source = snapshot, torch.device(device), source

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "EDM2Pipeline":
        """From a folder that `save_pretrained` wrote, or from a snapshot: a path or a URL.

        Raises ValueError if it is neither, or damaged.
        """
        folder = Path(path)
        source: str | Path = path
        if folder.is_dir():
            source = _weights_in(folder)
        snapshot = load_snapshot(source, device, dtype)
        local = Path(source)
        return cls(snapshot, device, local if local.is_file() else None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder: model_index.json, network/config.json, and the weights as safetensors.

        The weights file is a snapshot, with its header, so every command here reads it, too. Raises ValueError
        if the pipeline was not loaded from a local snapshot of this project's format.
        """
        if self._source is None or self._source.suffix != ".safetensors":
            raise ValueError("only snapshots in this project's format can be exported; convert_snapshot.py converts")
        folder = Path(folder)
        header = read_header(self._source)
        weights = folder / "network" / _WEIGHTS
        weights.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(weights) as file, open(self._source, "rb") as original:
            shutil.copyfileobj(original, file)
        config = {
            "_class_name": header.network,
            "_edm2kit_version": _version(),
            "architecture": dict(header.architecture),
            "encoder": dict(header.encoder),
            "ema_std": header.ema_std,
            "nimg": header.nimg,
        }
        write_json(folder / "network" / _CONFIG, config)
        index: dict[str, Any] = {
            "_class_name": _NAME,
            "_edm2kit_version": _version(),
            "network": ["edm2kit", header.network],
        }
        if header.label_names is not None:
            index["id2label"] = {str(k): name for k, name in enumerate(header.label_names)}
        write_json(folder / _INDEX, index)

    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        num_inference_steps: int = 32,
        guide: "EDM2Pipeline | None" = None,
        guidance_scale: float = 2.0,
        *,
        seeds: Sequence[int] | None = None,
        interval: tuple[float, float] | None = None,
        choice: Choice | None = None,
        output_type: str = "pil",
    ) -> PipelineOutput:
        """Generate an image per class label.

        - `class_labels`: numbers or names; None for one image of a random class, or of a network without classes.
        - `guide`: a weaker or unconditional network; `guidance_scale` is the weight, 1 is off.
        - `seeds`: one per image, by default 0, 1, ...; the same seed makes the image that generate.py makes.
        - `interval`: noise levels (lo, hi] that are guided. `choice`: any other method, in place of the three.
        - `output_type`: "pil", or "pt" for a uint8 tensor.

        Raises ValueError for a class that does not exist, a guide that does not fit, and numbers that do not match.
        """
        net, encoder, header = self.snapshot.net, self.snapshot.encoder, self.snapshot.header
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        classes = None if class_labels is None else [self._class(label) for label in class_labels]
        count = 1 if classes is None else len(classes)
        if classes is None and seeds is not None:
            count = len(seeds)
        seeds = list(range(count)) if seeds is None else list(seeds)
        if len(seeds) != count:
            raise ValueError(f"{len(seeds)} seeds for {count} images; give one per class label")
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type is {output_type!r}; expected pil or pt")
        parts = Parts(net)
        if guide is not None:
            _check_guide(self.snapshot, guide.snapshot)
            parts = Parts(net, guide.snapshot.net)
        if choice is None:
            choice = Choice() if guide is None else Choice("autoguidance", guidance_scale, interval)
        shape = net.img_channels, net.img_resolution, net.img_resolution
        engine = Engine(
            guided_by(choice, parts), encoder.decode, Sampler(num_inference_steps), shape, net.label_dim, self.device,
            empty_classes=header.classes_without_images,
        )  # fmt: skip
        images = []
        for k, seed in enumerate(seeds):
            one = engine if classes is None else dataclasses.replace(engine, classes=[classes[k]])
            images.append(one.generate([seed]).images[0])
        if output_type == "pt":
            return PipelineOutput(torch.stack(images))
        found: list[Image.Image] = [to_image(image.cpu().numpy()) for image in images]
        return PipelineOutput(found)

    def _class(self, label: int | str) -> int:
        label_dim, names = self.snapshot.net.label_dim, self.snapshot.header.label_names
        if isinstance(label, str):
            return class_named(label, label_dim, names)
        if not 0 <= label < label_dim:
            raise ValueError(f"class {label} is out of range; the network has {label_dim} classes")
        return label


def _check_guide(main: Snapshot, other: Snapshot) -> None:
    specs = [{key: v for key, v in s.encoder.spec().items() if key != "vae_name"} for s in (main, other)]
    ours = main.net.img_channels, main.net.img_resolution, specs[0]
    theirs = other.net.img_channels, other.net.img_resolution, specs[1]
    if ours != theirs or other.net.label_dim not in (0, main.net.label_dim):
        raise ValueError("the guide does not fit the network: it has another resolution, encoder or number of classes")


def _weights_in(folder: Path) -> Path:
    index = folder / _INDEX
    if not index.is_file():
        raise ValueError(f"{folder} has no {_INDEX}; give a folder written by save_pretrained, or a snapshot")
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}); export the snapshot again") from error
    if kind != _NAME:
        raise ValueError(f"{folder} holds a {kind}, not an {_NAME}; for pipelines of diffusers see load_diffusers")
    return folder / "network" / _WEIGHTS


def _version() -> str:
    try:
        return importlib.metadata.version("edm2kit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
