"""The Vendi score: how many different images there are, in effect."""

import torch

from edm2kit.metrics.moments import GRAM_ROWS, gram_matrix, row_products
from edm2kit.metrics.score import Sample, Score


def vendi(sample: Sample) -> Score:
    """exp of the entropy of the eigenvalues of the similarity matrix (cosines of features) divided by n.

    1 if all images are alike, n if all differ completely; real images have a value too, to compare with. Friedman and
    Dieng 2022 (arXiv 2210.02410).
    """
    # the same eigenvalues as those of the n x n similarities, apart from zeros
    matrix = gram_matrix(sample.generated, _unit) / len(sample.generated)
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    entropy = -torch.special.xlogy(values, values).sum()
    value = entropy.exp()
    # float32 is enough for an interval
    logs = torch.where(values > 1e-14, values, torch.ones_like(values)).log().float() + 1
    directions = vectors.T.float()
    effect = torch.cat(
        [row_products(_unit(part).float(), directions).square_() @ logs for part in sample.generated.split(GRAM_ROWS)]
    )
    effect = -value * effect.double()
    return Score(float(value), (effect - effect.mean()).cpu())


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)
