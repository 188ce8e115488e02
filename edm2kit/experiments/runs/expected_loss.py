"""What loss to expect at a noise level, from the data alone.

Two denoisers need no training, and their errors follow from second moments of the data:

- *skip*: D = c_skip x with c_skip = sigma_data^2 / (sigma^2 + sigma_data^2), what EDM2's network returns while its
  layers put out zero (Karras et al. 2022, Eq. 7). It knows nothing of the image. If the data's mean square is
  sigma_data^2, its weighted error is 1 at every noise level.
- *filter*: the Wiener filter, the best denoiser that is linear and the same at every pixel. It knows the mean image and
  the power spectrum. With S the C x C spectrum of the colour channels at a frequency and p its eigenvalues, the mean
  squared error is the mean of p sigma^2 / (p + sigma^2) over frequencies and eigenvalues. This holds for any data with
  these second moments, not only for Gaussian ones.

The optimal denoiser is the conditional mean, so no denoiser has a smaller error; hence it does at least as well as the
filter, and so should a trained network. At high noise the filter's error is the variance of the data, at low noise
sigma^2.

Where the network's uncertainty u is fitted, the training loss at sigma is error / e^u + u = 1 + ln(error), which is the
curve that these functions return. Errors are weighted with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from edm2kit.data.archive import spread_evenly
from edm2kit.data.dataset import Source
from edm2kit.models.encoders import Encoder
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

MAX_IMAGES = 2048
_BATCH = 64
_POINTS = 33  # of the average over a range of noise levels


@dataclass(frozen=True)
class DataMoments:
    """Second moments of encoded images: `mean_square` of all values, `powers` the eigenvalues [C, H, W] of the power
    spectrum about the mean image, whose mean is the variance; measured on `num_images`."""

    mean_square: float
    powers: np.ndarray
    num_images: int

    @property
    def variance(self) -> float:
        """The variance of a value about the mean image."""
        return float(self.powers.mean())

    def filter_error(self, sigma: float) -> float:
        """The mean squared error of the filter at a noise level, per value."""
        return float((self.powers * sigma**2 / (self.powers + sigma**2)).mean())

    def skip_error(self, sigma: float, sigma_data: float) -> float:
        """The mean squared error of D = c_skip x at a noise level, per value."""
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        return (1 - c_skip) ** 2 * self.mean_square + c_skip**2 * sigma**2


def measure_moments(source: Source, encoder: Encoder, max_images: int = MAX_IMAGES) -> DataMoments:
    """The moments of at most `max_images` images, evenly spread. Raises ValueError if an image cannot be read."""
    numbers = spread_evenly(len(source), max_images)
    total: np.ndarray | None = None
    with progress_bar(len(numbers), what="spectrum of the data") as bar:
        for start in range(0, len(numbers), _BATCH):
            part = numbers[start : start + _BATCH]
            rng = StackedGenerator(torch.device("cpu"), [derive_seed(0, "moments", int(k)) for k in part])
            images = encoder.encode(torch.from_numpy(np.ascontiguousarray(source.read(part))), rng).double().numpy()
            spectra = np.fft.fft2(images, norm="ortho")  # [n, C, H, W]
            if total is None:
                total = np.zeros((images.shape[1], *images.shape[1:]), dtype=np.complex128)
                sums, squares = np.zeros(images.shape[1:], dtype=np.complex128), 0.0
            total += np.einsum("nihw,njhw->ijhw", spectra, spectra.conj())
            sums += spectra.sum(axis=0)
            squares += float((images**2).sum())
            bar.update(len(part))
    assert total is not None
    mean = sums / len(numbers)
    spectrum = total / len(numbers) - np.einsum("ihw,jhw->ijhw", mean, mean.conj())
    powers = np.linalg.eigvalsh(spectrum.transpose(2, 3, 0, 1)).transpose(2, 0, 1)  # [C, H, W]
    return DataMoments(squares / (len(numbers) * sums.size), np.maximum(powers, 0), len(numbers))


def loss_weight(sigma: float, sigma_data: float) -> float:
    """EDM's weight of a squared error at a noise level."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def filter_loss(moments: DataMoments, sigma: float, sigma_data: float) -> float:
    """The training loss at a noise level of a network that does as well as the filter: 1 + ln(weighted error)."""
    return 1 + float(np.log(loss_weight(sigma, sigma_data) * moments.filter_error(sigma)))


def filter_loss_between(
    moments: DataMoments, low: float, high: float, P_mean: float, P_std: float, sigma_data: float
) -> float:
    """The mean of `filter_loss` over noise levels in [low, high), weighted as training draws them."""
    normal = NormalDist(P_mean, P_std)
    start = normal.cdf(np.log(low)) if low > 0 else 0.0
    stop = normal.cdf(np.log(high)) if np.isfinite(high) else 1.0
    shares = start + (stop - start) * (np.arange(_POINTS) + 0.5) / _POINTS
    levels = np.exp([normal.inv_cdf(share) for share in shares])
    return float(np.mean([filter_loss(moments, sigma, sigma_data) for sigma in levels]))
