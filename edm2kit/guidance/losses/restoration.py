"""Restoration losses: inpainting, super-resolution, deblurring and a mean colour, as measurements of an image.

A measurement is a linear operator, what it should give, and a noise level. Pixels are in [-1, 1].
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch


class LinearOperator(Protocol):
    """What is measured of an image, such as a part or a smaller version of it: [N, C, H, W] -> [N, ...], linear.

    Optionally `row_energy(image_shape) -> float`: the factor by which the operator changes the variance of white noise
    in the image, that is, the squared norm of each row of its matrix. If the noise does not stay white, the largest
    variance in any direction.
    """

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class InpaintingOperator:
    """The pixels where `mask` [1 or C, H, W] is 1; the others are 0."""

    mask: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images * self.mask.to(images)

    def row_energy(self, image_shape: torch.Size) -> float:
        return 1.0


@dataclass(frozen=True)
class DownsamplingOperator:
    """Means over squares of `factor` x `factor` pixels. For super-resolution."""

    factor: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, self.factor)

    def row_energy(self, image_shape: torch.Size) -> float:
        return self.factor**-2


@dataclass(frozen=True)
class GaussianBlurOperator:
    """A Gaussian blur with a standard deviation of `std_pixels`; borders are repeated. For deblurring."""

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
        return 1.0  # for an even colour; a blur damps everything finer


@dataclass(frozen=True)
class MeanColourOperator:
    """The mean of each channel, [N, C]."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def row_energy(self, image_shape: torch.Size) -> float:
        return 1 / (image_shape[-1] * image_shape[-2])


@dataclass(frozen=True)
class Measurement:
    """-log p(target | image), up to a constant, for target = operator(image) + noise of deviation `noise_std`.

    ||operator(image) - target||^2 / (2 noise_std^2); with noise_std = 1/sqrt(2) simply the sum of squares. `target` has
    the shape of the operator's result for one image, or [N, ...]. With `r`, a number or [N], the loss is that of an
    image known up to white noise of this standard deviation, in closed form; for an operator that colours noise (a
    blur) it underestimates the gradient, never the opposite.
    Raises ValueError if the target has another shape than the operator's result, if the noise is not positive, and for
    `r` with an operator that has no closed form.

    Example: `Measurement(InpaintingOperator(mask), picture * mask, noise_std=0.05)`.
    """

    operator: LinearOperator
    target: torch.Tensor
    noise_std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_std) and self.noise_std > 0):
            raise ValueError(f"the noise of a measurement is {self.noise_std}; expected a positive number")

    def __call__(self, images: torch.Tensor, r: torch.Tensor | float = 0.0) -> torch.Tensor:
        measured, target = self.operator(images), self.target.to(images, non_blocking=True)
        if target.shape not in (measured.shape, measured.shape[1:]):
            raise ValueError(
                f"the target has shape {list(target.shape)}; the measurement of an image has {list(measured.shape[1:])}"
            )
        squares = ((measured - target) ** 2).flatten(1).sum(1)
        if not torch.is_tensor(r) and r == 0:
            return squares / (2 * self.noise_std**2)
        row_energy = getattr(self.operator, "row_energy", None)
        if row_energy is None:
            raise ValueError(
                f"the average over images near D has no closed form for {type(self.operator).__name__}; "
                "use edm2kit.guidance.losses.lgd.MonteCarloAverage"
            )
        return squares / (2 * (self.noise_std**2 + row_energy(images.shape) * r**2))
