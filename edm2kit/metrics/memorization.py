"""Are generated images copies of training images? AuthPct and the C_T score."""

import numpy as np
import scipy.linalg
import torch

from edm2kit.metrics.moments import GRAM_ROWS, gram_matrix
from edm2kit.metrics.neighbours import nearest_distances
from edm2kit.metrics.score import Sample, Score

_COMPONENTS = 64
_CELLS = 5  # this and the next number: not checked against the authors' code
_MIN_IN_CELL = 20  # generated images; emptier cells are left out


def authpct(sample: Sample) -> Score:
    """The percentage of generated images that are "authentic": farther from their nearest training image than that is
    from its own nearest training image.

    Alaa et al. 2022 (arXiv 2102.08921), as a percentage in Stein et al. 2023 (arXiv 2306.04675). `sample.real` must be
    the training images. A perfect model of continuous data is near 50; copies lower it.
    """
    found = sample.neighbours
    is_authentic = found.real_squared_distance[found.nearest_real] < found.squared_distance_to_real
    return Score.mean_of(is_authentic, 100.0)


def ct_score(sample: Sample) -> Score:
    """C_T: are generated images nearer to training images than held-out images are? Near 0 if not, negative if copied.

    Features are reduced to 64 principal components of the training images (`sample.real`), which k-means divides into
    5 cells. In each cell, a Mann-Whitney U test compares the distances to the nearest training image of generated and
    held-out images; the score is the mean of the z values, weighted by the held-out images of the cells. Cells with
    fewer than 20 generated images are left out. Meehan et al. 2020 (arXiv 2004.05675). Raises ValueError if no cell
    remains.
    """
    # it imports hundreds of modules, which the other metrics do not need
    from scipy.cluster.vq import kmeans2

    if sample.heldout is None:
        raise ValueError("ct needs held-out real images that the network was not trained on; give --heldout")
    sets = [rows.cpu() for rows in (sample.real_features, sample.heldout, sample.generated)]
    centre = sets[0].mean(dim=0, dtype=torch.float64)
    # eigenvectors of the covariance, only those that are used: a tenth of the time of singular vectors of all rows
    features = len(centre)
    kept = [max(features - _COMPONENTS, 0), features - 1]
    scatter = gram_matrix(sets[0], lambda part: part.double() - centre)
    _, vectors = scipy.linalg.eigh(scatter.numpy(), subset_by_index=kept)
    directions = torch.from_numpy(vectors[:, ::-1].copy())
    train, heldout, generated = (
        torch.cat([(part.double() - centre) @ directions for part in rows.split(GRAM_ROWS)]) for rows in sets
    )
    centroids, train_cells = kmeans2(train.numpy(), _CELLS, seed=sample.seed, minit="++")
    heldout_cells, generated_cells = (
        torch.cdist(rows, torch.from_numpy(centroids)).argmin(dim=1).numpy() for rows in (heldout, generated)
    )

    weights, values, variances = [], [], []
    for cell in range(_CELLS):
        in_train, in_heldout, in_generated = (
            torch.from_numpy(cells == cell) for cells in (train_cells, heldout_cells, generated_cells)
        )
        m, n = int(in_generated.sum()), int(in_heldout.sum())
        if m < _MIN_IN_CELL or n == 0 or not in_train.any():
            continue
        of_generated, of_heldout = (
            nearest_distances(rows, train[in_train]) for rows in (generated[in_generated], heldout[in_heldout])
        )
        u = _mann_whitney_u(of_generated, of_heldout)
        values.append((u - (m * n / 2 - 0.5)) / np.sqrt(m * n * (m + n + 1) / 12))
        weights.append(n)
        # the variance of a z value of one set given the other; sampling of the held-out images is not counted
        variances.append(n / (m + n + 1))
    if not values:
        raise ValueError(
            f"ct found no cell with {_MIN_IN_CELL} generated and one held-out image; give more images of both"
        )
    shares = np.array(weights) / np.sum(weights)
    return Score(float(shares @ values), extra_variance=float(shares**2 @ variances))


def _mann_whitney_u(x: torch.Tensor, y: torch.Tensor) -> float:
    """How many pairs of x and y have x > y; equal ones count half."""
    y, x = y.sort().values, x.contiguous()
    smaller, not_larger = torch.searchsorted(y, x), torch.searchsorted(y, x, right=True)
    return float((smaller + not_larger).sum()) / 2
