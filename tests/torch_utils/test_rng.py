"""Random numbers belong to an image: not to the batch it is in, nor to what is drawn beside it."""

import pytest
import torch

from edm2kit.torch_utils.rng import StackedGenerator, derive_seed


def test_derived_seeds_are_pinned():
    # a change of these would change every training run and break every resumed one
    assert derive_seed(0) == 3581690635855307741
    assert derive_seed(0, "image", 1234) == 8570045656515686450
    assert derive_seed("0") == 5199204929721980132


def test_derived_seeds_tell_their_parts_apart():
    parts = [(1, 23), (12, 3), ("1", 23), (1, "23"), (1, 2, 3), ("1\x1f23",), (123,), ()]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert all(0 <= derive_seed(*part) < 1 << 63 for part in parts)


DRAWS = {
    "randn": lambda rng, n: rng.randn([n, 3, 4]),
    "randn float64": lambda rng, n: rng.randn([n, 3], dtype=torch.float64),
    "rand": lambda rng, n: rng.rand([n, 5]),
    "randint": lambda rng, n: rng.randint(1000, size=[n]),
    "randint from": lambda rng, n: rng.randint(-5, 5, size=[n, 2]),
    "randn_like": lambda rng, n: rng.randn_like(torch.zeros(n, 2, dtype=torch.float16)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_do_not_depend_on_the_batch(draw):
    together = DRAWS[draw](StackedGenerator("cpu", [7, 8, 9]), 3)
    alone = [DRAWS[draw](StackedGenerator("cpu", [seed]), 1)[0] for seed in (7, 8, 9)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], together[1])


def test_rows_are_those_of_a_plain_generator_in_order():
    plain, stacked = torch.Generator().manual_seed(5), StackedGenerator("cpu", [5, 6])
    assert torch.equal(stacked.randn([2, 4])[0], torch.randn(4, generator=plain))
    assert stacked.randint(10, size=[2])[0] == torch.randint(10, [], generator=plain)
    assert torch.equal(stacked.randn([2, 4])[0], torch.randn(4, generator=plain))


def test_seeds_repeat_beyond_32_bits_as_published():
    rng = StackedGenerator("cpu", [3, 3 + (1 << 32), -1, (1 << 32) - 1]).randn([4, 2])
    assert torch.equal(rng[0], rng[1])
    assert torch.equal(rng[2], rng[3])


def test_shapes_and_dtypes():
    rng = StackedGenerator("cpu", [1, 2])
    assert rng.randn_like(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert rng.randint(3, size=[2]).dtype == torch.int64
    assert rng.randint(-5, -2, size=[2, 500]).unique().tolist() == [-5, -4, -3]
    assert 0 <= rng.rand([2, 500]).min() < rng.rand([2, 500]).max() < 1
    empty = StackedGenerator("cpu", [])
    assert (empty.randn([0, 3]).shape, empty.rand([0]).shape, empty.randint(5, size=[0, 2]).shape) == (
        (0, 3),
        (0,),
        (0, 2),
    )


@pytest.mark.parametrize("size", [[3, 4], [1], []])
def test_a_batch_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="has 2 generators"):
        StackedGenerator("cpu", [1, 2]).randn(size)


def test_global_randomness_is_left_alone():
    state = torch.get_rng_state()
    StackedGenerator("cpu", [1]).randn([1, 3])
    assert torch.equal(torch.get_rng_state(), state)
