"""The Stable Diffusion VAE, through diffusers (an extra, imported only here)."""

from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError

from edm2kit.torch_utils.files import fetch, sha256_of

STABILITY_VAE = "stabilityai/sd-vae-ft-mse"
# the revision whose weights made the published ImageNet-512 latents
PINNED_REVISIONS = {STABILITY_VAE: "31f26fdeee1355a5c34592e401dd41e45d25a493"}
VAE_FILES = _CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_BATCH = 8  # 512x512 pixels of more images at once gain nothing and cost gigabytes


def vae_folder(name: str) -> Path:
    """Where the two files of the VAE `name` lie: a local folder itself, or a hub name's (org/repo) once downloaded.

    Raises ValueError where there is no such folder, or the files are neither cached nor to be had.
    """
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in VAE_FILES if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"the VAE folder {name} has no {missing[0]}; it takes {_CONFIG} and {_WEIGHTS}")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"no VAE folder at {name}; give a folder, or a name such as {STABILITY_VAE}")
    remote = f"hf://{name}@{PINNED_REVISIONS.get(name, 'main')}"
    try:
        config, weights = (fetch(f"{remote}/{file}") for file in VAE_FILES)
    except ValueError as error:
        raise ValueError(
            f"cannot get the VAE {name}: {error}. Or put its {_CONFIG} and {_WEIGHTS} in a folder, and name that "
            "folder with --vae"
        ) from error
    if config.parent != weights.parent:
        raise ValueError(f"{config} and {weights} belong into one folder; put them there, and name it with --vae")
    return weights.parent


def vae_sha256(name: str) -> str:
    """Hash of the weights of the VAE `name`: two names, a hub's and a folder's, may mean the same VAE."""
    return sha256_of(vae_folder(name) / _WEIGHTS)


@lru_cache(maxsize=1)
def load_vae(name: str, device: torch.device) -> torch.nn.Module:
    """AutoencoderKL `name` (hub name or local folder), frozen, float32, on `device`.

    Raises ValueError where diffusers is not installed, or the files are not there or not those of such a VAE.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("the VAE needs diffusers: pip install 'diffusers>=0.27'") from error
    folder = vae_folder(name)
    try:
        # safetensors only: the older .bin files are pickles, which could run anything
        vae = AutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} does not hold a VAE that diffusers can load: {reason}") from error
    vae.enable_gradient_checkpointing()  # where guidance differentiates it; without gradients it changes nothing
    return vae.float().eval().requires_grad_(False).to(device)


@torch.no_grad()
def vae_encode(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [N, 3, H, W], N at least 1 -> float32 raw latents [N, 8, H/8, W/8]: posterior mean, then std."""
    # EDM2 feeds the VAE pixels in [0, 1], not the usual [-1, 1]; published latents depend on it
    posteriors = [vae.encode(part.float() / 255).latent_dist for part in images.split(_BATCH)]
    return torch.cat([torch.cat([p.mean, p.std], dim=1) for p in posteriors])


def vae_pixels(vae: torch.nn.Module, means: torch.Tensor) -> torch.Tensor:
    """As `vae_decode`, but float32 pixels from -1 to 1, not clipped, and differentiable."""
    return torch.cat([vae.decode(part).sample for part in means.split(_BATCH)]) * 2 - 1


@torch.no_grad()
def vae_decode(vae: torch.nn.Module, means: torch.Tensor) -> torch.Tensor:
    """Latents of the VAE's own scale float32 [N, 4, h, w], N at least 1 -> uint8 pixels [N, 3, 8h, 8w]."""
    return torch.cat([vae.decode(part).sample.clamp(0, 1).mul(255).to(torch.uint8) for part in means.split(_BATCH)])
