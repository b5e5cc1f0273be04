"""Other libraries' spellings of our layers, a module for each library, and their checkpoints.

None of them imports the library that it is named after.
"""

from . import checkpoints, openai, sae_lens

__all__ = ["checkpoints", "openai", "sae_lens"]
