"""Images shown without their label, so that one network learns both with and without (Ho & Salimans 2022)."""

from collections.abc import Sequence

import torch

from edm2kit.torch_utils.rng import StackedGenerator, derive_seed


def drop_labels(labels: torch.Tensor, positions: Sequence[int], share: float, seed: int) -> torch.Tensor:
    """`labels` [N, K], each row emptied (all zeros: no label) with probability `share`.

    Which ones depends on `seed` and on the image's position in the global order alone.
    """
    # a stream of its own: noise and noise levels are the same with and without label dropout
    own = StackedGenerator(labels.device, [derive_seed(seed, "label dropout", position) for position in positions])
    return labels * (own.rand([len(positions), 1]) >= share)
