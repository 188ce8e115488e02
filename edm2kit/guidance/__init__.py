"""Guidance methods, one file per idea; every guided denoiser is itself a denoiser."""

from edm2kit.guidance.guided import Guided

__all__ = ["Guided"]
