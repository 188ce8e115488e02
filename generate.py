"""Generate images from a trained network: the same command as edm2kit-generate."""

from edm2kit.cli.console import generate as main

if __name__ == "__main__":
    main()
