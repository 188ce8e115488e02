"""Losses that users have: what an image must show, as callables from denoised images [N,C,H,W] to losses [N].

Any function of that shape is a loss; each image's loss depends on that image alone. Pixels run from -1 to 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.torch_utils.rng import StackedGenerator

Loss = Callable[[torch.Tensor], torch.Tensor]


class Operator(Protocol):
    """What is seen of an image, such as a part or a smaller version of it: [N,C,H,W] -> [N,...], linear.

    Optionally `row_energy(image_shape) -> float`: where white noise of variance r^2 in the image is white in what is
    seen too, of variance r^2 times this; the squared norm of each row of the operator as a matrix. Where it is not
    white, the largest variance it has in any direction.
    """

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Masked:
    """The pixels where `mask` [1 or C,H,W] is 1; the others are 0. For inpainting."""

    mask: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images * self.mask.to(images)

    def row_energy(self, image_shape: torch.Size) -> float:
        return 1.0


@dataclass(frozen=True)
class Downsampled:
    """Means over squares of `factor` x `factor` pixels. For super-resolution."""

    factor: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, self.factor)

    def row_energy(self, image_shape: torch.Size) -> float:
        return self.factor**-2


@dataclass(frozen=True)
class Blurred:
    """A Gaussian blur with a standard deviation of `std_pixels`; the border is continued. For deblurring."""

    std_pixels: float

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        radius = math.ceil(3 * self.std_pixels)
        offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.softmax(-(offsets**2) / (2 * self.std_pixels**2), dim=0)
        channels = images.shape[1]
        padded = torch.nn.functional.pad(images, [radius] * 4, mode="replicate")
        rows = torch.nn.functional.conv2d(padded, kernel.expand(channels, 1, 1, -1), groups=channels)
        return torch.nn.functional.conv2d(rows, kernel[:, None].expand(channels, 1, -1, 1), groups=channels)

    def row_energy(self, image_shape: torch.Size) -> float:
        return 1.0  # of even colour; a blur damps everything finer


@dataclass(frozen=True)
class MeanColour:
    """The mean of each channel, [N,C]."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def row_energy(self, image_shape: torch.Size) -> float:
        return 1 / (image_shape[-1] * image_shape[-2])


@dataclass(frozen=True)
class Measurement:
    """-log p(target | image), up to a constant, where target = operator(image) + noise of deviation `noise_std`.

    ||operator(image) - target||^2 / (2 noise_std^2); with noise_std = 1/sqrt(2) plainly the sum of squares. `target`
    is shaped as what `operator` sees of one image, or [N,...]. A deviation `r` (a number or [N]) of the image itself
    may be given along: the loss then is that of an image known up to white noise of this deviation, in closed form;
    for an operator that colours noise (a blur) it is an underestimate of the gradient, never more.
    Raises ValueError where the target has another shape than what is seen, for a noise that is not positive, and for
    `r` with an operator that has no closed form.
    """

    operator: Operator
    target: torch.Tensor
    noise_std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_std) and self.noise_std > 0):
            raise ValueError(f"the noise of a measurement is {self.noise_std}; expected a positive number")

    def __call__(self, images: torch.Tensor, r: torch.Tensor | float = 0.0) -> torch.Tensor:
        seen, target = self.operator(images), self.target.to(images)
        if target.shape not in (seen.shape, seen.shape[1:]):
            raise ValueError(f"the target is {list(target.shape)}; of an image {list(seen.shape[1:])} is seen")
        variance = self.noise_std**2
        if torch.is_tensor(r) or r:
            variance = variance + self._row_energy(images.shape) * r**2
        return ((seen - target) ** 2).flatten(1).sum(1) / (2 * variance)

    def _row_energy(self, image_shape: torch.Size) -> float:
        if not hasattr(self.operator, "row_energy"):
            raise ValueError(
                f"the average over images near the denoised one has no closed form for {type(self.operator).__name__}; "
                "draw it (edm2kit.guidance.losses.lgd.MonteCarlo)"
            )
        return self.operator.row_energy(image_shape)


@dataclass(frozen=True)
class ClassLogits:
    """-log p(target | image) by `classifier`, images -> logits [N,K]; `target` is a class or int64 [N]."""

    classifier: Callable[[torch.Tensor], torch.Tensor]
    target: int | torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        log_p = self.classifier(images).log_softmax(dim=1)
        target = torch.as_tensor(self.target, device=log_p.device).expand(len(log_p))
        return -log_p.gather(1, target[:, None])[:, 0]


@dataclass(frozen=True)
class OnPixels:
    """`loss` of what `decode` makes of latents: differentiable, pixels from -1 to 1."""

    loss: Loss
    decode: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return self.loss(self.decode(latents))

    def for_images(self, rng: StackedGenerator) -> "OnPixels":
        return OnPixels(for_images(self.loss, rng), self.decode)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "OnPixels":
        return OnPixels(for_step(self.loss, i, sigmas), self.decode)
