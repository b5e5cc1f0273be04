"""Sparse autoencoders of other libraries that run on our kernels, without a change of their code.

A file for each library says which of its classes are known, and holds the methods that stand in.
None of them imports the library: a class is known by the module that defines it. Modules of no
library are known by what their code does (plain.py), and tried before they are replaced (trial.py).
"""

from __future__ import annotations

from .late import LateTensor
from .replacing import Report, accelerate, report, restore

__all__ = ["LateTensor", "Report", "accelerate", "report", "restore"]
