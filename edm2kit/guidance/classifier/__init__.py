"""Guidance by a classifier of noisy images."""
