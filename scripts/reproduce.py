"""Reproduce published tables: the same command as edm2kit-reproduce."""

try:
    from edm2kit.cli.console import reproduce
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error

if __name__ == "__main__":
    reproduce()
