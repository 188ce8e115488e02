"""Training the toy's networks by exact score matching, and their files."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ToyNet
from edm2kit.experiments.toy.tree import components
from edm2kit.models.layers import normalize_weights_
from edm2kit.torch_utils.files import atomic_write, code_commit
from edm2kit.torch_utils.rng import derive_seed
from edm2kit.torch_utils.safetensors_files import damaged_part, safetensors_bytes
from edm2kit.training.learning_rate import learning_rate

BATCH_SIZE = 4096
P_MEAN, P_STD = -2.3, 1.5
REF_LR, REF_BATCHES = 0.01, 512
EMA_STD = 0.010
_MAX_GAIN = -1e-3  # at 0 no weight would have a gradient
_TRAIN_AGAIN = "Delete it to train it again, or use another --outdir"


@dataclass(frozen=True)
class Recipe:
    """Data, size and training length of one network."""

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
    """Train a network and return its average (EMA std 0.010).

    `on_iteration(i, loss)` is called after each iteration. With `compiled`, torch.compile speeds up the exact score
    and the loss (see `can_compile`). The result depends on `recipe` and `seed` alone, up to rounding also on
    `compiled`.
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
    average = ema.averages[0]
    assert isinstance(average, ToyNet)
    return average


@torch.no_grad()
def keep_a_density_(net: ToyNet) -> None:
    """Keep the gain below 0, in place. It starts at 0; without a bound, chance decides its sign for good.

    This is not in the paper. With a positive gain, log p grows without bound far away: it is not a density, and samples
    that start far out escape. And if main network and guide have different signs, their errors differ in kind, and
    autoguidance loses more samples than it corrects.
    """
    net.gain.clamp_(max=_MAX_GAIN)


def noisy_batch(truth: Mixture, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """BATCH_SIZE new noisy points x [N,2] and their noise levels [N]."""
    clean = truth.sample(BATCH_SIZE, generator)
    sigma = (torch.randn(BATCH_SIZE, generator=generator) * P_STD + P_MEAN).exp()
    return clean + torch.randn(clean.shape, generator=generator) * sigma[:, None], sigma


def score_matching_loss(net: ToyNet, x: torch.Tensor, sigma: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Mean over the points of sigma^2 |score of the network - exact score|^2."""
    return (sigma[:, None] ** 2 * (net.score(x, sigma) - score) ** 2).sum(1).mean()


def network_path(outdir: Path, role: str, seed: int) -> Path:
    """File of the network for `role`, a key of RECIPES, trained from `seed`."""
    return outdir / f"{role}-seed{seed}.safetensors"


def save_network(path: Path, net: ToyNet, recipe: Recipe, seed: int) -> None:
    """Write the weights, with recipe, seed and commit in the file's metadata."""
    notes = {key: str(value) for key, value in {**asdict(recipe), "seed": seed, "commit": code_commit()}.items()}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(net.state_dict(), notes))


def load_network(outdir: Path, role: str, seed: int) -> ToyNet:
    """The network trained for `role` from `seed`.

    Raises ValueError if the file is missing or damaged, or was made from another recipe or seed.
    """
    path, recipe = network_path(outdir, role, seed), RECIPES[role]
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Run `toy_example.py train --outdir {outdir}` first")
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
    """Metadata and weights of a file."""
    try:
        with safe_open(path, "pt") as file:
            notes, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete network file ({error}). {_TRAIN_AGAIN}") from error
    if part := damaged_part(state, notes):
        raise ValueError(f"{path} is damaged: its {part} do not match their checksums. {_TRAIN_AGAIN}")
    return notes, state
