"""Guidance methods, one file per idea; every guided denoiser is itself a denoiser."""

from guidance.guided import Guided

__all__ = ["Guided"]
