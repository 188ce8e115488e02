"""The files of the package that a call passes through."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import edm2kit

_PACKAGE = Path(edm2kit.__file__).parent


def files_called(call: Callable[[], Any]) -> list[str]:
    """Files of edm2kit in which `call()` runs a function, in any thread; importing a file does not count."""
    files = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and not frame.f_code.co_name.startswith("<module"):
            files.add(frame.f_code.co_filename)

    former = threading.getprofile(), sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(former[1])
        threading.setprofile(former[0])
    paths = [Path(file) for file in files if not file.startswith("<")]
    return sorted(str(path.relative_to(_PACKAGE)) for path in paths if path.is_relative_to(_PACKAGE))
