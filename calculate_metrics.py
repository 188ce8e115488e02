"""Score generated images: the same command as edm2kit-metrics."""

from edm2kit.cli.console import metrics as main

if __name__ == "__main__":
    main()
