"""The coordinates that most guidance papers compute in: a variance-preserving x and the noise predicted in it."""

import torch

# (sigma, sigma_next) of five steps, from the first of a run to one of the last
STEPS = [(80.0, 67.0), (20.0, 8.0), (3.0, 1.5), (0.7, 0.4), (0.1, 0.05)]


def alpha_bar(sigma):
    """The share of data in a variance-preserving x whose signal-to-noise ratio is that of noise level sigma."""
    return 1 / (1 + torch.as_tensor(sigma, dtype=torch.float64) ** 2)


def to_vp(x, sigma):
    """x = y + sigma n in variance-preserving form: sqrt(a) y + sqrt(1 - a) n."""
    return x * alpha_bar(sigma).sqrt()


def from_vp(x, sigma):
    return x / alpha_bar(sigma).sqrt()


def predicted_noise(denoiser, x_vp, sigma, *condition, **edits):
    """What a network of these papers returns: the noise in a variance-preserving x."""
    x = from_vp(x_vp, sigma)
    D = denoiser(x, torch.as_tensor(sigma, dtype=torch.float64), *condition, **edits)
    return (x - D) / sigma


def predicted_image(x_vp, noise, sigma):
    a = alpha_bar(sigma)
    return (x_vp - (1 - a).sqrt() * noise) / a.sqrt()


def ddim(x_vp, noise, sigma, sigma_next):
    """A deterministic DDIM step: Song et al. 2020, Eq. 12 with eta 0."""
    a = alpha_bar(sigma_next)
    return a.sqrt() * predicted_image(x_vp, noise, sigma) + (1 - a).sqrt() * noise


def assert_same_displacement(ours, theirs_vp, x, sigma_next):
    """Both steps start at `x`; `ours` and `theirs_vp` are where they end, the latter in variance-preserving form."""
    theirs = from_vp(theirs_vp, sigma_next) - x
    size = theirs.abs().max()
    torch.testing.assert_close((ours - x) / size, theirs / size, atol=1e-6, rtol=0)


def residual_norm_slope(denoiser, residual, x_vp, sigma):
    """(noise, gradient) in a variance-preserving x: the predicted noise, and the gradient of ||residual(D)|| by x."""
    leaf = x_vp.detach().requires_grad_()
    with torch.enable_grad():
        noise = predicted_noise(denoiser, leaf, sigma)
        difference = residual(predicted_image(leaf, noise, sigma))
        norm = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        gradient = torch.autograd.grad(norm.sum(), leaf)[0]
    return noise.detach(), gradient
