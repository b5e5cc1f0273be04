"""Training of eai-sparsify's SparseCoder on stored activations, with Adam and our schedule.

The class and its losses are the package's, and so are its first weights, with the mean of the first
batch as b_dec, as in its trainer. Batches, their order, learning rate, warm-up and decay are those
of `sparsekern train sae`. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch
from sparsify import SparseCoder, SparseCoderConfig

from sparsekern.data import ActivationStore
from sparsekern.sae.statistics import squared_error, total_variance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--held", required=True)
    parser.add_argument("--latents", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--eval-tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    with ActivationStore(options.train) as store:
        trained = train(store, options)
    with ActivationStore(options.held) as store:
        size = min(options.eval_tokens, store.tokens)
        rows = next(store.batches(size, seed=options.seed, epoch=1, prefetch=False))
    print(json.dumps(trained | evaluate(trained.pop("coder"), rows, options.batch_size)))


def train(store: ActivationStore, options: argparse.Namespace) -> dict:
    """One epoch."""
    config = SparseCoderConfig(num_latents=options.latents, k=options.k)
    coder = SparseCoder(store.features, config)
    first = next(store.batches(options.batch_size, seed=options.seed, prefetch=False))
    coder.b_dec.data.copy_(first.mean(0))
    optimizer = torch.optim.Adam(coder.parameters(), lr=options.learning_rate)
    since_fired = torch.zeros(options.latents, dtype=torch.int64)
    steps = store.count_batches(options.batch_size)
    for step, batch in enumerate(store.batches(options.batch_size, seed=options.seed)):
        rate = min(1.0, (step + 1) / max(1.0, 0.02 * steps)) * min(1.0, (1 - step / steps) / 0.3)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        if config.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        output = coder(batch)
        optimizer.zero_grad()
        output.fvu.backward()  # its trainer has no auxiliary loss by default
        if config.normalize_decoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        since_fired += len(batch)
        since_fired[output.latent_indices[output.latent_acts > 0]] = 0
    if config.normalize_decoder:
        coder.set_decoder_norm_to_unit_norm()
    dead = (since_fired > store.tokens // 20).double().mean().item()
    return {"coder": coder, "steps": steps, "tokens": store.tokens, "dead": dead}


@torch.no_grad()
def evaluate(coder: SparseCoder, rows: torch.Tensor, batch_size: int) -> dict:
    """FVU, L0 and silent latents of rows."""
    error, active = 0.0, 0
    fired = torch.zeros(coder.num_latents, dtype=torch.bool)
    for part in rows.split(batch_size):
        output = coder(part)
        error += squared_error(part, output.sae_out).item()
        active += int((output.latent_acts != 0).sum())
        fired[output.latent_indices[output.latent_acts > 0]] = True
    return {
        "fvu": error / total_variance(rows).item(),
        "l0": active / len(rows),
        "silent": 1 - fired.double().mean().item(),
    }


if __name__ == "__main__":
    main()
