"""From seeds to images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser, for_images
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

Sampling = Callable[..., torch.Tensor]  # (denoiser, noise, labels, randn_like) -> x0


@dataclass(frozen=True)
class ImageBatch:
    """Finished images; row k of everything belongs to seeds[k]."""

    seeds: tuple[int, ...]
    classes: torch.Tensor | None  # int64 [N], class indices; None from a denoiser without labels
    latents: torch.Tensor  # float32 [N,C,H,W], what the solver returned
    images: torch.Tensor  # uint8 [N,C,H,W], decoded


@dataclass(frozen=True)
class Engine:
    """Draws images from a denoiser: image k depends on seed k alone, whatever the batch and the number of ranks.

    `sampler` is (denoiser, noise, labels, randn_like) -> x0, such as `edm2kit.sampling.solvers.Sampler`; `decode` turns
    float32 latents [N,C,H,W] into uint8 images. `shape` is that of one latent, (C, H, W); `label_dim` the number of
    classes, 0 for none. Where `classes` is given, seed s gets class classes[s % len(classes)] instead of a random
    one: a list in equal shares, over any range of seeds.
    """

    denoiser: Denoiser
    decode: Callable[[torch.Tensor], torch.Tensor]
    sampler: Sampling
    shape: tuple[int, int, int]
    label_dim: int
    device: torch.device
    classes: Sequence[int] | None = None

    def batches(self, seeds: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """The images of `seeds`, in that order, at most `batch_size` at a time; no batch for no seeds.

        Raises ValueError where an image is not finite, naming its seed.
        """
        for start in range(0, len(seeds), batch_size):
            yield self.draw(seeds[start : start + batch_size])

    @torch.no_grad()
    def draw(self, seeds: Sequence[int]) -> ImageBatch:
        """The images of `seeds` as one batch."""
        rng = StackedGenerator(self.device, seeds)
        # noise before label, and the label drawn even if its class is forced: either change shifts every image
        noise = rng.randn([len(seeds), *self.shape])
        classes = self._classes(rng, seeds)
        labels = None if classes is None else torch.nn.functional.one_hot(classes, self.label_dim).float()

        # a stream of its own, so that a method that draws at random shifts nobody's sampler noise
        own = StackedGenerator(self.device, [derive_seed(seed, "guidance") for seed in seeds])
        latents = self.sampler(for_images(self.denoiser, own), noise, labels, rng.randn_like).float()

        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise ValueError(
                f"the image of seed {seeds[finite.index(False)]} is not finite; is the network in half precision? "
                "Try bfloat16 or float32, or a guidance weight nearer to 1"
            )
        return ImageBatch(tuple(seeds), classes, latents, self.decode(latents))

    def _classes(self, rng: StackedGenerator, seeds: Sequence[int]) -> torch.Tensor | None:
        if self.label_dim == 0:
            return None
        drawn = rng.randint(self.label_dim, size=[len(seeds)])
        if self.classes is None:
            return drawn
        return torch.tensor([self.classes[seed % len(self.classes)] for seed in seeds], device=self.device)


def share_of_rank(seeds: Sequence[int]) -> Sequence[int]:
    """The part of `seeds` that is this rank's to draw: every world_size-th one, possibly none."""
    return seeds[dist.rank() :: dist.world_size()]
