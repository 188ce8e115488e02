"""The learning rate schedule (Karras et al. 2023, Eq. 67)."""

import math


def learning_rate(nimg: int, batch_size: int, ref_lr: float, ref_batches: float, rampup_nimg: float) -> float:
    """Learning rate of the step that starts after `nimg` images.

    `ref_lr` for the first `ref_batches` batches, then proportional to the inverse square root of time. It ramps up
    linearly over the first `rampup_nimg` images, so the first step has rate 0. A value of 0 disables decay or ramp.
    Karras et al. 2023, Eq. 67.

    Example: `learning_rate(nimg=1 << 29, batch_size=2048, ref_lr=0.01, ref_batches=70e3, rampup_nimg=10e6)` is 0.0052.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(nimg / (ref_batches * batch_size), 1))
    if rampup_nimg > 0:
        lr *= min(nimg / rampup_nimg, 1)
    return lr
