"""Score generated images: the same command as edm2kit-metrics."""

from edm2kit.cli.metrics import main

if __name__ == "__main__":
    main()
