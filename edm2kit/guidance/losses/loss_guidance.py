"""Guidance by a loss from the command line: what to ask for, and by which rule to go there."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.classifier.noise_classifier import NoiseClassifier, load_classifier
from edm2kit.guidance.losses.augmentation import Augmented
from edm2kit.guidance.losses.lgd import Exact, MonteCarlo
from edm2kit.guidance.losses.loss_gradient import LossGuided
from edm2kit.guidance.losses.loss_steps import (
    LevelStep,
    NoiseStep,
    PolyakStep,
    Pushed,
    ResidualStep,
    Rule,
    TruePolyakStep,
)
from edm2kit.guidance.losses.targets import (
    Blurred,
    ClassLogits,
    Downsampled,
    Loss,
    Masked,
    MeanColour,
    Measurement,
    OnPixels,
)
from edm2kit.guidance.losses.tfg import Unified
from edm2kit.guidance.option_files import File, existing_file, read_picture
from edm2kit.guidance.option_types import count, number, one_of

_RULES: dict[str, type[Rule]] = {
    "dps": ResidualStep,
    "freedom": NoiseStep,
    "level": LevelStep,
    "polyak": PolyakStep,
    "polyak-true": TruePolyakStep,
}
_KINDS = ("inpaint", "downsample", "blur", "colour", "class")
_NOISE_STD = 0.05
_CLEAN_SIGMA = 0.05  # the noise level at which a classifier of noisy images is asked about denoised ones


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

    def needed(self, name: str) -> object:
        """The value of an option; ValueError where the kind of loss needs it and it was not given."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"--loss-kind {self.loss_kind} needs --{name.replace('_', '-')}")
        return value

    @property
    def noise_std(self) -> float:
        """As given; else a little for the score form, and for the pushes what makes the loss a sum of squares."""
        if self.loss_noise is not None:
            return self.loss_noise
        return _NOISE_STD if self.loss_rule in ("auto", "score") else 0.5**0.5


def parse_colour(text: str) -> tuple[float, float, float]:
    """R,G,B from 0 to 255, as pixels from -1 to 1."""
    values = [number(0, 255)(part) for part in text.split(",")]
    if len(values) != 3:
        raise ValueError(f"{text!r} is not a colour; write for example 200,30,30")
    return tuple(value / 127.5 - 1 for value in values)


def parse_average(text: str) -> str:
    """auto, none, exact, or a number of draws."""
    if text not in ("auto", "none", "exact"):
        count()(text)
    return text


def measured(settings: LossSettings, channels: int) -> Measurement:
    """The loss of a picture, or a colour, that was seen; ValueError where an option is missing or a file unreadable."""
    if settings.loss_kind == "colour":
        target = torch.tensor(settings.needed("loss_colour"))
        return Measurement(MeanColour(), target if channels == 3 else target.mean()[None], settings.noise_std)
    picture = read_picture(settings.needed("loss_image").path, grey=channels == 1)
    if settings.loss_kind == "downsample":
        return Measurement(Downsampled(settings.loss_factor), picture, settings.noise_std)
    if settings.loss_kind == "blur":
        return Measurement(Blurred(settings.loss_blur), picture, settings.noise_std)
    mask = (read_picture(settings.needed("loss_mask").path, grey=True) > 0).float()
    if mask.shape[1:] != picture.shape[1:]:
        raise ValueError(f"the mask is {list(mask.shape[1:])} pixels, the image {list(picture.shape[1:])}")
    return Measurement(Masked(mask), picture * mask, settings.noise_std)


def _logits(net: NoiseClassifier, images: torch.Tensor) -> torch.Tensor:
    return net.to(images.device)(images, _CLEAN_SIGMA)


def make_loss(settings: LossSettings, parts: Parts) -> Loss:
    """What the options ask for, as a loss of what the network draws."""
    if settings.loss_kind is None:
        raise ValueError(f"guidance by a loss needs --loss-kind, one of {', '.join(_KINDS)}")
    if settings.loss_kind == "class":
        net = load_classifier(settings.needed("loss_classifier").path).net
        loss: Loss = ClassLogits(partial(_logits, net), settings.needed("loss_class"))
    else:
        loss = measured(settings, getattr(parts.net, "img_channels", 3) if parts.pixels is None else 3)
    if settings.loss_augment:
        loss = Augmented(loss, settings.loss_augment)
    # a classifier knows what the network draws, be it latents
    return loss if parts.pixels is None or settings.loss_kind == "class" else OnPixels(loss, parts.pixels)


