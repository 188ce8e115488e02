"""Augmentation of training images: mirror images, and EDM's non-leaky geometric transformations.

Non-leaky means that the network is told what was done to an image, by nine numbers, and is asked for the untouched case
(nine zeros) when it generates. Karras et al. 2022 (arXiv 2206.00364), Appendix F.2, Table 6.
"""

import math
from collections.abc import Sequence

import torch

from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

NUM_LABELS = 9
_SCALE, _ANISOTROPY, _SHIFT = 2**0.2, 2**0.2, 1 / 8  # A_scale, A_aniso, A_trans; the shift is a fraction of the image


def flip_half(images: torch.Tensor, positions: Sequence[int], seed: int) -> torch.Tensor:
    """Mirror every image [N, C, H, W] left to right with probability 1/2, decided by `seed` and its position."""
    rng = StackedGenerator("cpu", [derive_seed(seed, "flip", position) for position in positions])
    return _mirrored(images, rng.rand([len(positions)]) < 0.5, axis=3)


def augment(
    images: torch.Tensor, positions: Sequence[int], seed: int, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """EDM's augmentation pipeline: images [N, C, H, W] -> images of the same shape, and their labels, float32 [N, 9].

    Half of the images are mirrored. Each of the other transformations (upside down, scaling, rotation, anisotropic
    scaling, translation) is applied with `probability`, independently; the paper uses 0.12 for CIFAR-10 and 0.15 for
    faces. What happens to an image depends on `seed` and on its position in the global order. Images that are neither
    scaled, rotated nor shifted keep their exact pixels; the others are resampled (bicubic, reflected at the edges),
    unlike in the paper, which filters at a higher resolution.
    """
    rng = StackedGenerator("cpu", [derive_seed(seed, "augmentation", position) for position in positions])
    n = len(positions)
    chosen = (rng.rand([n, 5]) < probability).float()
    coins = (rng.rand([n, 2]) < 0.5).float()
    angles = (rng.rand([n, 2]) * 2 - 1) * math.pi
    normal = rng.randn([n, 4])
    # a_0 ... a_7 as in Table 6
    a0, a1 = coins[:, 0], coins[:, 1] * chosen[:, 0]
    a2 = normal[:, 0] * chosen[:, 1]
    a3 = angles[:, 0] * chosen[:, 2]
    a4, a5 = angles[:, 1], normal[:, 1] * chosen[:, 3]
    a6, a7 = normal[:, 2] * chosen[:, 4], normal[:, 3] * chosen[:, 4]
    labels = [a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7]

    images = _mirrored(images, a0 > 0, axis=3)
    images = _mirrored(images, a1 > 0, axis=2)
    zero = torch.zeros(n)
    stretch = _matrix(_ANISOTROPY**a5, zero, zero, _ANISOTROPY**-a5)
    linear = _rotation(a4) @ stretch @ _rotation(-a4) @ _rotation(-a3) @ _matrix(_SCALE**a2, zero, zero, _SCALE**a2)
    # normalised coordinates go from -1 to 1, so the image is 2 wide
    shift = torch.stack([a6, a7], dim=1)[:, :, None] * _SHIFT * 2
    is_moved = torch.stack([a2, a3, a5, a6, a7]).ne(0).any(dim=0)
    if is_moved.any():
        rows = is_moved.nonzero().flatten()
        # a pixel of the result is read from where the inverse transformation leads
        inverse = torch.linalg.inv(linear[rows])
        theta = torch.cat([inverse, -inverse @ shift[rows]], dim=2).to(images)
        rows = rows.to(images.device)
        size = [len(rows), *images.shape[1:]]
        grid = torch.nn.functional.affine_grid(theta, size, align_corners=False)
        moved = torch.nn.functional.grid_sample(
            images[rows], grid, mode="bicubic", padding_mode="reflection", align_corners=False
        )
        images = images.index_copy(0, rows, moved)
    return images, torch.stack(labels, dim=1).to(images.device)


def _mirrored(images: torch.Tensor, which: torch.Tensor, axis: int) -> torch.Tensor:
    """The images [N, C, H, W], those in `which` [N] reversed along `axis`."""
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(axis), images)


def _matrix(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Matrices [[a, b], [c, d]], [N, 2, 2]."""
    return torch.stack([torch.stack([a, b], dim=1), torch.stack([c, d], dim=1)], dim=1)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """Rotations by `angle` [N], [N, 2, 2]."""
    return _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
