"""Guidance by a second network: autoguidance, classifier-free guidance, and both."""
