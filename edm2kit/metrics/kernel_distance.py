"""Kernel distances (MMD) between features: KID, which is called KDD on DINOv2 features, and CMMD."""

from collections.abc import Iterator

import numpy as np
import torch

from edm2kit.metrics.moments import row_products
from edm2kit.metrics.pairs import PairVisitor, Rows, scaled_rows, visit_pairs
from edm2kit.metrics.score import Sample, Score

_SUBSETS = 100
_SUBSET_SIZE = 1000
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0
_BLOCK_ROWS = 2048

Picks = list[tuple[torch.Tensor, torch.Tensor]]  # numbers of generated and of real images by subset, int64 [n] each


def kid(sample: Sample) -> Score:
    """The kernel distance with k(x, y) = (x y / F + 1)^3: unbiased, the mean of 100 random subsets of 1000 images.

    Subsets have all images if there are fewer than 1000. Can be negative if the sets are alike. Binkowski et al. 2018
    (arXiv 1801.01401). Published tables often show it times 1000. Raises ValueError for fewer than two images.
    """
    picks = _picks(sample)
    n = len(picks[0][0])
    values = []
    influence = torch.zeros(len(sample.generated), dtype=torch.float64, device=sample.generated.device)
    times = torch.zeros_like(influence)
    for (picked, _), (to_own, to_real, real_to_own) in zip(picks, _sums_by_subset(sample, picks), strict=True):
        to_own, to_real = to_own / (n - 1), to_real / n
        values.append(float(to_own.mean() + real_to_own / (n * (n - 1)) - 2 * to_real.mean()))
        effect = 2 * (to_own - to_real)
        influence[picked] += effect - effect.mean()
        times[picked] += 1
    influence = (influence / times.clamp(min=1))[times > 0]
    between = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    return Score(float(np.mean(values)), (influence - influence.mean()).cpu(), between)


def _picks(sample: Sample) -> Picks:
    """The random subsets."""
    num_generated, num_real = len(sample.generated), len(sample.real_features)
    size = min(_SUBSET_SIZE, num_generated, num_real)
    if size < 2:
        raise ValueError(f"kid compares pairs of images; got {num_generated} generated and {num_real} real ones")
    rng = np.random.default_rng(sample.seed)

    def pick(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.choice(count, size, replace=False)).to(sample.generated.device)

    # one subset says it all if both sets are used completely
    num_subsets = 1 if size == num_generated == num_real else _SUBSETS
    return [(pick(num_generated), pick(num_real)) for _ in range(num_subsets)]


