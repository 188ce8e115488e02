"""Train a diffusion network: the same command as edm2kit-train."""

from edm2kit.cli.console import train as main

if __name__ == "__main__":
    main()
