"""What a loss is: a function of denoised images; and losses made of a classifier, or of decoded pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edm2kit.denoiser import Wrapper

# Denoised images [N, C, H, W] -> losses [N]; the loss of an image depends on that image alone. A loss may follow the
# sampling run by `for_images` and `for_step`, as denoisers do, and the noise level by `at(sigma) -> Loss`.
Loss = Callable[[torch.Tensor], torch.Tensor]


def loss_at(loss: Loss, sigma: torch.Tensor) -> Loss:
    """`loss.at(sigma)` for a loss that depends on the noise level, otherwise the loss itself."""
    at = getattr(loss, "at", None)
    return loss if at is None else at(sigma)


@dataclass(frozen=True)
class ClassLogits:
    """-log p(target | image) by `classifier`, images -> logits [N, K]; `target` is a class or int64 [N]."""

    classifier: Callable[[torch.Tensor], torch.Tensor]
    target: int | torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        log_p = self.classifier(images).log_softmax(dim=1)
        target = torch.as_tensor(self.target, device=log_p.device).expand(len(log_p))
        return -log_p.gather(1, target[:, None])[:, 0]


@dataclass(frozen=True)
class OnPixels(Wrapper):
    """`loss` of decoded latents; `decode` is differentiable and returns pixels in [-1, 1]."""

    loss: Loss
    decode: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return self.loss(self.decode(latents))
