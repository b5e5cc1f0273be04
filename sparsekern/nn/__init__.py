"""Layers: activations that keep few neurons alive, and the counter of dead ones."""

from .counter import DeadNeuronCounter
from .topk import TopK

__all__ = ["DeadNeuronCounter", "TopK"]
