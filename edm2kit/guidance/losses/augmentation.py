"""Random augmentation: the loss averaged over random versions of the denoised image, against adversarial solutions."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from edm2kit.denoiser import Wrapper
from edm2kit.guidance.losses.gradient import column
from edm2kit.guidance.losses.loss import Loss
from edm2kit.guidance.step_generators import StepGenerators
from edm2kit.torch_utils.rng import StackedGenerator

Transform = Callable[[torch.Tensor, StackedGenerator], torch.Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Random colour, position, size and a square cut out of each image [N, C, H, W] in [-1, 1]; differentiable.

    - `translation`: largest shift, as a share of the side.
    - `resize`: range of the scale.
    - `cutout`: side of the square, as a share of the image's side; 0 for none.

    Pixels from outside the image are 0. The defaults are those of the code of Shen et al. 2024 (arXiv 2403.12404).
    """

    colour: bool = True
    translation: float = 0.125
    resize: tuple[float, float] = (0.8, 1.2)
    cutout: float = 0.5

    def __call__(self, images: torch.Tensor, rng: StackedGenerator) -> torch.Tensor:
        u = rng.rand([len(images), 8]).to(images)
        if self.colour:
            images = jitter_colour(images, u[:, :3])
        images = self.move_and_resize(images, u[:, 3:6])
        if self.cutout:
            images = images * self.cutout_mask(images, u[:, 6:])
        return images

    def move_and_resize(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """`images` scaled and shifted by random numbers u [N, 3] in [0, 1]."""
        low, high = self.resize
        scale = low + (high - low) * u[:, 0]
        offset = 2 * self.translation * (2 * u[:, 1:] - 1)  # sides are 2 long in grid coordinates
        straight = torch.eye(2, dtype=images.dtype, device=images.device) / scale[:, None, None]
        grid = torch.nn.functional.affine_grid(
            torch.cat([straight, offset[:, :, None]], dim=2), list(images.shape), align_corners=False
        )
        return torch.nn.functional.grid_sample(images, grid, align_corners=False)

    def cutout_mask(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """False inside a square around the centre u [N, 2] in [0, 1], true elsewhere: [N, 1, H, W]."""
        inside = []
        for side, centre in zip(images.shape[2:], u.T, strict=True):
            pixels = torch.arange(side, device=images.device) / side
            position = (pixels - (centre - self.cutout / 2)[:, None]).div(self.cutout)
            inside.append((position >= 0) & (position < 1))
        return ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def jitter_colour(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Brightness, saturation and contrast as in differentiable augmentation (Zhao et al. 2020); u [N, 3] in [0, 1]."""
    images = images + column(u[:, 0] - 0.5, images)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * column(2 * u[:, 1], images)
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return level + (images - level) * column(u[:, 2] + 0.5, images)


@dataclass(frozen=True)
class AugmentedLoss(Wrapper):
    """The mean of `loss` over `count` random versions of each image, made by `transform(images, rng)`.

    Shen et al. 2024 (arXiv 2403.12404), random augmentation: the gradient is the mean of `count` gradients, at the
    cost of one evaluation of the denoiser. Each image has its own random numbers, the same throughout a step. Raises
    ValueError for a count below 1.
    """

    loss: Loss
    count: int = 20
    transform: Transform = field(default_factory=Augmentation)
    random: StepGenerators = field(default_factory=StepGenerators)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a mean over {self.count} random versions of an image; expected at least 1")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        generators = self.random.generators()
        return torch.stack([self.loss(self.transform(images, generators)) for _ in range(self.count)]).mean(dim=0)
