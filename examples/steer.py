"""Steer a language model with a latent of a sparse autoencoder: python examples/steer.py

Trains both (train_sae.py), looks for the latent that tells digits best, and adds its direction
to the activations while the model writes.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from language_model import CONTEXT, batches, characters, trained, written
from torch import Tensor
from train_sae import trained_autoencoder

import sparsekern
from sparsekern.data import ActivationStore, capture

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300, help="of the language model")
options = parser.parse_args()

text = characters()
language_model = trained(text, options.steps)
block = language_model.blocks[0]
with tempfile.TemporaryDirectory() as folder:
    inputs = (batch[:, :CONTEXT] for batch in batches(text, 64, 24, seed=1))
    capture(language_model, "blocks.0", inputs, f"{folder}/activations.h5")
    with ActivationStore(f"{folder}/activations.h5") as store:
        model = trained_autoencoder(store, latents=1024, k=16)


def is_digit(tokens: Tensor) -> Tensor:
    """Which characters are 0..9."""
    return (tokens >= ord("0")) & (tokens <= ord("9"))


# The latent that fires most often on digits, less what it fires on others.
activations: list[Tensor] = []
handle = block.register_forward_hook(lambda _module, _args, output: activations.append(output))
(tokens,) = batches(text, 512, 1, seed=2)
with torch.no_grad():
    language_model(tokens[:, :CONTEXT])
    values, indices = model.encode(activations[0].flatten(0, 1))
handle.remove()
digit = is_digit(tokens[:, :CONTEXT]).flatten()
rates = [
    sparsekern.count_active(indices[rows], 1024, values[rows]) / rows.sum()
    for rows in (digit, ~digit)
]
latent = int((rates[0] - rates[1]).argmax())
print(
    f"latent {latent} fires on {rates[0][latent]:.0%} of digits, {rates[1][latent]:.1%} of others"
)

strength = 4 * float(values[indices == latent].max())
direction = model.dictionary[latent].detach()
for name, push in (("as it is", 0.0), ("steered", strength)):
    handle = block.register_forward_hook(
        lambda _m, _a, output, push=push: output + push * direction
    )
    sample = written(language_model, 300)
    handle.remove()
    digits = sum(character.isdigit() for character in sample) / len(sample)
    print(f"-- {name}: {digits:.0%} digits\n{sample[:160]}")
