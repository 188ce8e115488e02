"""Where the installed commands start: one function each, called by the files of the checkout, too.

`--help` and usage errors are answered before the command itself is imported, and with it torch.
"""

import importlib
from functools import partial

from edm2kit.cli import help_pages


def start(name: str) -> None:
    """Run the command of the module `edm2kit.cli.NAME` with the words of this process's command line."""
    help_pages.answer(name)
    importlib.import_module(f"edm2kit.cli.{name}").main()


train = partial(start, "train")
generate = partial(start, "generate")
metrics = partial(start, "metrics")
phema = partial(start, "phema")
dataset = partial(start, "dataset")
reproduce = partial(start, "reproduce")
distill = partial(start, "distill")
classifier = partial(start, "classifier")
convert = partial(start, "convert")
flops = partial(start, "flops")
toy = partial(start, "toy")
compare = partial(start, "compare")
tune = partial(start, "tune")
report = partial(start, "report")
