"""Guidance by a loss of the denoised image: DPS, FreeDoM, LGD, MPGD, TFG, restoration and augmentation."""
