"""Data sets with known factors, rendered here or read from files a user already has."""

from .dsprites import DataError, DSprites, load, rendered

__all__ = ["DSprites", "DataError", "load", "rendered"]
