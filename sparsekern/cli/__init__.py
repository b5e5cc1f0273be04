"""The command ``sparsekern``, one file for each group of its subcommands."""

from .command import main

__all__ = ["main"]
