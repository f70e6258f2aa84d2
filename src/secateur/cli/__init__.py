"""The command line: one verb for each file, thin."""

from secateur.cli.main import main

__all__ = ["main"]
