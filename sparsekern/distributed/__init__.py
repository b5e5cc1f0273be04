"""One dictionary trained by several processes, which share out its latents.

See docs/distributed.md.
"""

from __future__ import annotations

from .autoencoder import ShardedAutoencoder
from .collectives import Traffic, Transfer, count_traffic

__all__ = ["ShardedAutoencoder", "Traffic", "Transfer", "count_traffic"]
