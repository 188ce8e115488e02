"""Running scripts/dataset_tool.py within the test process, and something for it to convert."""

from click.testing import CliRunner

from edm2kit.cli.dataset import main
from tests.support.pictures import encoded, picture

CLASSES = {f"{name}/{k}.png": encoded(picture(k)) for name in ("dog", "cat") for k in range(3)}


def run(*arguments: object, code: int = 0) -> str:
    """What the command prints; it has to end with exit code `code`."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--workers", "1"])
    assert result.exit_code == code, result.output
    return result.output


def convert(source: object, dest: object, *options: object, code: int = 0) -> str:
    """Likewise for `convert`."""
    return run("convert", "--source", source, "--dest", dest, *options, code=code)
