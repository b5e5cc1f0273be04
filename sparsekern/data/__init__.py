"""Data sets with known factors, rendered here or read from files, and stores of activations."""

from .activations import ActivationStore
from .dsprites import CountError, DataError, DSprites, load, rendered

__all__ = ["ActivationStore", "CountError", "DSprites", "DataError", "load", "rendered"]
