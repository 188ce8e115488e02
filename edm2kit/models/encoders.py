"""Encoders: from the items of a dataset to what a network sees (pixels or latents), and from there to pixels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from edm2kit.models.vae import STABILITY_VAE, load_vae, vae_decode, vae_pixels
from edm2kit.torch_utils.files import check_type
from edm2kit.torch_utils.rng import RandomSource

_MAX_CHANNELS = 1024


class Encoder(Protocol):
    """Raw dataset items <-> network latents (float32, std about 0.5) -> uint8 pixels."""

    def encode(self, raw: torch.Tensor, rng: RandomSource | None = None) -> torch.Tensor:
        """Latents [N, C, H, W] of raw items; `rng` is for encoders that sample (None: torch's global generator)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, 3 or 1, H', W'] of latents."""
        ...

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """The same as float32 from -1 to 1, neither clipped nor rounded, and differentiable."""
        ...

    def spec(self) -> dict[str, Any]:
        """The arguments with which `make_encoder` builds the same encoder."""
        ...


class RGBEncoder:
    """For networks that see pixels: uint8 0..255 <-> float32 -1..1."""

    def encode(self, raw: torch.Tensor, rng: RandomSource | None = None) -> torch.Tensor:
        """uint8 [N, C, H, W] -> float32, x / 127.5 - 1. Raises ValueError for anything but uint8."""
        if raw.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8; got {raw.dtype}. For the latents of a VAE, use the encoder 'vae'")
        return raw.float() / 127.5 - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 [N, C, H, W] -> uint8, truncating as EDM2 does."""
        return (latents.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents themselves."""
        return latents.float()

    def spec(self) -> dict[str, Any]:
        return {"kind": "rgb"}

    def __repr__(self) -> str:
        return "RGBEncoder: pixels 0..255 <-> -1..1"


class StabilityVAEEncoder:
    """Latents of the Stable Diffusion VAE, normalised to mean 0 and std 0.5 per channel (EDM2, Section A.1).

    Raw items are [N, 8, H/8, W/8] float32: posterior mean, then posterior std. The VAE itself (diffusers'
    AutoencoderKL) is only loaded to decode. `vae_name` is a name on the Hugging Face hub or a local folder.
    """

    def __init__(
        self,
        vae_name: str = STABILITY_VAE,
        raw_mean: Sequence[float] = (5.81, 3.25, 0.12, -2.15),
        raw_std: Sequence[float] = (4.17, 4.62, 3.71, 3.28),
        final_mean: float = 0.0,
        final_std: float = 0.5,
    ):
        check_type(vae_name, str, "vae_name")
        lengths = [np.shape(raw_mean), np.shape(raw_std)]
        if lengths[0] != lengths[1] or len(lengths[0]) != 1 or not 0 < lengths[0][0] <= _MAX_CHANNELS:
            raise ValueError(
                f"raw_mean and raw_std need one number per channel, at most {_MAX_CHANNELS}; got {lengths}"
            )
        if np.shape(final_mean) or np.shape(final_std):
            raise ValueError("final_mean and final_std are single numbers")
        self.vae_name, self.raw_mean, self.raw_std = vae_name, tuple(raw_mean), tuple(raw_std)
        self.final_mean, self.final_std = final_mean, final_std
        scale = np.float32(final_std) / np.asarray(raw_std, dtype=np.float32)
        bias = np.float32(final_mean) - np.asarray(raw_mean, dtype=np.float32) * scale
        self.scale = torch.from_numpy(scale).reshape(1, -1, 1, 1)
        self.bias = torch.from_numpy(bias).reshape(1, -1, 1, 1)
        self._on_device = {torch.device("cpu"): (self.scale, self.bias)}

    def encode(self, raw: torch.Tensor, rng: RandomSource | None = None) -> torch.Tensor:
        """Sample from the stored posterior and normalise: [N, 8, h, w] -> float32 [N, 4, h, w]."""
        if not raw.is_floating_point() or raw.ndim != 4 or raw.shape[1] != 2 * self.scale.shape[1]:
            raise ValueError(
                f"raw latents must be floats [N, {2 * self.scale.shape[1]}, h, w] (posterior mean and std); got "
                f"{raw.dtype} {list(raw.shape)}. Make them with: scripts/dataset_tool.py encode"
            )
        mean, std = raw.float().chunk(2, dim=1)
        noise = torch.randn_like(mean) if rng is None else rng.randn_like(mean)
        scale, bias = self._constants(raw.device)
        return (mean + std * noise) * scale + bias

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels uint8 [N, 3, 8h, 8w] of normalised latents [N, 4, h, w]."""
        return vae_decode(load_vae(self.vae_name, latents.device), self._raw(latents))

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 pixels [N, 3, 8h, 8w] of normalised latents, about -1 to 1, differentiable."""
        return vae_pixels(load_vae(self.vae_name, latents.device), self._raw(latents))

    def _raw(self, latents: torch.Tensor) -> torch.Tensor:
        scale, bias = self._constants(latents.device)
        return (latents.float() - bias) / scale

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias on `device`, copied there once: each copy makes the host wait."""
        if device not in self._on_device:
            self._on_device[device] = self.scale.to(device), self.bias.to(device)
        return self._on_device[device]

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "vae",
            "vae_name": self.vae_name,
            "raw_mean": list(self.raw_mean),
            "raw_std": list(self.raw_std),
            "final_mean": self.final_mean,
            "final_std": self.final_std,
        }

    def __repr__(self) -> str:
        return f"StabilityVAEEncoder: latents of {len(self.raw_mean)} channels <-> pixels, by {self.vae_name}"


ENCODERS: dict[str, Callable[..., Encoder]] = {"rgb": RGBEncoder, "vae": StabilityVAEEncoder}


def make_encoder(spec: Mapping[str, Any]) -> Encoder:
    """The encoder that `spec` (as from `Encoder.spec`) describes.

    Raises ValueError for an unknown kind or argument. Example: `make_encoder({"kind": "rgb"})`.
    """
    check_type(spec, Mapping[str, Any], "the encoder")
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise ValueError(f"unknown encoder {kind!r}; available: {', '.join(ENCODERS)}")
    try:
        return ENCODERS[kind](**arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"encoder {kind!r}: {error}") from error


def to_image(pixels: np.ndarray) -> Image.Image:
    """Convert uint8 [C, H, W] to a grey (C = 1) or RGB (C = 3) image; raises ValueError for any other C."""
    if len(pixels) == 1:
        return Image.fromarray(pixels[0])
    if len(pixels) == 3:
        return Image.fromarray(pixels.transpose(1, 2, 0))
    raise ValueError(f"cannot make an image of {len(pixels)} channels; expected 1 (grey) or 3 (RGB)")
