"""A small autoencoder's weights and its own formulas, for the formats of checkpoints."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

D, N, K = 24, 96, 6


def random_state(seed=0, dtype=torch.float32):
    """Encoder, its bias, dictionary with rows of norms other than 1, and decoder bias."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"encoder": (N, D), "encoder_bias": (N,), "dictionary": (N, D), "decoder_bias": (D,)}
    return {
        name: (0.3 * torch.randn(shape, generator=draw)).to(dtype) for name, shape in shapes.items()
    }


def inputs(rows=40, seed=9):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def scores_of(state, x, biased=True):
    x = x - state["decoder_bias"] if biased else x
    return x @ state["encoder"].t() + state["encoder_bias"]


def dense_topk(scores, k):
    values, indices = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, indices, values.relu())


def check_equal(model, state, codes, reconstruction, x):
    """Weights are equal bit for bit, codes in which latents are active, numbers up to rounding."""
    for name, tensor in state.items():
        assert torch.equal(getattr(model, name), tensor), name
    model.eval()
    values, indices = model.encode(x)
    dense = torch.zeros_like(codes).scatter_add(-1, indices, values)
    assert torch.equal(dense != 0, codes != 0) and (codes != 0).any()
    torch.testing.assert_close(dense, codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x).reconstruction, reconstruction, rtol=1e-5, atol=1e-5)


def assert_same_files(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name
