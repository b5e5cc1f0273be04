"""Train a sparse autoencoder on the activations of a module: python examples/train_sae.py

The module is a block of a small transformer that is trained first (language_model.py). For a model
of your own, capture its activations (capture_tokens.py) and name the file: --activations FILE.
`sparsekern train sae` does all this, and more, from the command line.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from language_model import CONTEXT, batches, characters, trained

from sparsekern.data import ActivationStore, capture
from sparsekern.models import SparseAutoencoder
from sparsekern.optim import Adam


def trained_autoencoder(store: ActivationStore, latents: int, k: int) -> SparseAutoencoder:
    """An autoencoder that has seen each activation of the store once."""
    model = SparseAutoencoder(store.features, latents, k, auxk=k, dead_after=store.tokens // 5)
    model.initialize(next(store.batches(1024, seed=1)))
    others = [model.encoder, model.encoder_bias, model.decoder_bias]
    optimizer = Adam([{"params": [model.dictionary], "unit_rows": True}, {"params": others}], 2e-3)
    for step, x in enumerate(store.batches(512, seed=0), 1):
        _, loss = model.loss(x)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if step % 25 == 0:
            dead = float(model.counter.fraction(store.tokens // 5))
            print(f"autoencoder, step {step}: FVU {loss.fvu:.3f}, {dead:.1%} dead")
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", type=Path, help="file of another model's")
    parser.add_argument("--steps", type=int, default=300, help="of the language model")
    parser.add_argument("--out", type=Path, help="file for the weights of the autoencoder")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = options.activations
        if path is None:
            path = Path(folder, "activations.h5")
            text = characters()
            inputs = (batch[:, :CONTEXT] for batch in batches(text, 64, 24, seed=1))
            rows = capture(trained(text, options.steps), "blocks.0", inputs, path)
            print(f"{rows} activations captured")
        with ActivationStore(path) as store:
            model = trained_autoencoder(store, latents=8 * store.features, k=16)
    if options.out:
        torch.save(model.state_dict(), options.out)
