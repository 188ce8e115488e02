"""Progress bars: live on a terminal, one line now and then in a log file, on rank 0 only."""

import sys

from tqdm import tqdm

from edm2kit.torch_utils import dist

_LOG_INTERVAL_SEC = 30


def progress_bar(
    total: int | None,
    unit: str = "img",
    initial: int = 0,
    *,
    what: str | None = None,
    hidden: bool = False,
    scaled: bool = False,
) -> tqdm:
    """A progress bar on standard error, refreshed ten times a second on a terminal and every 30 seconds in a file.

    It counts `unit`s up to `total` (None if unknown), starting at `initial`, and is labelled `what`. `scaled` shows
    2500000 as 2.5M. `hidden` shows nothing.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=what,
        unit_scale=scaled,
        disable=hidden or dist.rank() != 0,
        dynamic_ncols=True,
        mininterval=0.1 if on_terminal else _LOG_INTERVAL_SEC,
        maxinterval=10 if on_terminal else 2 * _LOG_INTERVAL_SEC,
    )