def _sums_by_subset(sample: Sample, picks: Picks) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sums of the kernel in each subset: of its generated images with the others [n] and with its real images [n], and
    of all its real images with the others."""
    if _is_in_one_pass(sample, picks):
        sums = sample.visited(kernel_sums)
        for subset, (picked, _) in enumerate(picks):
            yield sums.to_own[picked, subset], sums.to_real[picked, subset], sums.real_to_own[subset]
    else:
        generated, real = scaled_rows(sample.generated, sample.real_features)
        everyone = torch.ones(len(picks[0][0]), 1, device=sample.generated.device)
        for picked, picked_real in picks:
            sums = KernelSums(everyone, everyone)
            visit_pairs(generated.pick(picked), real.pick(picked_real), [sums])
            yield sums.to_own[:, 0], sums.to_real[:, 0], sums.real_to_own[0]


def _is_in_one_pass(sample: Sample, picks: Picks) -> bool:
    """Whether all pairs of images are not more than the pairs of all subsets together."""
    return (len(sample.generated) + len(sample.real_features)) ** 2 <= len(picks) * (2 * len(picks[0][0])) ** 2


def kernel_sums(sample: Sample) -> "KernelSums":
    """The sums of `kid` from one pass over all pairs. Raises ValueError if there are too many or too few images."""
    picks = _picks(sample)
    if not _is_in_one_pass(sample, picks):
        raise ValueError("the subsets have fewer pairs than all images")
    members = []
    for side, rows in enumerate((sample.generated, sample.real_features)):
        members.append(torch.zeros(len(rows), len(picks), device=rows.device))
        for subset, picked in enumerate(picks):
            members[-1][picked[side], subset] = 1
    return KernelSums(*members)


class KernelSums(PairVisitor):
    """Sums of the kernel (x y / F + 1)^3 over pairs of images, for several subsets at once.

    `generated` [N, S] and `real` [M, S] are 1 for the images of each of S subsets, else 0. `to_own` [N, S] are the sums
    of a generated image with the other generated images of a subset, `to_real` [N, S] those with its real images, and
    `real_to_own` [S] the sums of all its real images with the others, float64.

    With the centre c of products, x y / F + 1 = e + g, where e = (x - c) (y - c) / F is small and g = of_x + of_y. All
    sums lack of_x^3 + of_y^3, which cancels in a kernel distance. Of the rest of the cube, 3 of_x of_y g is summed in
    float64; what contains e is summed in float32 within a tile: it has any sign, so that rounding errors stay small.
    """

    needs_within = True

    def __init__(self, generated: torch.Tensor, real: torch.Tensor) -> None:
        self._members = generated, real

    def start(self, generated: Rows, real: Rows) -> None:
        dtype, features = generated.scaled.dtype, generated.scaled.shape[1]
        half = generated.centre.square().sum() / 2
        x, y = ((rows.along_centre + half) / features + 0.5 for rows in (generated, real))
        in_generated, in_real = (members.double() for members in self._members)
        own, own_squares = (x**power @ in_generated for power in (1, 2))
        others, squares, cubes = (y**power @ in_real for power in (1, 2, 3))
        column = x[:, None]
        self.to_own = 3 * column * (column * (own - column) + own_squares - column.square())
        self.to_real = 3 * column * (column * others + squares)
        self.real_to_own = 6 * (others * squares - cubes)
        self._generated, self._real = (members.to(dtype) for members in self._members)
        self._of_generated, self._of_real = x.to(dtype), y.to(dtype)
        self._factor = 1 / (generated.scale**2 * features)

    def _kernel(self, products: torch.Tensor, of_rows: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
        """(e + g)^3 - g^3 of a tile."""
        e, g = products * self._factor, of_rows[:, None] + of_columns
        return torch.add(e, g, alpha=3).mul_(e).addcmul_(g, g, value=3).mul_(e)

    def within_generated(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        kernel = self._kernel(products, self._of_generated[rows], self._of_generated[columns])
        if rows == columns:
            kernel.fill_diagonal_(0)  # an image with itself
        else:
            self.to_own[columns] += kernel.T @ self._generated[rows]
        self.to_own[rows] += row_products(kernel, self._generated[columns].T)

    def within_real(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        kernel = self._kernel(products, self._of_real[rows], self._of_real[columns])
        if rows == columns:
            kernel.fill_diagonal_(0)
        sums = row_products(kernel, self._real[columns].T).double().mul_(self._real[rows]).sum(dim=0)
        # of tiles that mirror each other, one came
        self.real_to_own += sums if rows == columns else 2 * sums

    def across(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        kernel = self._kernel(products, self._of_generated[rows], self._of_real[columns])
        self.to_real[rows] += row_products(kernel, self._real[columns].T)


def cmmd(sample: Sample) -> Score:
    """CMMD: 1000 times the squared MMD with a Gaussian kernel of sigma 10, of features of unit length.

    The biased estimate with all pairs, as published. Jayasumana et al. 2023 (arXiv 2401.09603), who use the CLIP
    ViT-L/14@336 image embedding; values of other detectors compare only with themselves.
    """
    x = torch.nn.functional.normalize(sample.generated.double(), dim=1)
    y = torch.nn.functional.normalize(sample.real_features.double(), dim=1)
    to_own, to_real, real_to_own = _mean_gaussian(x, x), _mean_gaussian(x, y), _mean_gaussian(y, y)
    value = to_own.mean() + real_to_own.mean() - 2 * to_real.mean()
    effect = 2 * _CMMD_SCALE * (to_own - to_real)
    return Score(float(value) * _CMMD_SCALE, (effect - effect.mean()).cpu())


def _mean_gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean kernel value of each row of `x` over all rows of `y`, both of unit length."""
    gamma = 1 / (2 * _CMMD_SIGMA**2)
    # |x - y|^2 = 2 - 2 x y for rows of unit length
    return torch.cat([torch.exp(-gamma * (2 - 2 * rows @ y.T)).mean(dim=1) for rows in x.split(_BLOCK_ROWS)])
