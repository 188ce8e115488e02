"""The Stable Diffusion VAE, loaded with diffusers (an optional package)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.files import sha256_of

STABILITY_VAE = "stabilityai/sd-vae-ft-mse"
# the revision that encoded the published ImageNet-512 latents
PINNED_REVISIONS = {STABILITY_VAE: "31f26fdeee1355a5c34592e401dd41e45d25a493"}
VAE_FILES = _CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_BATCH = 8  # larger batches of 512x512 pixels are not faster, but need gigabytes more memory


def vae_folder(name: str) -> Path:
    """The folder with the two files of the VAE `name`: a local folder, or a hub name (org/repo), which is downloaded.

    Raises ValueError if there is no such folder or the download fails.
    """
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in VAE_FILES if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"the VAE folder {name} has no {missing[0]}; it must hold {_CONFIG} and {_WEIGHTS}")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"there is no VAE folder {name}; give a folder, or a hub name such as {STABILITY_VAE}")
    remote = f"hf://{name}@{PINNED_REVISIONS.get(name, 'main')}"
    try:
        config, weights = (fetch(f"{remote}/{file}") for file in VAE_FILES)
    except ValueError as error:
        raise ValueError(
            f"cannot download the VAE {name}: {error}. You can also put its {_CONFIG} and {_WEIGHTS} in a folder "
            "and pass that as --vae"
        ) from error
    if config.parent != weights.parent:
        raise ValueError(f"{config} and {weights} must be in the same folder; move them there and pass it as --vae")
    return weights.parent


def vae_sha256(name: str) -> str:
    """Hash of the weights of the VAE `name`, since a hub name and a folder may hold the same VAE."""
    return sha256_of(vae_folder(name) / _WEIGHTS)


@lru_cache(maxsize=1)
def load_vae(name: str, device: torch.device) -> Any:
    """The AutoencoderKL called `name` (hub name or local folder), without gradients, float32, on `device`.

    Raises ValueError if diffusers is not installed, or the files are missing or not those of such a VAE.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("the VAE needs diffusers: pip install 'diffusers>=0.27'") from error
    folder = vae_folder(name)
    try:
        # safetensors only: the older .bin files are pickles, which can run any code
        vae = AutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} does not hold a VAE that diffusers can load: {reason}") from error
    vae.enable_gradient_checkpointing()  # for guidance that differentiates it; no effect without gradients
    return vae.float().eval().requires_grad_(False).to(device)


@torch.no_grad()
def vae_encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [N, 3, H, W], N >= 1 -> float32 raw latents [N, 8, H/8, W/8]: posterior mean, then std."""
    # EDM2 gives the VAE pixels in [0, 1], not the usual [-1, 1], and the published latents depend on it
    posteriors = [vae.encode(part.float() / 255).latent_dist for part in images.split(_BATCH)]
    return torch.cat([torch.cat([p.mean, p.std], dim=1) for p in posteriors])


def vae_pixels(vae: Any, means: torch.Tensor) -> torch.Tensor:
    """Like `vae_decode`, but float32 pixels from -1 to 1, not clipped, and differentiable."""
    return torch.cat([vae.decode(part).sample for part in means.split(_BATCH)]) * 2 - 1


@torch.no_grad()
def vae_decode(vae: Any, means: torch.Tensor) -> torch.Tensor:
    """Unnormalised latents float32 [N, 4, h, w], N >= 1 -> uint8 pixels [N, 3, 8h, 8w]."""
    return torch.cat([vae.decode(part).sample.clamp(0, 1).mul(255).to(torch.uint8) for part in means.split(_BATCH)])
