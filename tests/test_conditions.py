"""Conditions: class labels, vectors and a kind of one's own answer the same questions, and plain tensors still work."""

from dataclasses import dataclass

import pytest
import torch

from edm2kit.conditions import (
    ClassLabels,
    Condition,
    FloatVectors,
    cat_conditions,
    condition_tensor,
    null_condition,
    other_conditions,
    repeat_condition,
)
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Words:
    """A condition that is not a tensor."""

    words: tuple[str, ...]

    def __len__(self):
        return len(self.words)

    def __getitem__(self, rows):
        return Words(self.words[rows])

    def null(self):
        return Words(("",) * len(self))

    def others(self, rng, include_own=False):
        return Words(self.words[::-1])

    def cat(self, *more):
        return Words(sum((other.words for other in more), self.words))

    def repeat(self, times):
        return Words(self.words * times)

    def to(self, device):
        return self


def rng(n=3):
    return StackedGenerator("cpu", range(n))


def test_every_kind_is_a_condition():
    assert isinstance(ClassLabels.of([0], 2), Condition)
    assert isinstance(FloatVectors(torch.zeros(1, 2)), Condition)
    assert isinstance(Words(("a",)), Condition)


def test_class_labels_are_one_hot_and_null_is_zero():
    labels = ClassLabels.of([2, 0, 1], 3)
    assert torch.equal(labels.one_hot, torch.eye(3)[[2, 0, 1]])
    assert torch.equal(labels.null().one_hot, torch.zeros(3, 3))
    assert torch.equal(labels[1:].one_hot, torch.eye(3)[[0, 1]])
    with pytest.raises(ValueError, match="class indices must be from 0 to 2"):
        ClassLabels.of([3], 3)


def test_other_classes_never_are_the_own_one_and_reach_all_others():
    labels = ClassLabels.of([1] * 400, 4)
    drawn = labels.others(StackedGenerator("cpu", range(400))).one_hot.argmax(dim=1)
    assert set(drawn.tolist()) == {0, 2, 3}
    drawn = labels.others(StackedGenerator("cpu", range(400)), include_own=True).one_hot.argmax(dim=1)
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_a_single_class_has_no_other():
    assert torch.equal(ClassLabels.of([0], 1).others(rng(1)).one_hot, torch.ones(1, 1))


def test_other_vectors_come_from_the_pool():
    pool = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    drawn = FloatVectors(torch.zeros(3, 2), pool).others(rng()).values
    assert all(row in pool.tolist() for row in drawn.tolist())
    with pytest.raises(ValueError, match="need a pool"):
        FloatVectors(torch.zeros(3, 2)).others(rng())


@pytest.mark.parametrize(
    "condition", [torch.eye(3), ClassLabels(torch.eye(3)), FloatVectors(torch.eye(3), torch.eye(3))]
)
def test_functions_return_the_kind_they_were_given(condition):
    results = [
        null_condition(condition),
        other_conditions(condition, rng()),
        cat_conditions([condition, condition]),
        repeat_condition(condition, 2),
    ]
    assert {type(result) for result in results} == {type(condition)}
    assert [len(result) for result in results] == [3, 3, 6, 6]
    assert torch.equal(condition_tensor(results[0]), torch.zeros(3, 3))
    assert torch.equal(condition_tensor(results[2]), torch.cat([torch.eye(3)] * 2))
    assert torch.equal(condition_tensor(results[3]), torch.cat([torch.eye(3)] * 2))


def test_a_tensor_and_class_labels_draw_the_same_others():
    one_hot = torch.eye(5)
    assert torch.equal(other_conditions(one_hot, rng(5)), ClassLabels(one_hot).others(rng(5)).one_hot)


def test_no_condition_stays_none():
    assert cat_conditions([None, None]) is None
    assert repeat_condition(None, 3) is None
    assert condition_tensor(None) is None


def test_a_kind_of_ones_own_passes_through_and_is_refused_by_a_network_with_labels():
    words = Words(("a", "b"))
    assert null_condition(words) == Words(("", ""))
    assert cat_conditions([words, words]) == Words(("a", "b", "a", "b"))
    assert repeat_condition(words, 2) == Words(("a", "b", "a", "b"))
    with pytest.raises(ValueError, match="got a Words"):
        condition_tensor(words)


def test_mixed_kinds_are_refused():
    with pytest.raises(ValueError, match="different kinds cannot form one batch: Tensor, NoneType"):
        cat_conditions([torch.eye(2), None])
