"""Score generated images: the same command as edm2kit-metrics."""

from edm2kit.cli.console import metrics

if __name__ == "__main__":
    metrics()
