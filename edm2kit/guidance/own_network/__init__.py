"""Guidance by the main network alone: its condition, its input or its interior are changed."""
