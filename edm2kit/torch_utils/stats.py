"""Running means during training, summed over ranks only when they are read."""

import torch

from edm2kit.torch_utils import dist


class RunningStats:
    """Mean and count of named quantities since the last `collect`.

    `add` does not synchronise with the device. Sums are float64 (on the CPU if the device has no float64).
    """

    def __init__(self, device: torch.device):
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor | float, where: torch.Tensor | None = None) -> None:
        """Add all of `values`, or those at which the boolean tensor `where` (same shape) is true."""
        values = torch.as_tensor(values).detach().to(self._device, torch.float64)
        where = torch.ones_like(values) if where is None else where.to(self._device, torch.float64)
        moments = torch.stack([where.sum(), torch.where(where > 0, values, 0).sum()])
        self._sums[name] = self._sums[name] + moments if name in self._sums else moments

    def collect(self) -> dict[str, tuple[float, int]]:
        """(mean, count) over all ranks by name, in the order first added; then starts over.

        Every rank must have added the same names. The mean of no values is NaN.
        """
        if not self._sums:
            return {}
        total = dist.all_reduce_sum_(torch.stack(list(self._sums.values()))).tolist()
        means = {}
        for name, (count, value_sum) in zip(self._sums, total, strict=True):
            means[name] = (value_sum / count if count else float("nan"), int(count))
        self._sums = {}
        return means
