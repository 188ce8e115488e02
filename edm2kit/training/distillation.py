"""The loss of guidance distillation: one network learns the answer of a guided denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edm2kit.denoiser import Denoiser, for_images, for_step
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.loss import LossTerms


@dataclass(frozen=True)
class DistillationLoss:
    """lambda * (D_student(x) - D_teacher(x))^2 on noisy training images, sigma and lambda as in `EDM2Loss`.

    `teacher` is any denoiser. If it follows a sampling run (interval, schedule, random numbers), it answers as in the
    step of `sigmas` (decreasing to 0) that contains the image's noise level, with random numbers that belong to the
    image. This is the first stage of guided distillation (Meng et al. 2023, arXiv 2210.03142), for a single guidance
    weight.
    """

    teacher: Denoiser
    sigmas: torch.Tensor
    P_mean: float = -0.4
    P_std: float = 1.0
    sigma_data: float = 0.5

    def terms(
        self, net: Callable[..., Any], images: torch.Tensor, labels: torch.Tensor | None, rng: StackedGenerator
    ) -> LossTerms:
        """The loss and the noise level of each image; arguments as `EDM2Loss.__call__`."""
        sigma = (rng.randn([len(images), 1, 1, 1]) * self.P_std + self.P_mean).exp()
        x = images + sigma * rng.randn_like(images)
        seeds = rng.randint(1 << 32, size=[len(images)]).tolist()
        wanted = self.answers(x, sigma.flatten(), labels, seeds)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoised, logvar = net(x, sigma.flatten(), labels, return_logvar=True)
        # the uncertainty head is for real images: it takes part, as DDP requires, but does not learn
        return LossTerms(weight * (denoised - wanted) ** 2 + 0 * logvar, sigma.flatten().detach())

    @torch.no_grad()
    def answers(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None, seeds: list[int]
    ) -> torch.Tensor:
        """The teacher's answer for each image; images for which it behaves alike are evaluated as one batch."""
        steps = self.steps_of(sigma)
        groups: list[tuple[Denoiser, list[int]]] = []
        for i in sorted(set(steps)):
            rows = [k for k, step in enumerate(steps) if step == i]
            own = StackedGenerator(x.device, [seeds[k] for k in rows])
            teacher = for_step(for_images(self.teacher, own), i, self.sigmas)
            like = next((members for known, members in groups if known == teacher), None)
            if like is None:
                groups.append((teacher, rows))
            else:
                like.extend(rows)
        wanted = torch.empty_like(x)
        for teacher, members in groups:
            rows = sorted(members)
            wanted[rows] = teacher(x[rows], sigma[rows], None if labels is None else labels[rows])
        return wanted

    def steps_of(self, sigma: torch.Tensor) -> list[int]:
        """The step i with sigmas[i + 1] < sigma <= sigmas[i] for each noise level; the first step if above all."""
        levels = self.sigmas[1:-1].to(sigma)
        return (sigma[:, None] <= levels).sum(dim=1).tolist()
