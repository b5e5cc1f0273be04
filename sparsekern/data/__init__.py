"""Data sets with known factors, rendered here or read from files a user already has."""

from .dsprites import CountError, DataError, DSprites, load, rendered

__all__ = ["CountError", "DSprites", "DataError", "load", "rendered"]
