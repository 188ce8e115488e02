"""Where the installed commands start: one entry each, which the files of the checkout call, too.

`--help` and usage errors are answered before the command itself is imported, and with it torch.
"""

import importlib
from typing import Any

from edm2kit.cli import help_pages


class Entry:
    """A command that is imported when it is called, or when something of it is asked for, such as `make_context`.

    Called, it runs with the words of this process's command line.
    """

    def __init__(self, name: str):
        self._name = name  # of the module in edm2kit.cli

    def __call__(self) -> None:
        help_pages.answer(self._name)
        self._command()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._command, attribute)

    @property
    def _command(self) -> Any:
        return importlib.import_module(f"edm2kit.cli.{self._name}").main


train = Entry("train")
generate = Entry("generate")
metrics = Entry("metrics")
phema = Entry("phema")
dataset = Entry("dataset")
reproduce = Entry("reproduce")
distill = Entry("distill")
classifier = Entry("classifier")
convert = Entry("convert")
flops = Entry("flops")
toy = Entry("toy")
compare = Entry("compare")
tune = Entry("tune")
report = Entry("report")
