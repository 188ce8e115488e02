"""Guidance of a network that is not EDM2's: a transformer, whose embedding and dropout cannot be changed."""

import pytest
import torch

from edm2kit.guidance import METHODS, guide
from edm2kit.models import build_network, full_architecture
from tests.support import guidance_checks
from tests.support.guidance_checks import Case, Nets

ARGUMENTS = {"kind": "dit", "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
REFUSED = {
    "tsg": "supports the edit embedding",
    "dropout": "supports the edit dropout",
}


def random_transformer(seed: int, label_dim: int = 4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_network(full_architecture(16, 3, label_dim, 0.5, ARGUMENTS), "dit").eval()
        for parameter in net.parameters():  # a new one answers the same to everything
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def nets() -> Nets:
    x = torch.randn([3, 3, 16, 16], generator=torch.Generator().manual_seed(0))
    return Nets(random_transformer(0), random_transformer(1), random_transformer(2, 0), x, torch.eye(4)[:3])


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.negative is not None and name not in REFUSED]
)
def test_methods_act_on_it_as_on_any_network(name, nets):
    options = {"sg_prev_start": 0.0} if name == "sg-prev" else {}
    case = Case(name, gnet="weak" if METHODS[name].needs_gnet else None, options=options)
    guidance_checks.check_off_at_weight_1(case, nets)
    guidance_checks.check_it_guides_inside_its_interval_only(case, nets)
    guidance_checks.check_it_costs_what_is_stated(case, nets)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_more_are_refused(name, nets):
    with pytest.raises(ValueError, match=REFUSED[name]):
        guide(Case(name).choice(2.0), Case(name).parts(nets))
