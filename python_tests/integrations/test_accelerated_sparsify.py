"""sparsify's SparseCoder, accelerated and not; its mistakes, made right and kept."""

from __future__ import annotations

import pytest
import torch
from accelerated import D, K, N, batch, check_equal, check_lifecycle, pair, peer, randomize
from torch.nn import functional as F

import sparsekern

sparsify = peer("sparsify")


def make(k=K, **options):
    config = sparsify.SparseCoderConfig(num_latents=N, k=k, **options)
    coder = sparsify.SparseCoder(D, config)
    randomize(coder)
    return coder


def dense_losses(coder, x, y=None, dead_mask=None):
    """The losses of sparsify's forward pass, written with dense tensors and no function of its
    own."""
    y = x if y is None else y
    rows = x if coder.cfg.transcode else x - coder.b_dec
    pre_acts = F.linear(rows, coder.encoder.weight, coder.encoder.bias).relu()
    variance = (y - y.mean(0)).pow(2).sum()

    def keep(scores, k):
        values, indices = scores.topk(k)
        return torch.zeros_like(scores).scatter(-1, indices, values)

    if coder.cfg.activation == "groupmax":
        values, indices = pre_acts.unflatten(-1, (coder.cfg.k, -1)).max(-1)
        groups = torch.zeros_like(pre_acts).unflatten(-1, (coder.cfg.k, -1))
        acts = groups.scatter(-1, indices.unsqueeze(-1), values.unsqueeze(-1)).flatten(-2)
    else:
        acts = keep(pre_acts, coder.cfg.k)
    skip = 0 if coder.W_skip is None else x @ coder.W_skip.mT
    out = acts @ coder.W_dec + coder.b_dec + skip
    e = y - out
    losses = [e.pow(2).sum() / variance]
    if dead_mask is not None and (dead := int(dead_mask.sum())):
        k_aux = min(D // 2, dead)
        aux = keep(torch.where(dead_mask, pre_acts, -torch.inf), k_aux).clamp_min(0)
        scale = min(dead / (D // 2), 1.0)
        losses.append(scale * (aux @ coder.W_dec - e.detach()).pow(2).sum() / variance)
    if coder.cfg.multi_topk:
        multi = keep(pre_acts, 4 * coder.cfg.k) @ coder.W_dec + coder.b_dec
        losses.append((multi - y).pow(2).sum() / variance)
    return out, losses


OPTIONS = {
    "plain": {},
    "multi": {"multi_topk": True},
    "skip": {"skip_connection": True, "transcode": True},
    "groupmax": {"activation": "groupmax", "k": 8},
    "k=1": {"k": 1},
}
DEAD = {
    "no AuxK": None, "none": torch.zeros(N, dtype=torch.bool), "few": torch.arange(N) % 37 == 5,
    "many": torch.arange(N) % 3 == 0,
}  # fmt: skip


@pytest.mark.parametrize("shift", [0.0, -6.0], ids=["many positive", "few positive"])
@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("options", OPTIONS)
def test_right_by_default(options, dead, shift):
    """Results of sparsify, gradients of the dense expression."""
    coder = make(**OPTIONS[options])
    with torch.no_grad():
        coder.encoder.bias.add_(shift)
    _, fast = pair(coder)
    x, y = batch(), batch(2)
    target = y if coder.cfg.transcode else None
    out, losses = dense_losses(coder, x, target, DEAD[dead])
    sum(losses).backward()
    result = fast(x, target, dead_mask=DEAD[dead])
    parts = [result.fvu, result.auxk_loss, result.multi_topk_fvu]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), sum(losses), rtol=1e-5, atol=1e-5)
    if not coder.cfg.multi_topk:
        torch.testing.assert_close(result.sae_out, out, rtol=1e-5, atol=1e-5)
    for (name, expected), got in zip(coder.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("options", OPTIONS)
def test_results_are_those_of_sparsify(options, dead):
    slow, fast = pair(make(**OPTIONS[options]))

    def call(coder):
        result = coder(batch(), dead_mask=DEAD[dead])
        return [result.sae_out, result.fvu, result.auxk_loss, result.multi_topk_fvu]

    check_equal(slow, fast, call)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("options", OPTIONS)
def test_match_upstream_keeps_its_gradients(options, dead):
    slow, fast = pair(make(**OPTIONS[options]), match_upstream=True)

    def call(coder):
        result = coder(batch(), dead_mask=DEAD[dead])
        return [result.sae_out, result.fvu, result.auxk_loss, result.multi_topk_fvu]

    check_equal(slow, fast, call, lambda parts: sum(parts[1:]))


def test_match_upstream_trains_latents_that_are_off():
    """sparsify gives selected latents a gradient whose activation is zero."""
    coder = make(k=N)  # all are selected: so nothing depends on the order of equal zeros
    slow, fast = pair(coder, match_upstream=True)
    check_equal(slow, fast, lambda coder: coder(batch()).fvu, lambda fvu: fvu)
    _, right = pair(coder)
    right(batch()).fvu.backward()
    difference = (right.encoder.weight.grad - fast.encoder.weight.grad).abs().max()
    assert difference > 1e-3


def test_encoder_and_decoder_alone():
    slow, fast = pair(make())
    one, two = slow.encode(batch()), fast.encode(batch())
    assert type(one) is type(two)
    torch.testing.assert_close(two.pre_acts + 0, one.pre_acts, rtol=1e-5, atol=1e-5)
    order = one.top_indices.argsort(-1)
    assert torch.equal(one.top_indices.gather(-1, order), two.top_indices)
    torch.testing.assert_close(one.top_acts.gather(-1, order), two.top_acts, rtol=1e-5, atol=1e-5)
    out = [coder.decode(one.top_acts, one.top_indices) for coder in (slow, fast)]
    torch.testing.assert_close(*out, rtol=1e-5, atol=1e-5)
    codes = fast.encode_sparse(batch())
    assert torch.equal(codes.indices, two.top_indices)


def test_hooked_encoder():
    slow, fast = pair(make())
    for coder in (slow, fast):
        coder.encoder.register_forward_hook(lambda module, args, out: out + 1)
    check_equal(slow, fast, lambda coder: coder(batch()).fvu, lambda fvu: fvu)


def test_no_decoder():
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=K), decoder=False)
    sparsekern.accelerate(coder)
    assert coder.encode(batch()).top_acts.shape[-1] == K
    with pytest.raises(ValueError, match="W_dec must be there"):
        coder(batch())


def test_saved_and_loaded(tmp_path):
    coder = sparsekern.accelerate(make())
    coder.save_to_disk(tmp_path)
    loaded = sparsify.SparseCoder.load_from_disk(tmp_path)
    assert type(loaded) is sparsify.SparseCoder
    torch.testing.assert_close(loaded(batch()).sae_out, coder(batch()).sae_out)


@pytest.mark.parametrize("options", OPTIONS)
def test_lifecycle(options):
    check_lifecycle(make(**OPTIONS[options]), lambda coder: [coder(batch()).fvu])
