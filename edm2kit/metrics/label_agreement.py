"""Do generated images show the class they were asked for? A vote of the nearest real images."""

import torch

from edm2kit.metrics.neighbours import nearest_indices
from edm2kit.metrics.score import Sample, Score

NEIGHBOURS = 10


def knn_agreement(sample: Sample) -> Score:
    """The share of generated images whose class is the most frequent among the 10 nearest real images (by cosine).

    Of equally frequent classes, the one of the lowest number counts. Real images that were not compared with themselves
    give the value to compare with: it need not be near 1. Raises ValueError without classes of both sides.
    """
    if sample.labels is None or sample.real_labels is None:
        raise ValueError(
            "knn_agreement needs the classes of generated and real images: class folders, a dataset.json, images of "
            "generate.py, or a class-conditional network"
        )
    generated, real = (
        torch.nn.functional.normalize(rows.double(), dim=1) for rows in (sample.generated, sample.real_features)
    )
    if len(real) < NEIGHBOURS:
        raise ValueError(f"knn_agreement needs at least {NEIGHBOURS} real images; got {len(real)}")
    nearest = nearest_indices(generated, real, NEIGHBOURS).cpu()
    classes = sample.real_labels[nearest]
    votes = torch.zeros(len(generated), int(sample.real_labels.max()) + 1, dtype=torch.int32)
    votes.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.int32))
    return Score.mean_of(votes.argmax(dim=1) == sample.labels)
