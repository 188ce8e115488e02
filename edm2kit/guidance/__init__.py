"""Guidance methods, one file per idea. Every guided denoiser is itself a denoiser.

Example:

    from edm2kit.guidance import Choice, Parts, guide

    denoiser = guide(Choice("autoguidance", 2.0, interval=(0.28, 2.90)), Parts(net, weaker_net))

Methods of your own: `register_method`, `register_rule`, or the entry-point group `edm2kit.guidance`.
"""

from edm2kit.guidance.base import Method, Option, Parts, Rule
from edm2kit.guidance.combine import Combination, Evaluation, Guided, Negative
from edm2kit.guidance.registry import METHODS, RULES, Choice, guide, register_method, register_rule

__all__ = [
    "METHODS",
    "RULES",
    "Choice",
    "Combination",
    "Evaluation",
    "Guided",
    "Method",
    "Negative",
    "Option",
    "Parts",
    "Rule",
    "guide",
    "register_method",
    "register_rule",
]
