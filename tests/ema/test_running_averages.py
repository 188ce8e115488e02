"""Tracked averages: profiles as wide as their names say, buffers, saving and loading."""

import numpy as np
import pytest
import torch
from torch import nn

from edm2kit.ema.power_function import PowerFunctionEMA


class OneHotWeights(nn.Module):
    """Weights that say which update they come from, so that an average spells out its own profile."""

    def __init__(self, num_updates: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_updates, dtype=torch.float64))


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("intervals", [[8] * 400, [4, 36] * 100, [1] * 50 + [50] * 199], ids=["even", "uneven", "late"])
def test_measured_width_is_the_name(std, intervals):
    # each update stands for the images since the one before; its mass sits at the middle of that stretch
    net, nimg, centres = OneHotWeights(len(intervals)), 0, []
    ema = PowerFunctionEMA(net, [std])
    for i, count in enumerate(intervals):
        nimg += count
        centres.append((nimg - count / 2) / nimg_total(intervals))
        with torch.no_grad():
            net.weight.zero_()[i] = 1
        ema.update(nimg, count)
    profile, at = ema.averages[0].weight.numpy(), np.array(centres)
    mean = (profile * at).sum()
    widths = np.array(intervals) / nimg_total(intervals)
    measured = np.sqrt((profile * ((at - mean) ** 2 + widths**2 / 12)).sum())
    assert profile.sum() == pytest.approx(1)
    assert measured == pytest.approx(std, rel=0.01)


def nimg_total(intervals: list[int]) -> int:
    return sum(intervals)


def test_buffers_are_copied_and_state_round_trips():
    net = nn.BatchNorm1d(3)
    ema = PowerFunctionEMA(net, [0.05, 0.1])
    net.running_mean += 5
    with torch.no_grad():
        net.weight += torch.tensor([1.0, 2, 3])
    ema.update(8, 8)
    net.weight.data += 1
    ema.update(16, 8)
    assert torch.equal(ema.averages[1].running_mean, net.running_mean)
    other = PowerFunctionEMA(nn.BatchNorm1d(3), [0.05, 0.1])
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.averages[0].weight, ema.averages[0].weight)
    with pytest.raises(ValueError, match=r"0\.050"):
        PowerFunctionEMA(net, [0.05]).load_state_dict(ema.state_dict())
