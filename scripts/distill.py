"""Distil a guided pair of networks into one: the same command as edm2kit-distill."""

try:
    from edm2kit.cli.console import distill
except ModuleNotFoundError as error:
    if error.name != "edm2kit":
        raise
    raise SystemExit("Error: the package edm2kit is not installed in this Python. Run: pip install -e .") from error

if __name__ == "__main__":
    distill()
