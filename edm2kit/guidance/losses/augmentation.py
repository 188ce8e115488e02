"""The loss of many random versions of the denoised image, so that no single version can be an adversarial one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.losses.loss_gradient import column
from edm2kit.guidance.losses.targets import Loss
from edm2kit.guidance.random_draws import Draws
from edm2kit.torch_utils.rng import StackedGenerator

Transform = Callable[[torch.Tensor, StackedGenerator], torch.Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Random colour, position, size and a square cut out of each image [N,C,H,W], pixels from -1 to 1; differentiable.

    `translation`: at most this share of the side; `resize`: range of the scale; `cutout`: the square's share of the
    side, 0 for none. What comes in from outside is 0. The defaults are those of the code of Shen et al. 2024
    (arXiv 2403.12404).
    """

    colour: bool = True
    translation: float = 0.125
    resize: tuple[float, float] = (0.8, 1.2)
    cutout: float = 0.5

    def __call__(self, images: torch.Tensor, rng: StackedGenerator) -> torch.Tensor:
        u = rng.rand([len(images), 8]).to(images)
        if self.colour:
            images = _recoloured(images, u[:, :3])
        images = self._moved(images, u[:, 3:6])
        return images * self._kept(images, u[:, 6:]) if self.cutout else images

    def _moved(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        low, high = self.resize
        scale = low + (high - low) * u[:, 0]
        offset = 2 * self.translation * (2 * u[:, 1:] - 1)  # sides are 2 long in grid coordinates
        straight = torch.eye(2).to(images) / scale[:, None, None]
        grid = torch.nn.functional.affine_grid(
            torch.cat([straight, offset[:, :, None]], dim=2), list(images.shape), align_corners=False
        )
        return torch.nn.functional.grid_sample(images, grid, align_corners=False)

    def _kept(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        cut = [
            (torch.arange(side, device=images.device) / side - (centre - self.cutout / 2)[:, None]).div(self.cutout)
            for side, centre in zip(images.shape[2:], u.T, strict=True)
        ]
        inside = [(where >= 0) & (where < 1) for where in cut]
        return ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def _recoloured(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Brightness, saturation and contrast as in differentiable augmentation (Zhao et al. 2020)."""
    images = images + column(u[:, 0] - 0.5, images)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * column(2 * u[:, 1], images)
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return level + (images - level) * column(u[:, 2] + 0.5, images)


@dataclass(frozen=True)
class Augmented:
    """The mean of `loss` over `count` random versions of each image, made by `transform(images, rng)`.

    Shen et al. 2024 (arXiv 2403.12404), random augmentation: the gradient is the mean of `count` gradients, at the
    cost of one denoiser call. The draws are each image's own, and stay the same through a step. Raises ValueError for
    a count below 1.
    """

    loss: Loss
    count: int = 20
    transform: Transform = field(default_factory=Augmentation)
    draws: Draws = field(default_factory=Draws)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a mean over {self.count} random versions of an image; expected at least 1")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        source = self.draws.source()
        return torch.stack([self.loss(self.transform(images, source)) for _ in range(self.count)]).mean(dim=0)

    def for_images(self, rng: StackedGenerator) -> "Augmented":
        return replace(self, loss=for_images(self.loss, rng), draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Augmented":
        return replace(self, loss=for_step(self.loss, i, sigmas), draws=self.draws.for_step(i, sigmas))
