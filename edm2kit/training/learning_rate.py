"""The learning rate schedule (Karras et al. 2023, Eq. 67)."""

import math


def learning_rate(nimg: int, batch_size: int, ref_lr: float, ref_batches: float, rampup_nimg: float) -> float:
    """Learning rate of the step that starts when `nimg` images have been seen.

    Constant `ref_lr` for `ref_batches` batches, then decaying with the inverse square root of time; a linear
    ramp over the first `rampup_nimg` images (so the very first step has rate 0). 0 switches either off.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(nimg / (ref_batches * batch_size), 1))
    if rampup_nimg > 0:
        lr *= min(nimg / rampup_nimg, 1)
    return lr
