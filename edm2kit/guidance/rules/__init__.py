"""Rules: how D and its negatives are combined. Each is an entry of RULES."""

from edm2kit.guidance.base import Rule
from edm2kit.guidance.combine import linear
from edm2kit.guidance.rules import adg, apg, cfg_zero_star, fbg, fdg, mambo_g, pmc, power_law, renorm, rescale, tcfg

RULES: dict[str, Rule] = {
    "linear": Rule(
        "the sum over the negatives",
        lambda: linear,
        formula="D + sum of (w_i - 1) (D - D_neg_i)",
        pick_when="always, unless large weights spoil the contrast",
    ),
    "apg": apg.RULE,
    "rescale": rescale.RULE,
    "power-law": power_law.RULE,
    "cfg-zero-star": cfg_zero_star.RULE,
    "fdg": fdg.RULE,
    "tcfg": tcfg.RULE,
    "mambo-g": mambo_g.RULE,
    "adg": adg.RULE,
    "renorm": renorm.RULE,
    "pmc": pmc.RULE,
    "fbg": fbg.RULE,
}
