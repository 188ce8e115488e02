import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.network_call import NetworkCall
from edm2kit.guidance.own_network.s2 import RandomSkips
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden

ARRAYS = golden.load("network_cond.npz")
X, LABELS = ARRAYS["x"], ARRAYS["labels"]
SIGMAS = torch.tensor([5.0, 1.0, 0.0])


@pytest.fixture(scope="module")
def net():
    return golden.network("cond", golden.part(ARRAYS, "state/")).requires_grad_(False)


def test_random_blocks_differ_by_image_and_step_and_their_number_is_exact():
    names = tuple(f"block{k}" for k in range(20))
    change = for_images(RandomSkips(names, 0.1), StackedGenerator("cpu", range(50)))
    seen = []
    for i in range(2):
        call = for_step(change, i, SIGMAS)(NetworkCall(torch.zeros(50, 1, 1, 1), torch.tensor(1.0), None))
        skipped = torch.stack([call.edits["skip"][name] for name in names], dim=1)
        assert (skipped.sum(dim=1) == 2).all()
        seen.append(skipped)
    assert (seen[0] != seen[1]).any()
    assert seen[0].any(dim=0).all()
    assert len(torch.unique(seen[0], dim=0)) > 20


def test_to_skip_all_is_slg_of_all(net):
    names = tuple(net.attention_roles)
    D = []
    for name, options in (("s2", {"s2_share": 1.0}), ("slg", {"slg_blocks": names})):
        guided = for_images(
            guide(Choice(name, 0.0, options=options), Parts(net)), StackedGenerator("cpu", range(len(X)))
        )
        D.append(for_step(guided, 0, SIGMAS)(X, torch.tensor(1.0), LABELS))
    assert torch.equal(*D)


def test_no_blocks_to_draw_from_is_refused(net):
    with pytest.raises(ValueError, match="none were given"):
        guide(Choice("s2", 2.0, options={"s2_blocks": ()}), Parts(net))
