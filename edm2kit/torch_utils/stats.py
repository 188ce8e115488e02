"""Running statistics of a training run, summed over ranks only when somebody reads them."""

import torch

from edm2kit.torch_utils import dist


class RunningStats:
    """Mean and count of named quantities since the last `collect`.

    `add` costs no synchronisation with the device; sums are float64 (on the CPU where the device has none).
    """

    def __init__(self, device: torch.device):
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor | float, where: torch.Tensor | None = None) -> None:
        """Take in all of `values`, or those at which the boolean tensor `where` (same shape) holds."""
        values = torch.as_tensor(values).detach().to(self._device, torch.float64)
        where = torch.ones_like(values) if where is None else where.to(self._device, torch.float64)
        moments = torch.stack([where.sum(), torch.where(where > 0, values, 0).sum()])
        self._sums[name] = self._sums[name] + moments if name in self._sums else moments

    def collect(self) -> dict[str, tuple[float, int]]:
        """(mean, count) over all ranks by name, in the order first added; then start anew.

        Every rank must have added the same names. The mean of nothing is NaN.
        """
        if not self._sums:
            return {}
        total = dist.all_reduce_sum_(torch.stack(list(self._sums.values()))).tolist()
        means = {n: (s / c if c else float("nan"), int(c)) for n, (c, s) in zip(self._sums, total, strict=True)}
        self._sums = {}
        return means
