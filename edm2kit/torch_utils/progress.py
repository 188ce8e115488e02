"""Progress bars: lively on a terminal, a line now and then in a log file, on rank 0 alone."""

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
    """A bar over `total` of `unit` (None: nobody knows), `initial` of them done, after the words `what`.

    `scaled` writes 2.5M for 2500000. It goes to standard error: ten times a second to a terminal, every half minute
    to a file.
    """
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=what,
        unit_scale=scaled,
        disable=hidden or dist.rank() != 0,
        dynamic_ncols=True,
        mininterval=0.1 if watched else _LOG_INTERVAL_SEC,
        maxinterval=10 if watched else 2 * _LOG_INTERVAL_SEC,
    )
