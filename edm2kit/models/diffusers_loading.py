"""Loading a pipeline of diffusers as parts for this project: the denoiser, the decoder, and what its scheduler does."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edm2kit.models.adapters import Rescaled
from edm2kit.models.diffusers_network import DiffusersNetwork
from edm2kit.models.diffusers_pipeline import (
    Limit,
    Repository,
    diffusers_package,
    limit_of,
    load_component,
    open_repository,
    own_levels,
    schedule_of,
)
from edm2kit.models.encoders import Encoder, RGBEncoder
from edm2kit.torch_utils.rng import RandomSource

OFFLOADS = ("blocks", "layers")
_LARGE = 512  # pixels from which on the VAE decodes one image at a time
_STATISTICS = ("latents_mean", "latents_std")


class LatentDecoder:
    """The VAE of a pipeline: latents of the network -> pixels.

    `vae` is an AutoencoderKL or alike, in float32; a latent of the network is (z - shift_factor) * scaling_factor for a
    latent z of the VAE. `tiled` decodes large images in overlapping tiles, which takes less memory and blends seams.
    """

    def __init__(self, vae: Any, tiled: bool = False):
        self.vae = vae.float().eval().requires_grad_(False)
        if tiled:
            vae.enable_tiling()
        config = vae.config
        self.scaling_factor = float(config.get("scaling_factor") or 1.0)
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        self.tiled = tiled
        self.statistics = [config.get(name) for name in _STATISTICS]
        self.enlarges = 2 ** (len(config.block_out_channels) - 1)

    def encode(self, raw: torch.Tensor, rng: RandomSource | None = None) -> torch.Tensor:
        """Not available: these pipelines generate only. Raises ValueError."""
        raise ValueError("the VAE of a diffusers pipeline only decodes here; encode with the pipeline's own VAE")

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 pixels [N, 3, H, W] of latents, about -1 to 1, neither clipped nor rounded, differentiable."""
        z = latents.float() / self.scaling_factor + self.shift_factor
        if None not in self.statistics:
            mean, std = (torch.tensor(values, device=z.device).reshape(1, -1, 1, 1) for values in self.statistics)
            z = (latents.float() * std) / self.scaling_factor + mean
        large = z.shape[2] * self.enlarges >= _LARGE
        return torch.cat([self.vae.decode(part, return_dict=False)[0] for part in z.split(1 if large else 8)])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, 3, H, W] of latents, rounded as diffusers rounds."""
        return (self.pixels(latents) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

    def spec(self) -> dict[str, Any]:
        """What decides the space of latents: the encoder's weights, scale and shift; and whether tiles are used."""
        spec: dict[str, Any] = {
            "kind": "diffusers",
            "autoencoder": _weights_hash(self.vae),
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }
        if None not in self.statistics:
            spec |= {name: list(values) for name, values in zip(_STATISTICS, self.statistics, strict=True)}
        return spec


def _weights_hash(vae: Any) -> str:
    """A hash of the weights that make latents, in half precision, so that files of both precisions agree."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Loaded:
    """A pipeline of diffusers in parts: `limit` is what its scheduler does to D before each step, None for nothing.

    `scheduler` is that of the pipeline, for `levels`.
    """

    repository: Repository
    net: DiffusersNetwork
    encoder: Encoder
    scheduler: Any
    limit: Limit | None

    def levels(self, num_steps: int) -> tuple[float, ...]:
        """The noise levels of the pipeline's own scheduler; see `own_levels`."""
        return own_levels(self.scheduler, self.net, num_steps)


def load_diffusers(
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    pixels: int | None = None,
    offload: str | None = None,
    tiled: bool = False,
    main: Loaded | None = None,
    prompts_name: str = "net",
) -> Loaded:
    """A pipeline in a folder or on the hub, `diffusers:PATH` or `diffusers:org/name`, ready to generate.

    `pixels` is the height of images, None for that of training. `offload` moves parts of the network to the device
    when they are needed ("blocks" or "layers", diffusers' group offloading). With `main`, a folder that holds a single
    model of the same class as the main network's is used with the scheduler and the VAE of `main`.

    Raises ValueError, in one line, if the folder or repository does not exist, is incomplete, or is not known here.

    Example: `load_diffusers("diffusers:facebook/DiT-XL-2-256", "cuda", torch.float16).net`.
    """
    repository = open_repository(source, dtype)
    if not repository.is_pipeline:
        return _model_alone(repository, device, dtype, main, offload)
    for component in ("scheduler", repository.model_name):
        if not repository.has(component):
            raise ValueError(f"{repository.name}: the pipeline has no {component}")
    scheduler = load_component(repository, "scheduler", dtype)
    schedule, prediction = schedule_of(scheduler)
    model = load_component(repository, repository.model_name, dtype)
    encoder: Encoder = RGBEncoder()
    pixels_per_latent = 1
    if repository.has("vae"):
        encoder = LatentDecoder(load_component(repository, "vae", torch.float32).to(device), tiled)
        pixels_per_latent = encoder.enlarges
    size = None
    if pixels is not None:
        size, rest = divmod(pixels, pixels_per_latent)
        if rest or size < 1 or (hasattr(model.config, "patch_size") and size % 2):
            raise ValueError(f"images of {pixels} pixels: expected a multiple of {2 * pixels_per_latent}")
    net = DiffusersNetwork(
        model, schedule, prediction, size=size, prompts_name=prompts_name, pixels_per_latent=pixels_per_latent
    )
    _to_device(model, device, offload)
    return Loaded(repository, net, encoder, scheduler, limit_of(scheduler))


