"""What the project's files may import and say, as functions over any tree (tests also try them on a crooked one)."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "edm2kit"
# room of the package -> the rooms it may import, besides itself; each may import denoiser.py and conditions.py
_GROUND = {"denoiser", "conditions", "torch_utils"}
_SCIENCE = {"models", "snapshots", "data", "ema", "training", "guidance", "sampling", "metrics"}
ROOMS = {
    "torch_utils": set(),
    "conditions": {"torch_utils"},
    "denoiser": {"torch_utils", "conditions"},
    "models": _GROUND,
    "snapshots": {*_GROUND, "models"},
    "data": {*_GROUND, "models", "snapshots"},
    "ema": {*_GROUND, "models", "snapshots"},
    "training": {*_GROUND, "models", "snapshots", "data", "ema"},
    "guidance": _GROUND,
    "sampling": _GROUND,
    "metrics": _GROUND,
    "integrations": {*_GROUND, "models", "snapshots", "guidance", "sampling"},
    "experiments": {
        *_GROUND,
        "models",
        "snapshots",
        "data",
        "ema",
        "training",
        "guidance",
        "sampling",
        "metrics",
        "cli",
    },
    "cli": {
        *_GROUND,
        "models",
        "snapshots",
        "data",
        "ema",
        "training",
        "guidance",
        "sampling",
        "metrics",
        "experiments",
    },
}
OUTSIDE = {"tests", "scripts", "benchmarks"}
IMPORT_NAMES = {"pillow": "PIL", "pillow-heif": "pillow_heif", "pyyaml": "yaml"}
MAX_LINES = 450  # each command passes through few files, so some hold two neighbouring ideas
_TEXT = {".py", ".sh", ".md", ".toml", ".yml", ".yaml", ".txt", ".json", ".cfg", ""}
_SETUP = {".sh", ".toml", ".yml", ".txt", ".cfg", ""}


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, the line, and whether importing the file already imports it."""

    module: str
    line: int
    at_load: bool


def imports_of(source: str) -> list[Import]:
    """Every import in a Python file; relative ones stay within their room and are left out."""
    return list(_walk(ast.parse(source), True))


def _walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_load) for alias in child.names)
        inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _walk(child, at_load and not inside_function and not typing_only)


def python_files(root: Path) -> list[Path]:
    """The project's Python files, tests included, without what a user may keep in the checkout beside them."""
    folders = [PACKAGE, *sorted(OUTSIDE), "examples"]
    return sorted([*root.glob("*.py"), *(file for folder in folders for file in (root / folder).rglob("*.py"))])


def command_lines(root: Path) -> list[Path]:
    """The files that are run, not imported: those of the root, and those of scripts/ that have a main block."""
    scripts = [file for file in sorted((root / "scripts").glob("[!_]*.py")) if "__main__" in file.read_text()]
    return [*sorted(root.glob("*.py")), *scripts]


def commands(root: Path) -> set[str]:
    """The modules of edm2kit.cli that are commands: those that pyproject.toml gives a console command."""
    return set(console_commands(root).values())


def console_commands(root: Path) -> dict[str, str]:
    """The modules of edm2kit.cli by console command; `edm2kit.cli.console` has a function for each."""
    targets = pyproject(root)["project"]["scripts"].items()
    return {name: target.replace("edm2kit.cli.console:", "edm2kit.cli.") for name, target in targets}


def command_of_file(file: Path) -> str | None:
    """The module of edm2kit.cli whose command a file of the root or of scripts/ runs; None for other files."""
    found = [one.module for one in imports_of(file.read_text()) if one.module.startswith("edm2kit.cli.console.")]
    return found[0].replace("edm2kit.cli.console.", "edm2kit.cli.") if found else None


