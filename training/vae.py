"""The Stable Diffusion VAE, through diffusers (an extra, imported only here)."""

from functools import lru_cache

import torch

# the revision whose weights made the published ImageNet-512 latents
PINNED_REVISIONS = {"stabilityai/sd-vae-ft-mse": "31f26fdeee1355a5c34592e401dd41e45d25a493"}
_BATCH = 8  # decoding 512x512 pixels of more images at once gains nothing and costs gigabytes


@lru_cache(maxsize=1)
def load_vae(name: str, device: torch.device) -> torch.nn.Module:
    """AutoencoderKL `name` (hub name or local folder), frozen, on `device`.

    Raises ValueError where diffusers is not installed or the weights are neither cached nor to be downloaded.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("the VAE needs diffusers: pip install 'diffusers>=0.27'") from error
    try:
        vae = AutoencoderKL.from_pretrained(name, revision=PINNED_REVISIONS.get(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the VAE {name!r} ({str(error).splitlines()[0]}). Without a network: download "
            "config.json and diffusion_pytorch_model.safetensors elsewhere, put them in a folder, and name that "
            "folder instead"
        ) from error
    return vae.eval().requires_grad_(False).to(device)


@torch.no_grad()
def vae_encode(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [N, 3, H, W] -> float32 posterior mean and std [N, 8, H/8, W/8]."""
    # EDM2 feeds the VAE pixels in [0, 1], not the usual [-1, 1]; published latents depend on it
    posteriors = [vae.encode(part.float() / 255).latent_dist for part in images.split(_BATCH)]
    return torch.cat([torch.cat([p.mean, p.std], dim=1) for p in posteriors])


@torch.no_grad()
def vae_decode(vae: torch.nn.Module, raw: torch.Tensor) -> torch.Tensor:
    """Raw latents float32 [N, 4, h, w] -> uint8 pixels [N, 3, 8h, 8w]."""
    parts = [vae.decode(part).sample.clamp(0, 1).mul(255).to(torch.uint8) for part in raw.split(_BATCH)]
    return torch.cat(parts) if parts else raw.new_empty(0, 3, raw.shape[2] * 8, raw.shape[3] * 8, dtype=torch.uint8)
