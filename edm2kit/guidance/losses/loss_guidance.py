"""The method `loss`: guidance by a loss from the command line, made of a target and a rule for the step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.classifier.noise_classifier import load_classifier
from edm2kit.guidance.losses.augmentation import AugmentedLoss
from edm2kit.guidance.losses.dps import DPSStep
from edm2kit.guidance.losses.freedom import FreeDoMLevelStep, FreeDoMStep
from edm2kit.guidance.losses.gradient_step import GradientStep, StepRule
from edm2kit.guidance.losses.lgd import ClosedFormAverage, MonteCarloAverage
from edm2kit.guidance.losses.loss import ClassLogits, Loss, OnPixels
from edm2kit.guidance.losses.polyak import PolyakStep, TruePolyakStep
from edm2kit.guidance.losses.restoration import (
    DownsamplingOperator,
    GaussianBlurOperator,
    InpaintingOperator,
    MeanColourOperator,
    Measurement,
)
from edm2kit.guidance.losses.score import LossGuided
from edm2kit.guidance.losses.tfg import TFG
from edm2kit.guidance.option_types import File, count, existing_file, number, one_of, read_picture

# each is made with one number (--loss-step) or with its published default
STEP_RULES: Mapping[str, Callable[..., StepRule]] = {
    "dps": DPSStep,
    "freedom": FreeDoMStep,
    "level": FreeDoMLevelStep,
    "polyak": PolyakStep,
    "polyak-true": TruePolyakStep,
}
KINDS = ("inpaint", "downsample", "blur", "colour", "class")
_NOISE_STD = 0.05
_CLEAN_SIGMA = 0.05  # the noise level at which a classifier of noisy images is evaluated on denoised ones


@dataclass(frozen=True)
class LossSettings:
    """The options of the method, by keyword."""

    loss_kind: str | None
    loss_image: File | None
    loss_mask: File | None
    loss_factor: int
    loss_blur: float
    loss_colour: tuple[float, float, float] | None
    loss_noise: float | None
    loss_classifier: File | None
    loss_class: int | None
    loss_rule: str
    loss_step: float | None
    loss_backprop: str
    loss_average: str
    loss_augment: int
    loss_rho: float
    loss_mu: float
    loss_gamma: float
    loss_iterations: int

    def needed(self, name: str) -> Any:
        """The value of an option. Raises ValueError if it was not given but this kind of loss needs it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"--loss-kind {self.loss_kind} needs --{name.replace('_', '-')}")
        return value

    @property
    def noise_std(self) -> float:
        """As given; otherwise small for the score form, and for steps what makes the loss a sum of squares."""
        if self.loss_noise is not None:
            return self.loss_noise
        return _NOISE_STD if self.loss_rule in ("auto", "score") else 0.5**0.5


def parse_colour(text: str) -> tuple[float, float, float]:
    """R,G,B from 0 to 255, as pixels in [-1, 1]."""
    values = [number(0, 255)(part) / 127.5 - 1 for part in text.split(",")]
    if len(values) != 3:
        raise ValueError(f"{text!r:.60} is not a colour; write for example 200,30,30")
    return (values[0], values[1], values[2])


def parse_average(text: str) -> str:
    """auto, none, exact, or a number of samples."""
    if text not in ("auto", "none", "exact"):
        count()(text)
    return text


def measured(settings: LossSettings, channels: int) -> Measurement:
    """The loss of a given picture or colour. Raises ValueError if an option is missing or a file unreadable."""
    if settings.loss_kind == "colour":
        target = torch.tensor(settings.needed("loss_colour"))
        return Measurement(MeanColourOperator(), target if channels == 3 else target.mean()[None], settings.noise_std)
    picture = read_picture(settings.needed("loss_image").path, grey=channels == 1)
    if settings.loss_kind == "downsample":
        return Measurement(DownsamplingOperator(settings.loss_factor), picture, settings.noise_std)
    if settings.loss_kind == "blur":
        return Measurement(GaussianBlurOperator(settings.loss_blur), picture, settings.noise_std)
    mask = (read_picture(settings.needed("loss_mask").path, grey=True) > 0).float()
    if mask.shape[1:] != picture.shape[1:]:
        raise ValueError(f"the mask is {list(mask.shape[1:])} pixels, the image {list(picture.shape[1:])}")
    return Measurement(InpaintingOperator(mask), picture * mask, settings.noise_std)


def make_loss(settings: LossSettings, parts: Parts) -> Loss:
    """The loss that the options ask for, of what the network generates."""
    if settings.loss_kind is None:
        raise ValueError(f"guidance by a loss needs --loss-kind, one of {', '.join(KINDS)}")
    loss: Loss
    if settings.loss_kind == "class":
        net = load_classifier(settings.needed("loss_classifier").path).net
        target = settings.needed("loss_class")
        loss = ClassLogits(lambda images: net.to(images.device)(images, _CLEAN_SIGMA), target)
    else:
        channels = getattr(parts.net, "img_channels", 3) if parts.pixels is None else 3
        loss = measured(settings, channels)
    if settings.loss_augment:
        loss = AugmentedLoss(loss, settings.loss_augment)
    # a classifier takes what the network generates, even if that is latents
    if parts.pixels is None or settings.loss_kind == "class":
        return loss
    return OnPixels(loss, parts.pixels)


