"""Guide and sample a model that is not from this project: what predicts noise, v or a score becomes a denoiser.

    python examples/any_denoiser.py

The "model" predicts noise in the usual variance-preserving form, eps(x_t, alpha_bar). It is the exact answer for two
points at +1 and -1, so that the result is known: samples lie at the points, and truncation keeps them there.
"""

import torch

import edm2kit


def noise_prediction(x_t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """What a variance-preserving model returns: the noise in x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_0 = torch.tanh(x_t * signal / noise**2)  # the mean of +1 and -1, weighted by how likely each is
    return (x_t - signal * x_0) / noise


def denoiser(x: torch.Tensor, sigma: torch.Tensor, condition: object = None) -> torch.Tensor:
    """The same model as (x, sigma) -> D. Here x = x_t / sqrt(alpha_bar), alpha_bar = 1 / (1 + sigma^2)."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    alpha_bar = 1 / (1 + sigma**2)
    return x - sigma * noise_prediction(x * alpha_bar.sqrt(), alpha_bar)


def main() -> None:
    noise = edm2kit.StackedGenerator("cpu", range(1000)).randn([1000, 1, 1, 1])
    guided = edm2kit.guide(edm2kit.Choice("truncation", weight=1.2), edm2kit.Parts(denoiser))
    for name, used in {"model": denoiser, "guided": guided}.items():
        samples = edm2kit.edm_sampler(used, noise, num_steps=18)
        print(f"{name}: mean |x| {samples.abs().mean():.3f}, share above 0 {(samples > 0).float().mean():.2f}")


if __name__ == "__main__":
    main()
