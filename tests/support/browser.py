"""A headless browser that opens a page from a file, and says what is on it and on its console."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# moves the slider of a page one step down by keyboard, then picks its second group; `first` is the label in between
MOVE_SLIDER = """
      const pick = document.querySelector(".pick"), range = document.querySelector(".weight");
      range.focus();
      document.title = String(document.activeElement === range) + getComputedStyle(range).outlineStyle;
      range.stepDown(); range.dispatchEvent(new Event("input"));
      const first = document.querySelector(".shown").value;
      pick.value = 1; pick.dispatchEvent(new Event("change"));
"""
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")


def _run(page: Path, fragment: str, *options: str) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", *options]
    return subprocess.run([*command, f"{page.as_uri()}{fragment}"], capture_output=True, text=True, timeout=300)


def dump(page: Path, fragment: str = "") -> tuple[str, list[str]]:
    """The document after its scripts have run, and the lines on the console (errors among them)."""
    done = _run(page, fragment, "--enable-logging=stderr", "--log-level=0", "--dump-dom")
    return done.stdout, [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]


def screenshot(page: Path, image: Path, width: int = 1000, height: int = 1400, dark: bool = False) -> None:
    """Write a picture of the page."""
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(page, "", f"--screenshot={image}", f"--window-size={width},{height}", *theme)


def with_script(page: Path, copy: Path, script: str) -> Path:
    """A copy of the page that runs `script` at its end."""
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    copy.write_text(text, encoding="utf-8")
    return copy
