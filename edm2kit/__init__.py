"""EDM2 diffusion models and autoguidance: train, average after training, guide, sample and score.

The names below are the public interface; each is imported when it is first used, so `import edm2kit` is quick.

Example:

    import edm2kit

    main = edm2kit.load_snapshot("main.safetensors").net
    weak = edm2kit.load_snapshot("guide.safetensors").net
    guided = edm2kit.Guided(main, weak, weight=2.0)
    noise = edm2kit.StackedGenerator("cpu", range(4)).randn([4, 3, 64, 64])
    images = edm2kit.edm_sampler(guided, noise, num_steps=32)
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edm2kit.conditions import ClassLabels, Condition, FloatVectors
    from edm2kit.data.dataset import ImageDataset, Source, open_source
    from edm2kit.denoiser import Denoiser, Wrapper
    from edm2kit.ema.any_training import PowerEMA
    from edm2kit.ema.power_function import (
        PowerFunctionEMA,
        exp_to_std,
        power_function_beta,
        solve_posthoc_coefficients,
        std_to_exp,
    )
    from edm2kit.experiments.tune.sweep import sweep
    from edm2kit.guidance.base import Parts
    from edm2kit.guidance.combine import Guided
    from edm2kit.guidance.interval import GuidanceInterval
    from edm2kit.guidance.registry import Choice, guide
    from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
    from edm2kit.metrics.detectors.inception import InceptionV3
    from edm2kit.metrics.detectors.registry import load_detector
    from edm2kit.metrics.frechet import frechet_distance
    from edm2kit.metrics.scoring import measure_reference, score_images
    from edm2kit.models.edm2 import Precond
    from edm2kit.models.layers import normalize_weights_
    from edm2kit.sampling.engine import Engine
    from edm2kit.sampling.noise_levels import karras_sigmas
    from edm2kit.sampling.solvers import Sampler, edm_sampler, euler, heun
    from edm2kit.snapshots.file_format import read_header, save_snapshot
    from edm2kit.snapshots.loading import load_snapshot
    from edm2kit.torch_utils.rng import StackedGenerator
    from edm2kit.training.learning_rate import learning_rate
    from edm2kit.training.loss import EDM2Loss

# public name -> the module it lives in
_HOMES = {
    "ClassLabels": "conditions",
    "Condition": "conditions",
    "FloatVectors": "conditions",
    "ImageDataset": "data.dataset",
    "Source": "data.dataset",
    "open_source": "data.dataset",
    "Denoiser": "denoiser",
    "Wrapper": "denoiser",
    "PowerEMA": "ema.any_training",
    "PowerFunctionEMA": "ema.power_function",
    "exp_to_std": "ema.power_function",
    "power_function_beta": "ema.power_function",
    "solve_posthoc_coefficients": "ema.power_function",
    "std_to_exp": "ema.power_function",
    "sweep": "experiments.tune.sweep",
    "Choice": "guidance.registry",
    "GuidanceInterval": "guidance.interval",
    "Guided": "guidance.combine",
    "Parts": "guidance.base",
    "guide": "guidance.registry",
    "DINOv2ViT": "metrics.detectors.dinov2",
    "InceptionV3": "metrics.detectors.inception",
    "frechet_distance": "metrics.frechet",
    "load_detector": "metrics.detectors.registry",
    "measure_reference": "metrics.scoring",
    "score_images": "metrics.scoring",
    "Precond": "models.edm2",
    "normalize_weights_": "models.layers",
    "Engine": "sampling.engine",
    "Sampler": "sampling.solvers",
    "edm_sampler": "sampling.solvers",
    "euler": "sampling.solvers",
    "heun": "sampling.solvers",
    "karras_sigmas": "sampling.noise_levels",
    "load_snapshot": "snapshots.loading",
    "read_header": "snapshots.file_format",
    "save_snapshot": "snapshots.file_format",
    "StackedGenerator": "torch_utils.rng",
    "EDM2Loss": "training.loss",
    "learning_rate": "training.learning_rate",
}

# names of the previous release that are only useful with others of their module -> that module
_RETIRED = {"Option": "guidance.base"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _RETIRED:
        home = f"edm2kit.{_RETIRED[name]}"
        warnings.warn(
            f"edm2kit.{name} is now {home}.{name}; the next release drops the old name",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), name)
    if name not in _HOMES:
        raise AttributeError(f"module 'edm2kit' has no attribute {name!r}")
    value = getattr(import_module(f"edm2kit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
