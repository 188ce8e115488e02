"""Train a diffusion network: the same command as edm2kit-train."""

from edm2kit.cli.train import main

if __name__ == "__main__":
    main()