def averaged(loss: Loss, how: str) -> Loss:
    """The loss over clean images near the denoised one, where `how` says so; auto: where it is known exactly."""
    if how == "auto":
        how = "exact" if isinstance(loss, Measurement) else "none"
    if how == "none":
        return loss
    if how != "exact":
        return MonteCarlo(loss, int(how))
    if not isinstance(loss, Measurement):
        raise ValueError("the average is known exactly for pixels alone, not for latents, classes or random versions")
    return Exact(loss)


def _build(parts: Parts, weight: float, **options: object) -> Denoiser:
    settings = LossSettings(**options)
    if not math.isfinite(weight):
        raise ValueError(f"the guidance weight is {weight}; expected a finite number (1 is off)")
    loss, scale = make_loss(settings, parts), weight - 1
    rule, backprop = settings.loss_rule, settings.loss_backprop == "yes"
    if rule == "auto":
        rule = "score" if isinstance(loss, Measurement) else "freedom"
    if rule == "tfg":
        tfg = Unified(
            parts.net, loss, settings.loss_rho, settings.loss_mu, settings.loss_gamma, settings.loss_iterations
        )
        return (tfg if backprop else replace(tfg, rho=0.0)).scaled(scale)
    loss = averaged(loss, settings.loss_average)
    if rule == "score":
        return LossGuided(parts.net, loss, scale, backprop)
    step = _RULES[rule]() if settings.loss_step is None else _RULES[rule](settings.loss_step)
    return Pushed(parts.net, loss, step, scale, backprop)


METHOD = Method(
    "towards what a loss of the denoised image asks for: inpainting, sharpening, a colour, a class",
    "1 main, back and forth: about 3 main",
    _build,
    around=True,
    weight=2.0,
    options=(
        Option("loss-kind", one_of(*_KINDS), None, f"what to ask for, one of {', '.join(_KINDS)}"),
        Option("loss-image", existing_file, None, "the picture seen: with holes, small (downsample) or blurred"),
        Option("loss-mask", existing_file, None, "inpaint: a picture, white where the image is known"),
        Option("loss-factor", count(2), 4, "downsample: how many times smaller the picture is"),
        Option("loss-blur", number(0.1), 2.0, "blur: its standard deviation in pixels"),
        Option("loss-colour", parse_colour, None, "colour: the mean colour R,G,B from 0 to 255"),
        Option(
            "loss-noise",
            number(1e-4),
            None,
            f"deviation of noise in what was seen, of pixels from -1 to 1; unless given, {_NOISE_STD:g} for the score, "
            "while for pushes the loss is the sum of squares",
        ),
        Option("loss-classifier", existing_file, None, "class: a classifier made by scripts/train_classifier.py"),
        Option("loss-class", count(0), None, "class: which one"),
        Option(
            "loss-rule",
            one_of("auto", "score", *_RULES, "tfg"),
            "auto",
            f"score (part of the score), or a push after each step: {', '.join(_RULES)}, tfg; auto: score where the "
            "average is known exactly, else freedom. W - 1 multiplies it (tfg's defaults suit a class; for pictures, "
            "which are steeper, take W 1.2)",
        ),
        Option("loss-step", number(), None, "the number in a push's rule; of polyak-true, the lowest loss"),
        Option("loss-backprop", one_of("yes", "no"), "yes", "no: gradient at the denoised image only, cost 1 main"),
        Option("loss-average", parse_average, "auto", "over clean images near by: none, exact, or a number of draws"),
        Option("loss-augment", count(0), 0, "random versions of each image that the loss is the mean of"),
        Option("loss-rho", number(), Unified.rho, "tfg: step along the gradient through the network"),
        Option("loss-mu", number(), Unified.mu, "tfg: step along the gradient at the denoised image"),
        Option("loss-gamma", number(0), Unified.gamma, "tfg: how far around the denoised image to look"),
        Option("loss-iterations", count(0), Unified.iterations, "tfg: steps at the denoised image"),
    ),
    formula="D - (w - 1) sigma^2 grad loss(D), or x - (w - 1) rule(grad loss(D)) after each step",
    source="arXiv 2209.14687 (DPS), 2303.09833 (FreeDoM), 2403.12404, 2409.15761 (TFG); LGD, ICML 2023",
)
