"""Install the requirements of pyproject.toml into the environment of the Python that runs this (used by _setup.sh).

`sync` is for the checkout's own .venv: it installs the versions of constraints.txt, and does not call pip if nothing
has changed since the last time. `add` is for the user's own environment: it installs what is missing and replaces
nothing, so a torch built for the user's GPU stays.
"""

import hashlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRA = "test"  # names the other extras that the tests and the demo need
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?:\[(?P<extras>[a-z,]+)\])?(?:>=(?P<version>[0-9.]+))?")


def requirements(pyproject: dict, extra: str = EXTRA) -> list[str]:
    """The core requirements and those of `extra`, including the extras that it names, such as ["torch>=2.5", ...].

    Raises ValueError if one is not of the form name>=version, the only one that `missing` understands.
    """
    project = pyproject["project"]
    found = list(project["dependencies"])
    queue = [extra]
    while queue:
        for line in project["optional-dependencies"][queue.pop(0)]:
            match = _REQUIREMENT.fullmatch(line)
            if match and match["name"] == project["name"]:
                queue.extend(match["extras"].split(","))
            else:
                found.append(line)
    for line in found:
        match = _REQUIREMENT.fullmatch(line)
        if match is None or match["version"] is None or match["extras"]:
            raise ValueError(f"pyproject.toml: {line!r} is not of the form name>=version")
    return found


def installed_version(name: str) -> str | None:
    """The version of distribution `name` in this environment, e.g. "2.13.0+cpu", or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing(wanted: list[str]) -> list[str]:
    """Those of `wanted` that this environment lacks.

    Raises ValueError for one that is too old, because replacing it could break the user's other work.
    """
    lacking = []
    for line in wanted:
        name, least = line.split(">=")
        version = installed_version(name)
        if version is None:
            lacking.append(line)
        elif _release(version) < _release(least):
            raise ValueError(
                f"this environment ({sys.prefix}) has {name} {version}, but {line} is needed; update it yourself, "
                "or deactivate the environment to get a .venv beside the code"
            )
    return lacking


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def kept_constraints(tested: str) -> str:
    """Constraints under which pip replaces nothing: installed versions as they are, `tested` versions for the rest."""
    here = {_normal(dist.name): f"{dist.name}=={dist.version}" for dist in metadata.distributions() if dist.version}
    # torch needs a newer setuptools than a fresh environment has, and nobody chooses that version with care
    here.pop("setuptools", None)
    rest = [line for line in tested.splitlines() if "==" in line and _normal(line.split("==")[0]) not in here]
    return "\n".join([*here.values(), *rest]) + "\n"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pip_install(wanted: list[str], constraints: str) -> None:
    """Install `wanted` under `constraints` (the text of a constraints file) with this Python's pip.

    Raises ValueError if pip is missing or fails.
    """
    names = " ".join(wanted)
    print(f"Installing into {sys.prefix}: {names}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "constraints.txt")
        path.write_text(constraints)
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run([*pip, "--constraint", str(path), *wanted], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ValueError(f"pip could not install the requirements, for the reason above: {names}")


def install_package() -> None:
    """Install this checkout itself, in editable form: `import edm2kit` and the edm2kit-* commands use its files.

    Raises ValueError if pip fails.
    """
    print(f"Installing edm2kit from {ROOT} into {sys.prefix}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ValueError(f"pip could not install the checkout {ROOT}, for the reason above")


def sync() -> None:
    """Bring the checkout's own .venv to exactly the tested versions; returns at once when it has them."""
    wanted = requirements(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    constraints = (ROOT / "constraints.txt").read_text()
    # inside site-packages, so that a change of Python's version loses it together with the packages
    stamp = Path(sysconfig.get_path("purelib"), "installed-for-checkout.sha256")
    parts = [*wanted, constraints, str(ROOT), (ROOT / "pyproject.toml").read_text()]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    pip_install(wanted, constraints)
    install_package()
    stamp.write_text(digest)


def add() -> None:
    """Install what is missing in the active environment."""
    lacking = missing(requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())))
    if lacking:
        pip_install(lacking, kept_constraints((ROOT / "constraints.txt").read_text()))
    if not package_is_installed():
        install_package()


def package_is_installed() -> bool:
    """Whether this environment's edm2kit is this checkout (another checkout's tests must not run on it)."""
    try:
        origin = metadata.distribution("edm2kit").read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        return False
    return ROOT.as_uri() in origin


if __name__ == "__main__":
    try:
        {"sync": sync, "add": add}[sys.argv[1]]()
    except ValueError as error:
        sys.exit(f"Error: {error}")