def pyproject(root: Path) -> dict:
    """The parsed pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())


def dependencies(root: Path) -> dict[str, list[str]]:
    """Lower-case names by where pyproject.toml lists them: "core" and each extra, self-references left out."""
    project = pyproject(root)["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    names = {group: [re.match(r"[\w.-]+", line)[0].lower() for line in lines] for group, lines in groups.items()}
    return {group: [name for name in found if name != project["name"]] for group, found in names.items()}


def room_of(module: str) -> str | None:
    """The room of the package that a dotted module name belongs to; None outside the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def import_problems(root: Path) -> list[str]:
    """Imports that point upward, sideways, at a command, at an unnamed package, or too early at an optional one.

    One sentence each: where, what, and what to do.
    """
    named = dependencies(root)
    core = {IMPORT_NAMES.get(name, name) for name in named["core"]}
    optional = {IMPORT_NAMES.get(name, name) for group, names in named.items() if group != "core" for name in names}
    closed = commands(root)
    problems = []
    for file in python_files(root):
        where = file.relative_to(root)
        for found in imports_of(file.read_text()):
            reason = _room_reason(found.module, where, closed) or _package_reason(found, where, core, optional)
            if reason:
                problems.append(f"{where}:{found.line} imports {found.module}: {reason}")
    return problems


def _room_reason(module: str, where: Path, closed: set[str]) -> str | None:
    top, room = module.split(".")[0], room_of(module)
    if where.parts[0] == "tests":
        return None
    own = where.with_suffix("").parts
    if any(module == name or module.startswith(f"{name}.") for name in closed):
        # the files at the root and in scripts/ are the same commands under the names that EDM2 users look for
        return None if own[0] != PACKAGE and own[0] != "benchmarks" else "a command; nothing imports one"
    if top in OUTSIDE and top != own[0]:
        return f"{top} is outside the package; only {top} itself uses it"
    if own[0] != PACKAGE or room is None or len(own) < 2:
        return None
    if own[1] in ROOMS and room in ROOMS and room != own[1] and room not in ROOMS[own[1]]:
        allowed = ", ".join(sorted(ROOMS[own[1]])) or "itself"
        return f"{own[1]} may import only {allowed}. Move what is shared down a room"
    return None


def _package_reason(found: Import, where: Path, core: set[str], optional: set[str]) -> str | None:
    top = found.module.split(".")[0]
    if top == "torchvision":
        return "torchvision is not used here; it ties the project to one torch version"
    if found.module.startswith("torch.utils.tensorboard"):
        top = "tensorboard"
    local = {PACKAGE, *OUTSIDE}
    if top in sys.stdlib_module_names or top in local | core or where.parts[0] == "tests":
        return None
    if top not in optional:
        return "not in the standard library and not named in pyproject.toml"
    if found.at_load:
        return "an optional package; import it inside the function that needs it"
    return None


def text_problems(root: Path) -> list[str]:
    """Files that name the place where they were written, or an address in a file that sets the environment up."""
    elsewhere = re.compile(r"(?<![\w.])/" + r"work/|\.\./" + "shared")
    address = re.compile(r"https?://|index-" + "url|find-" + "links")
    folders = [PACKAGE, *sorted(OUTSIDE), "docs", "examples", "experiments", ".ci", ".github"]
    files = [
        *(file for file in root.glob("*") if file.name != ".git"),
        *(file for folder in folders for file in (root / folder).rglob("*")),
    ]
    problems = []
    for file in sorted(file for file in files if file.is_file() and file.suffix in _TEXT):
        where = file.relative_to(root)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if elsewhere.search(line):
                problems.append(f"{where}:{number} names a place outside the project")
            if file.suffix in _SETUP and file.name != "LICENSE" and address.search(line):
                problems.append(
                    f"{where}:{number} names an address; pip's own settings decide where packages come from"
                )
    return problems


def length_problems(root: Path) -> list[str]:
    """Python files that have grown past what one sitting reads."""
    counts = {file: len(file.read_text().splitlines()) for file in python_files(root)}
    return [
        f"{file.relative_to(root)} has {count} lines, more than {MAX_LINES}; would two ideas be clearer apart?"
        for file, count in counts.items()
        if count > MAX_LINES
    ]
