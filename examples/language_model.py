"""A small language model of characters, for the examples that need a network to look into.

    python examples/language_model.py

It learns Python's standard library, whose source is on every machine, in about half a minute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

CONTEXT = 64


def characters() -> Tensor:
    """Source of the standard library as ASCII codes, int64 [about 2 million]."""
    folder = Path(os.__file__).parent
    text = "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("[a-d]*.py")))
    return torch.tensor(list(text.encode("ascii", "replace")))


class LanguageModel(nn.Module):
    """A transformer of two blocks: characters [B, T] -> logits of the next one [B, T, 128]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.symbols = nn.Embedding(128, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
            for _ in range(2)
        )
        self.readout = nn.Linear(width, 128)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next character at each place."""
        length = tokens.shape[1]
        x = self.symbols(tokens) + self.places.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=self.mask[:length, :length], is_causal=True)
        return self.readout(x)


def batches(text: Tensor, rows: int, count: int, seed: int) -> Iterator[Tensor]:
    """So many batches [rows, CONTEXT + 1] of random places of the text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - CONTEXT - 1, (rows, 1), generator=generator)
        yield text[starts + torch.arange(CONTEXT + 1)]


def trained(text: Tensor, steps: int = 300) -> LanguageModel:
    """A model that has learned the text for a while."""
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step, batch in enumerate(batches(text, 16, steps, seed=0), 1):
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps:
            print(f"language model, step {step}: {loss:.2f} nats a character")
    return model.eval()


@torch.no_grad()
def written(model: LanguageModel, length: int, start: str = "    def ", seed: int = 0) -> str:
    """Text that the model writes, a character at a time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(start.encode())])
    for _ in range(length):
        chances = model(tokens[:, -CONTEXT:])[0, -1].softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)[None]), 1)
    return bytes(tokens[0].tolist()).decode()


if __name__ == "__main__":
    print(written(trained(characters()), 400))
