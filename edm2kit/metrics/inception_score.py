"""The Inception Score, and the same of another classifier."""

import torch

from edm2kit.metrics.moments import product_dtype, row_products
from edm2kit.metrics.score import Sample, Score

SPLIT_SIZE = 5000


def inception_score(sample: Sample) -> Score:
    """exp of the mean divergence of class probabilities from their mean; the mean over splits of 5000 images.

    Computed as in the evaluation of Dhariwal and Nichol 2021 (arXiv 2105.05233), which published tables use: the
    probabilities are those of the features times the weights of the classifier, 1008 classes, **without the bias**.
    Salimans et al. 2016 (arXiv 1606.03498).
    """
    return _score(sample, with_bias=False)


def classifier_score(sample: Sample) -> Score:
    """The same of the 1000 classes of a detector that is not Inception, with the bias; compares only with itself."""
    return _score(sample, with_bias=True)


def _score(sample: Sample, with_bias: bool) -> Score:
    if sample.head is None:
        raise ValueError("an Inception Score needs a detector with a classifier, such as fid or fd_lite0")
    weight, bias = sample.head.weight.to(sample.generated.device), sample.head.bias.to(sample.generated.device)
    dtype = product_dtype(weight.device)
    values, effects = [], []
    for rows in sample.generated.split(SPLIT_SIZE):
        # rounding errors of float32 are random, and average out over the images of a split
        logits = row_products(rows.to(dtype), weight.to(dtype)).double()
        if with_bias:
            logits += bias.double()
        log_probabilities = logits.log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        mean = probabilities.mean(dim=0)
        # a class that no image shows adds nothing, and not 0 times infinity
        log_mean = torch.where(mean > 0, mean, 1.0).log()
        divergence = log_probabilities.mul_(probabilities).sum(dim=1) - probabilities @ log_mean
        value = divergence.mean().exp()
        values.append(value)
        effects.append(value * (divergence - divergence.mean()))
    # each split counts the same, whatever its size
    sizes = torch.tensor([len(effect) for effect in effects], dtype=torch.float64)
    factors = len(sample.generated) / len(effects) / sizes
    influence = torch.cat([effect.cpu() * factor for effect, factor in zip(effects, factors, strict=True)])
    return Score(float(torch.stack(values).mean()), influence)