def _model_alone(
    repository: Repository, device: torch.device | str, dtype: torch.dtype, main: Loaded | None, offload: str | None
) -> Loaded:
    model = load_component(repository, "", dtype)
    if main is None:
        raise ValueError(
            f"{repository.name} holds a {type(model).__name__} alone: what it predicts and its noise schedule are not "
            "known. Give the folder of a pipeline (with model_index.json)"
        )
    theirs, ours = type(model).__name__, type(main.net.model).__name__
    if theirs != ours:
        raise ValueError(
            f"{repository.name} holds a {theirs} alone and the main network is a {ours}; give the folder of its own "
            "pipeline (with model_index.json), which says what it predicts"
        )
    net = DiffusersNetwork(
        model,
        main.net.schedule,
        main.net.prediction,
        size=main.net.img_resolution,
        pixels_per_latent=main.net.pixels_per_latent,
    )
    _to_device(model, device, offload)
    return Loaded(repository, net, main.encoder, main.scheduler, main.limit)


def _to_device(model: Any, device: torch.device | str, offload: str | None) -> None:
    if offload is None:
        model.to(device)
        return
    if offload not in OFFLOADS:
        raise ValueError(f"offload {offload!r} is unknown; available: {', '.join(OFFLOADS)}")
    if not hasattr(model, "enable_group_offload"):
        raise ValueError("this version of diffusers cannot offload parts of a model; update it")
    options: dict[str, Any] = {"offload_type": "leaf_level"}
    if offload == "blocks":
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    model.enable_group_offload(torch.device(device), torch.device("cpu"), **options)


def with_lora(main: Loaded, lora: str, scale: float = 1.0) -> Loaded:
    """The network of `main` with a LoRA on top, sharing its weights: it is switched on in this network's calls only.

    `lora` is a safetensors file, or a folder with pytorch_lora_weights.safetensors. Raises ValueError if peft is not
    installed, the file is missing, or it holds nothing for this network.

    Example, a LoRA that was trained to degrade the network, as its guide: `with_lora(main, "bad-lora/").net`.
    """
    try:
        import peft  # noqa: F401 - diffusers loads LoRAs through it
    except ImportError as error:
        raise ValueError("a LoRA needs peft: pip install 'edm2kit[diffusers]'") from error
    path = Path(lora)
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"{lora}: no LoRA there; give a .safetensors file, or a folder with {file.name}")
    model, component = main.net.model, main.repository.model_name or "unet"
    if not hasattr(model, "load_lora_adapter"):
        raise ValueError(f"a {type(model).__name__} takes no LoRA in this version of diffusers")
    kind: Any = getattr(diffusers_package(), str(main.repository.index.get("_class_name")), None)
    from safetensors.torch import load_file

    try:
        weights: Any = load_file(file)
        if hasattr(kind, "lora_state_dict"):  # also reads the formats of other programs
            found = kind.lora_state_dict(weights)
            weights = found[0] if isinstance(found, tuple) else found
        if not any(key.startswith(f"{component}.") for key in weights):
            raise ValueError(f"it has no weights for the {component}")
        model.load_lora_adapter(weights, prefix=component, adapter_name="guide")
        model.set_adapters("guide", scale)
        model.disable_lora()
    except Exception as error:  # safetensors, diffusers and peft raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a LoRA for this {type(model).__name__}: {reason}") from error
    model.requires_grad_(False)
    net = DiffusersNetwork(
        model,
        main.net.schedule,
        main.net.prediction,
        size=main.net.img_resolution,
        prompts_name=main.net.prompts_name,
        pixels_per_latent=main.net.pixels_per_latent,
        lora="guide",
        lora_scale=scale,
    )
    return Loaded(main.repository, net, main.encoder, main.scheduler, main.limit)


def in_space_of(net: Any, own: dict[str, Any], wanted: dict[str, Any]) -> Any:
    """`net`, whose latents have the specification `own`, as a denoiser for latents of the specification `wanted`.

    Latents of the same VAE that differ in scale and shift are converted, exactly. Raises ValueError for all others.
    """
    if own == wanted:
        return net
    scale_only = {"scaling_factor", "shift_factor"}
    rest = [{key: value for key, value in spec.items() if key not in scale_only} for spec in (own, wanted)]
    if rest[0] != rest[1] or own.get("kind") != "diffusers" or any(name in own for name in _STATISTICS):
        raise ValueError(
            f"the guide network works on {_space_text(own)}, the main network on {_space_text(wanted)}; only networks "
            "on pixels, or on latents of one VAE that differ in scale and shift, can guide each other"
        )
    # a latent x of the main network is z = x / s + f for the VAE, and (z - f') s' for the guide
    scale = own["scaling_factor"] / wanted["scaling_factor"]
    return Rescaled(net, scale, (wanted["shift_factor"] - own["shift_factor"]) * own["scaling_factor"])


def _space_text(spec: dict[str, Any]) -> str:
    if spec["kind"] == "rgb":
        return "pixels"
    if spec["kind"] == "diffusers":
        return f"latents of the VAE {spec['autoencoder'][:8]} times {spec['scaling_factor']:g}"
    return "latents that are normalised per channel"
