"""Rebuild any EMA length after training: the same command as edm2kit-phema."""

from edm2kit.cli.console import phema as main

if __name__ == "__main__":
    main()
