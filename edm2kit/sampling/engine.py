"""Generating images from seeds: noise, class labels, the solver and the decoder, in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from edm2kit.conditions import Condition, ConditionLike, FloatVectors
from edm2kit.denoiser import Denoiser, describe, for_images
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

Sampling = Callable[..., torch.Tensor]  # (denoiser, noise, condition, randn_like) -> x0


@dataclass(frozen=True)
class ImageBatch:
    """Finished images; row k of every field belongs to seeds[k]."""

    seeds: tuple[int, ...]
    classes: torch.Tensor | None  # int64 [N], class indices; None without classes
    latents: torch.Tensor  # float32 [N,C,H,W], the result of the solver
    images: torch.Tensor  # uint8 [N,C,H,W], decoded

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        seeds = ", ".join(map(str, self.seeds[:8])) + (", ..." if len(self.seeds) > 8 else "")
        text = f"ImageBatch: {len(self.seeds)} images of {width}x{height} pixels, {channels} channels\n  seeds {seeds}"
        if self.classes is None:
            return text
        classes = ", ".join(map(str, self.classes[:8].tolist())) + (", ..." if len(self.seeds) > 8 else "")
        return f"{text}\n  classes {classes}"

    def first(self, count: int) -> "ImageBatch":
        """The first `count` images."""
        classes = None if self.classes is None else self.classes[:count]
        return ImageBatch(self.seeds[:count], classes, self.latents[:count], self.images[:count])


@dataclass(frozen=True)
class Engine:
    """Generates images with a denoiser, image k from seed k alone.

    Noise and label are the same to the last bit in any batch and on any rank. Networks round differently in batches of
    other sizes, which changes single pixels by one grey level in float32, and more of them in half precision; images
    generated one at a time are the same on a CPU.

    `sampler` is (denoiser, noise, condition, randn_like) -> x0, such as `edm2kit.sampling.solvers.Sampler`. `decode`
    turns float32 latents [N,C,H,W] into uint8 images. `shape` is the shape of one latent, (C, H, W).

    `label_dim` is the number of classes, 0 for an unconditional denoiser. Each image gets a random class, none of
    `empty_classes`; with `classes`, seed s gets class classes[s % len(classes)]. For a denoiser conditioned on float
    vectors, `vectors` [M, label_dim] are those to choose from, and `classes` are rows of it. For one conditioned on
    anything else, `prompts` are M conditions, such as `TextPrompts`: seed s gets number s % M, or with `classes` number
    classes[s % len(classes)]. `class_names`, one per class, are only for records.

    With `pad`, all batches have the same size, as a compiled denoiser is compiled again for each size: the last one is
    filled up with images that are dropped.

    Example: `Engine(net, encoder.decode, Sampler(), (3, 64, 64), 1000, torch.device("cuda")).generate(range(4))`
    """

    denoiser: Denoiser
    decode: Callable[[torch.Tensor], torch.Tensor]
    sampler: Sampling
    shape: tuple[int, int, int]
    label_dim: int
    device: torch.device
    classes: Sequence[int] | None = None
    vectors: torch.Tensor | None = None
    pad: bool = False
    empty_classes: Sequence[int] = ()
    prompts: Condition | None = None
    class_names: Sequence[str] | None = None

    __repr__ = describe

    @property
    def possible_classes(self) -> Sequence[int]:
        """The classes that images can have; [] without classes."""
        if self.vectors is not None or self.prompts is not None:
            return []
        if self.classes is not None:
            return sorted(set(self.classes))
        left = [k for k in range(self.label_dim) if k not in set(self.empty_classes)]
        return left or list(range(self.label_dim))

    def batches(self, seeds: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """The images of `seeds`, in that order, at most `batch_size` at a time; no batches if there are no seeds.

        Raises ValueError, naming the seed, if an image is not finite.
        """
        for start in range(0, len(seeds), batch_size):
            part = seeds[start : start + batch_size]
            missing = min(batch_size, len(seeds)) - len(part)
            if self.pad and missing:
                yield self.generate([*part, *seeds[:missing]]).first(len(part))
            else:
                yield self.generate(part)

    @torch.no_grad()
    def generate(self, seeds: Sequence[int]) -> ImageBatch:
        """The images of `seeds` as one batch. Raises ValueError, naming the seed, if an image is not finite."""
        rng = StackedGenerator(self.device, seeds)
        # Noise before label, and the label drawn even if its class is given: another order would change every image.
        noise = rng.randn([len(seeds), *self.shape])
        picked = self._pick_conditions(rng, seeds)
        condition = self._condition(picked)

        # a generator of its own, so that random numbers of a guidance method leave the sampler's noise unchanged
        guidance_rng = StackedGenerator(self.device, [derive_seed(seed, "guidance") for seed in seeds])
        latents = self.sampler(for_images(self.denoiser, guidance_rng), noise, condition, rng.randn_like).float()

        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise ValueError(
                f"the image of seed {seeds[finite.index(False)]} is not finite; if the network computes in float16, "
                "try bfloat16 or float32, or use a guidance weight closer to 1 (or a loss that is never negative)"
            )
        classes = picked if self.vectors is None and self.prompts is None else None
        return ImageBatch(tuple(seeds), classes, latents, self.decode(latents))

    def _pick_conditions(self, rng: StackedGenerator, seeds: Sequence[int]) -> torch.Tensor | None:
        """The class, or the row of `vectors` or `prompts`, of each image: int64 [N]; None if unconditional."""
        if self.prompts is not None:
            rows = range(len(self.prompts)) if self.classes is None else self.classes
            return torch.tensor([rows[seed % len(rows)] for seed in seeds])
        if self.label_dim == 0:
            return None
        if self.vectors is None and self.classes is None and 0 < len(self.empty_classes) < self.label_dim:
            pool = [k for k in range(self.label_dim) if k not in set(self.empty_classes)]
            return torch.tensor(pool, device=self.device)[rng.randint(len(pool), size=[len(seeds)])]
        drawn = rng.randint(self.label_dim if self.vectors is None else len(self.vectors), size=[len(seeds)])
        if self.classes is None:
            return drawn
        return torch.tensor([self.classes[seed % len(self.classes)] for seed in seeds], device=self.device)

    def _condition(self, picked: torch.Tensor | None) -> ConditionLike:
        if picked is None:
            return None
        if self.prompts is not None:
            return self.prompts[picked].to(self.device)
        if self.vectors is None:
            return torch.nn.functional.one_hot(picked, self.label_dim).float()
        vectors = self.vectors.to(self.device)
        return FloatVectors(vectors[picked], vectors)


def share_of_rank(seeds: Sequence[int]) -> Sequence[int]:
    """The part of `seeds` that this rank generates: every world_size-th one, possibly none."""
    return seeds[dist.rank() :: dist.world_size()]


def complete_batches(
    seeds: Sequence[int], missing: Sequence[int], batch_size: int, device: torch.device
) -> Sequence[int]:
    """What to generate so that the `missing` ones of `seeds` become what they are when all are generated.

    Networks round differently in other batches. Where bits repeat, these are the seeds of all batches, on all ranks,
    that have a missing one; elsewhere the missing ones alone.
    """
    if not dist.repeats_bits(device):
        return missing
    size, wanted = batch_size * dist.world_size(), frozenset(missing)
    unfinished = {k // size for k, seed in enumerate(seeds) if seed in wanted}
    return [seed for k, seed in enumerate(seeds) if k // size in unfinished]
