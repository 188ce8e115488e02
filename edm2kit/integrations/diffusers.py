"""Two-network autoguidance inside diffusers: a guider for modular pipelines, and a context for plain ones.

Nothing of a pipeline is replaced for good: the weaker model answers some calls of the main one, which then gets its own
function back.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.interval import guided_steps
from edm2kit.guidance.rules import RULES
from edm2kit.models.adapters import DiscreteVP, Flow, Schedule, to_D
from edm2kit.models.diffusers_pipeline import diffusers_package, schedule_of
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class PredictionRule:
    """Our rules and intervals for what models of diffusers predict: noise, v, velocity or x0.

    - `weight`: 1 is off. `interval`: noise levels (lo, hi], moved to the nearest levels of the run, outside which the
      main model runs alone.
    - `rule`: a key of RULES, with `rule_options` by keyword. Every rule but "linear", and intervals, need `scheduler`,
      the pipeline's own: it says what the models predict, and at which noise level.

    Raises ValueError if the scheduler is missing or not known, and for an unknown rule.
    """

    weight: float
    interval: tuple[float, float] | None = None
    rule: str = "linear"
    rule_options: Mapping[str, Any] | None = None
    scheduler: Any = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown guidance rule {self.rule!r}; available: {', '.join(RULES)}")
        if self.scheduler is None and (self.rule != "linear" or self.interval is not None):
            raise ValueError("a rule or an interval needs the pipeline's scheduler: scheduler=pipe.scheduler")
        if self.scheduler is not None:
            schedule_of(self.scheduler)

    def made(self) -> Any:
        """The rule itself, with its options."""
        if self.rule == "linear":
            return linear
        options = {option.keyword: option.default for option in RULES[self.rule].options}
        return RULES[self.rule].make(**{**options, **(self.rule_options or {})})

    def is_active(self, t: torch.Tensor | float) -> bool:
        """Whether anything is guided at a timestep of the scheduler."""
        if self.weight == 1:
            return False
        if self.interval is None:
            return True
        steps = guided_steps(self._levels, *self.interval)
        now = float(torch.as_tensor(t).flatten()[0])
        times = self.scheduler.timesteps.double().cpu().unique().flip(0)
        return int((times - now).abs().argmin()) in steps

    @property
    def _levels(self) -> torch.Tensor:
        """The noise levels of the pipeline's present run, float64, falling, with the final 0."""
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            raise ValueError("the scheduler has no run under way; give the pipeline's own: scheduler=pipe.scheduler")
        times = self.scheduler.timesteps.double().cpu().unique().flip(0)
        levels = sigma_of(schedule_of(self.scheduler)[0], times)
        return torch.cat([levels, levels.new_zeros(1)])

    def combine(
        self,
        rule: Any,
        main: torch.Tensor,
        negatives: Mapping[str, tuple[torch.Tensor, float]],
        x_t: torch.Tensor | None,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """The guided prediction, in the dtype of `main`; `negatives` are predictions with their weights.

        Predictions differ from D by a factor and by what all of them share, so the linear rule does not need t. A
        learned variance, the second half of the channels, stays that of the main model.
        """
        weights = [weight for _, weight in negatives.values()]
        if rule is linear:
            at = Evaluation(main, t)
            predictions = [prediction.float() for prediction, _ in negatives.values()]
            guided = linear(main.float(), predictions, weights, at)
            if x_t is not None and main.shape[1] == 2 * x_t.shape[1]:
                guided = torch.cat([guided[:, : x_t.shape[1]], main[:, x_t.shape[1] :].float()], dim=1)
            return guided.to(main.dtype)
        assert x_t is not None
        schedule, prediction = schedule_of(self.scheduler)
        sigma = sigma_of(schedule, t.double().cpu().flatten()[:1]).to(main.device, torch.float32)
        a, s, _ = (value.reshape(-1, *[1] * (x_t.ndim - 1)) for value in schedule.at(sigma))
        channels = x_t.shape[1]
        x = x_t.float() / a
        column = sigma.reshape(a.shape)
        D, *others = (to_D(prediction, p.float(), x, column, a, s) for p in (main, *(p for p, _ in negatives.values())))
        guided = rule(D, others, weights, Evaluation(x, sigma))
        back = {
            "epsilon": lambda: (x - guided) / column,
            "v": lambda: (a * (a * x) - guided) / s,
            "flow": lambda: (a * x - guided) / s,
            "x0": lambda: guided,
        }[prediction]()
        return torch.cat([back, main[:, channels:].float()], dim=1).to(main.dtype)


def sigma_of(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    """Noise levels, float64, of timesteps [N] of a scheduler, float64."""
    if isinstance(schedule, Flow):
        u = t / schedule.time_scale
        return u / (1 - u).clamp_min(1e-8)
    assert isinstance(schedule, DiscreteVP)
    logs = schedule.sigmas.log()
    low = t.floor().long().clamp(0, len(logs) - 2)
    return logs[low].lerp(logs[low + 1], t - low).exp()


def _input_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> torch.Tensor:
    for name in ("sample", "hidden_states"):
        if name in keywords:
            return keywords[name]
    return arguments[0]


def _same_kind(model: Any, guide: Any) -> None:
    names = ("in_channels", "out_channels", "patch_size")
    for name in names:
        ours, theirs = model.config.get(name), guide.config.get(name)
        if ours != theirs:
            raise ValueError(f"the guide does not fit the model: its {name} is {theirs}, that of the model {ours}")
    if type(model) is not type(guide):
        raise ValueError(
            f"the guide is a {type(guide).__name__}, the model a {type(model).__name__}; inside a pipeline both are "
            "called in the same way, so they must be of one class. generate.py --gnet takes any two"
        )


@contextlib.contextmanager
def autoguided(
    pipe: Any,
    guide: Any,
    weight: float = 2.0,
    *,
    interval: tuple[float, float] | None = None,
    rule: str = "linear",
    rule_options: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """Inside, the model of any pipeline of diffusers is guided by `guide`, a weaker model of the same class.

    Each prediction p becomes p_guide + weight (p - p_guide), or what `rule` makes of it, at noise levels in `interval`.
    The guide gets the same arguments, the prompt included. Classifier-free guidance of the pipeline comes on top; turn
    it off (guidance_scale=1) for autoguidance alone. Raises ValueError if the models do not fit. Karras et al. 2024.

    Example: `with autoguided(pipe, weaker_unet, 2.0): image = pipe(prompt, guidance_scale=1).images[0]`.
    """
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if model is None:
        raise ValueError(f"a {type(pipe).__name__} has neither a unet nor a transformer")
    _same_kind(model, guide)
    settings = PredictionRule(weight, interval, rule, rule_options, pipe.scheduler)
    combine = for_images(settings.made(), StackedGenerator("cpu", [0]))
    plain, had_own = model.forward, "forward" in vars(model)
    scale = _time_scale(model)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        found = plain(*arguments, **keywords)
        main = found[0]
        x_t, t = _input_of(arguments, keywords), _time_of(arguments, keywords) * scale
        if not settings.is_active(t):
            return found
        negative = guide(*arguments, **keywords)[0]
        guided = settings.combine(combine, main, {"guide": (negative, weight)}, x_t, t)
        if isinstance(found, tuple):
            return (guided, *found[1:])
        return type(found)(guided)

    model.forward = forward
    try:
        yield pipe
    finally:
        if had_own:
            model.forward = plain
        else:
            del model.forward


def _time_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> torch.Tensor:
    if "timestep" in keywords:
        return torch.as_tensor(keywords["timestep"])
    return torch.as_tensor(arguments[1])


def _time_scale(model: Any) -> float:
    """Flux is given the timestep divided by 1000."""
    return 1000.0 if type(model).__name__ == "FluxTransformer2DModel" else 1.0


@functools.cache
def _guider_class() -> Callable[..., Any]:
    diffusers_package()
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

    class AutoguidanceGuider(BaseGuidance):
        """A guider of diffusers' modular pipelines that holds a second, weaker model.

        The guide predicts with the prompt kept. With `share` below 1 it is combined with classifier-free guidance: the
        main model without its prompt takes the rest (Karras et al. 2024, App. B.2).

        - `guide`: a model of the same class as the pipeline's; it is not part of the guider's configuration.
        - `weight`: 1 is off. `share`: 1 is autoguidance only, 0 classifier-free guidance only.
        - `interval`, `rule`, `rule_options`, `scheduler`: as for `PredictionRule`.
        - `start`, `stop`: the part of the steps that is guided, as in other guiders.

        Example: `pipe.update_components(guider=AutoguidanceGuider(weaker_unet, 2.0))`.
        """

        _input_predictions: Any = ["pred_main", "pred_guide", "pred_uncond"]

        def __init__(
            self,
            guide: Any,
            weight: float = 2.0,
            share: float = 1.0,
            *,
            interval: tuple[float, float] | None = None,
            rule: str = "linear",
            rule_options: Mapping[str, Any] | None = None,
            scheduler: Any = None,
            start: float = 0.0,
            stop: float = 1.0,
            enabled: bool = True,
        ):
            super().__init__(start, stop, enabled)
            if not 0 <= share <= 1:
                raise ValueError(f"share is {share:g}; expected a number from 0 to 1")
            self.guide, self.weight, self.share = guide, weight, share
            self.settings = PredictionRule(weight, interval, rule, rule_options, scheduler)
            self._rule = self.settings.made()
            self._plain: tuple[Any, bool] | None = None
            self._x_t: torch.Tensor | None = None
            self._hook: Any = None

        def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
            super().set_state(step, num_inference_steps, timestep)
            if step == 0:
                self._rule = for_images(self.settings.made(), StackedGenerator("cpu", [0]))

        @property
        def _predictions(self) -> list[str]:
            """Which predictions the present step takes, in their order."""
            if not self._enabled or self._timestep is None:
                return ["pred_main"]
            first, last = (int(part * self._num_inference_steps) for part in (self._start, self._stop))
            if not first <= self._step < last or not self.settings.is_active(self._timestep):
                return ["pred_main"]
            found = ["pred_main"]
            if self.share > 0:
                found.append("pred_guide")
            if self.share < 1:
                found.append("pred_uncond")
            return found

        @property
        def num_conditions(self) -> int:
            return len(self._predictions)

        @property
        def is_conditional(self) -> bool:
            return self._predictions[max(self._count_prepared - 1, 0)] != "pred_uncond"

        def prepare_models(self, denoiser: Any) -> None:
            self._count_prepared += 1
            if self._count_prepared == 1:
                self._hook = denoiser.register_forward_pre_hook(self._note, with_kwargs=True)
            if self._predictions[self._count_prepared - 1] == "pred_guide":
                _same_kind(denoiser, self.guide)
                self._plain = denoiser.forward, "forward" in vars(denoiser)
                denoiser.forward = self.guide.forward

        def cleanup_models(self, denoiser: Any) -> None:
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            if self._plain is not None:
                plain, had_own = self._plain
                self._plain = None
                if had_own:
                    denoiser.forward = plain
                else:
                    del denoiser.forward

        def _note(self, module: Any, arguments: Any, keywords: Any) -> None:
            self._x_t = _input_of(arguments, keywords)

        def prepare_inputs(self, data: Any) -> list[Any]:
            return [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in self._predictions]

        def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
            batches = []
            for name in self._predictions:
                which = int(name == "pred_uncond")
                batches.append(self._prepare_batch_from_block_state(input_fields, data, which, name))
            return batches

        def forward(
            self,
            pred_main: torch.Tensor,
            pred_guide: torch.Tensor | None = None,
            pred_uncond: torch.Tensor | None = None,
        ) -> Any:
            negatives = {}
            for name, prediction, share in (("guide", pred_guide, self.share), ("uncond", pred_uncond, 1 - self.share)):
                if prediction is not None:
                    negatives[name] = prediction, 1 + share * (self.weight - 1)
            pred = pred_main
            if negatives:
                rule = self._rule
                if rule is not linear:
                    rule = for_step(rule, self._step, torch.zeros(self._num_inference_steps + 1))
                assert self._timestep is not None
                t = torch.as_tensor(self._timestep)
                pred = self.settings.combine(rule, pred_main, negatives, self._x_t, t)
            return GuiderOutput(pred=pred, pred_cond=pred_main, pred_uncond=pred_uncond)

    return AutoguidanceGuider


def __getattr__(name: str) -> Any:
    if name == "AutoguidanceGuider":
        return _guider_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
