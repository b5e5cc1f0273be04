"""Other libraries' spellings of our layers: a module for each library.

None of them imports the library that it is named after.
"""

from . import openai, sae_lens

__all__ = ["openai", "sae_lens"]