def averaged(loss: Loss, how: str, rule: str) -> Loss:
    """The loss averaged over clean images near the denoised one, by `how`.

    auto: if the average is known exactly and `rule` is the score. The published steps take the loss of D itself.
    """
    if how == "auto":
        how = "exact" if rule == "score" and isinstance(loss, Measurement) else "none"
    if how == "none":
        return loss
    if how != "exact":
        return MonteCarloAverage(loss, int(how))
    if not isinstance(loss, Measurement):
        raise ValueError(
            "the average is known exactly only for pixels, not for latents, classes or random versions; "
            "use --loss-average none or a number of samples"
        )
    return ClosedFormAverage(loss)


def _build(parts: Parts, weight: float, **options: Any) -> Denoiser:
    settings = LossSettings(**options)
    if not math.isfinite(weight):
        raise ValueError(f"the guidance weight is {weight}; expected a finite number (1 is off)")
    loss, scale = make_loss(settings, parts), weight - 1
    rule, backprop = settings.loss_rule, settings.loss_backprop == "yes"
    if rule == "auto":
        rule = "score" if isinstance(loss, Measurement) else "freedom"
    if rule == "tfg":
        tfg = TFG(parts.net, loss, settings.loss_rho, settings.loss_mu, settings.loss_gamma, settings.loss_iterations)
        if not backprop:
            tfg = replace(tfg, rho=0.0)
        return tfg.scaled(scale)
    loss = averaged(loss, settings.loss_average, rule)
    if rule == "score":
        return LossGuided(parts.net, loss, scale, backprop)
    step = STEP_RULES[rule]() if settings.loss_step is None else STEP_RULES[rule](settings.loss_step)
    return GradientStep(parts.net, loss, step, scale, backprop)


METHOD = Method(
    "loss guidance: towards a low loss of the denoised image (inpainting, super-resolution, a colour, a class)",
    "1 main and its backward pass: about 3 main",
    _build,
    around=True,
    weight=2.0,
    options=(
        Option("loss-kind", one_of(*KINDS), None, f"What the images should match, one of {', '.join(KINDS)}; required"),
        Option(
            "loss-image",
            existing_file,
            None,
            "inpaint, downsample, blur: the picture to match; incomplete, small or blurred",
        ),
        Option("loss-mask", existing_file, None, "inpaint: a picture of the same size, white where the image is known"),
        Option("loss-factor", count(2), 4, "downsample: how many times smaller the picture is per side"),
        Option("loss-blur", number(0.1), 2.0, "blur: standard deviation of the blur, in pixels"),
        Option("loss-colour", parse_colour, None, "colour: the mean colour R,G,B, each from 0 to 255"),
        Option(
            "loss-noise",
            number(1e-4),
            None,
            f"Standard deviation of the noise in the picture, for pixels in [-1, 1]  [default: {_NOISE_STD:g} for the "
            "score; for steps the loss is a sum of squares]",
        ),
        Option("loss-classifier", existing_file, None, "class: a classifier file from scripts/train_classifier.py"),
        Option("loss-class", count(0), None, "class: index of the class to guide towards, from 0"),
        Option(
            "loss-rule",
            one_of("auto", "score", *STEP_RULES, "tfg"),
            "auto",
            f"score (part of the score), or a step on x after each step of the solver: {', '.join(STEP_RULES)}, tfg; "
            "auto: score if the average is known exactly, else freedom. W - 1 multiplies it (the defaults of tfg suit "
            "a class; for pictures, whose loss is steeper, use W 1.2)",
        ),
        Option(
            "loss-step",
            number(),
            None,
            "Size of the step; of the rule polyak-true, the lowest possible loss  [default: as published]",
        ),
        Option(
            "loss-backprop",
            one_of("yes", "no"),
            "yes",
            "no: take the gradient at the denoised image only (MPGD), at the cost of 1 main",
        ),
        Option(
            "loss-average",
            parse_average,
            "auto",
            "Average of the loss over clean images near the denoised one (LGD): none, exact, a number of samples, or "
            "auto (for the score: exact, if it is known; for the steps, as published: none)",
        ),
        Option(
            "loss-augment", count(0), 0, "Number of random versions of each image whose losses are averaged; 0: none"
        ),
        Option("loss-rho", number(), TFG.rho, "tfg: step size along the gradient through the network"),
        Option("loss-mu", number(), TFG.mu, "tfg: step size along the gradient at the denoised image"),
        Option("loss-gamma", number(0), TFG.gamma, "tfg: relative standard deviation of the images the loss averages"),
        Option("loss-iterations", count(0), TFG.iterations, "tfg: number of steps at the denoised image"),
    ),
    formula="D - (w - 1) sigma^2 grad loss(D), or x - (w - 1) rule(grad loss(D)) after each step",
    source="arXiv 2209.14687 (DPS), 2303.09833 (FreeDoM), 2403.12404, 2409.15761 (TFG); LGD, ICML 2023",
    pick_when="images should match a given picture, colour or class that the network was not trained for",
)
