"""Training the toy's networks by exact score matching, and keeping them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edm2kit.ema.tracking import PowerFunctionEMA
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ToyNet
from edm2kit.experiments.toy.tree import components
from edm2kit.models.layers import normalize_weights_
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.provenance import code_commit
from edm2kit.torch_utils.rng import derive_seed
from edm2kit.training.learning_rate import learning_rate

BATCH_SIZE = 4096
P_MEAN, P_STD = -2.3, 1.5
REF_LR, REF_BATCHES = 0.01, 512
EMA_STD = 0.010
_MAX_GAIN = -1e-3  # not 0, where no weight would have a gradient
_TRAIN_AGAIN = "Delete it to have it trained again, or give another --outdir"


@dataclass(frozen=True)
class Recipe:
    """What one network is trained on, how large it is and for how long."""

    classes: str
    width: int
    iterations: int


# Karras et al. 2024, Appendix C: D1, the guide D0 of autoguidance, the unconditional guide of CFG
RECIPES = {
    "main": Recipe(classes="A", width=64, iterations=4096),
    "guide": Recipe(classes="A", width=32, iterations=512),
    "both": Recipe(classes="AB", width=32, iterations=512),
}


def train(
    recipe: Recipe, seed: int, compiled: bool, on_iteration: Callable[[int, float], None] | None = None
) -> ToyNet:
    """The averaged network (EMA std 0.010) that `recipe` leads to from `seed`.

    `on_iteration(i, loss)` is called after each one. Weights and data depend on the seed and the recipe alone, up to
    rounding also on `compiled`: whether torch.compile speeds up the exact score and the loss (see `can_compile`).
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy", *asdict(recipe).values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        net = ToyNet(recipe.width)
    truth = Mixture(components(recipe.classes), compiled)
    loss_of = torch.compile(score_matching_loss, dynamic=False) if compiled else score_matching_loss
    optimizer = torch.optim.Adam(net.parameters(), lr=REF_LR, betas=(0.9, 0.99))
    ema = PowerFunctionEMA(net, [EMA_STD])
    for i in range(recipe.iterations):
        normalize_weights_(net)
        x, sigma = noisy_batch(truth, generator)
        loss = loss_of(net, x, sigma, truth.score(x, sigma))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(i * BATCH_SIZE, BATCH_SIZE, REF_LR, REF_BATCHES, 0)
        optimizer.step()
        keep_a_density_(net)
        ema.update((i + 1) * BATCH_SIZE, BATCH_SIZE)
        if on_iteration is not None:
            on_iteration(i, loss.item())
    return ema.averages[0]


@torch.no_grad()
def keep_a_density_(net: ToyNet) -> None:
    """Bound the gain, in place, to below 0; it starts at 0, and left alone goes either way by chance, for good.

    The paper does not say this. With a positive gain log p grows without bound far away: no density, and samples that
    start far out escape. A main network and a guide of different signs also err in different ways, and autoguidance
    then throws out more samples than it brings back.
    """
    net.gain.clamp_(max=_MAX_GAIN)


def noisy_batch(truth: Mixture, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """BATCH_SIZE fresh points x [N,2] and their noise levels [N]."""
    clean = truth.sample(BATCH_SIZE, generator)
    sigma = (torch.randn(BATCH_SIZE, generator=generator) * P_STD + P_MEAN).exp()
    return clean + torch.randn(clean.shape, generator=generator) * sigma[:, None], sigma


def score_matching_loss(net: ToyNet, x: torch.Tensor, sigma: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """sigma^2 |score of the net - exact score|^2, a mean over the points."""
    return (sigma[:, None] ** 2 * (net.score(x, sigma) - score) ** 2).sum(1).mean()


def network_path(outdir: Path, role: str, seed: int) -> Path:
    """Where the network for `role`, a key of RECIPES, trained from `seed` is kept."""
    return outdir / f"{role}-seed{seed}.safetensors"


def save_network(path: Path, net: ToyNet, recipe: Recipe, seed: int) -> None:
    """Write the weights with what they were made from."""
    notes = {key: str(value) for key, value in {**asdict(recipe), "seed": seed, "commit": code_commit()}.items()}
    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, notes))


def load_network(outdir: Path, role: str, seed: int) -> ToyNet:
    """The network trained for `role` from `seed`.

    Raises ValueError where there is none, where the file is damaged, and where it is of another recipe or seed.
    """
    path, recipe = network_path(outdir, role, seed), RECIPES[role]
    if not path.is_file():
        raise ValueError(f"{path}: no such network; train it with `toy_example.py train --outdir {outdir}` first")
    notes, state = _read(path)
    expected = {key: str(value) for key, value in {**asdict(recipe), "seed": seed}.items()}
    found = {key: notes.get(key) for key in expected}
    if found != expected:
        raise ValueError(f"{path} was trained as {found}; expected {expected}. {_TRAIN_AGAIN}")
    net = ToyNet(recipe.width)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the weights of a network of width {recipe.width}. {_TRAIN_AGAIN}"
        ) from error
    return net.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The notes and the weights in a file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole network file ({error}). {_TRAIN_AGAIN}") from error
