"""Data sets with known factors, rendered here or read from files a user already has."""

from sparsekern.data.dsprites import DataError, DSprites, load, rendered

__all__ = ["DSprites", "DataError", "load", "rendered"]
