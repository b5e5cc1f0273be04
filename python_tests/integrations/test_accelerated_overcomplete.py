"""overcomplete's TopKSAE, accelerated and not."""

from __future__ import annotations

import pytest
import torch
from accelerated import D, K, N, batch, check_equal, check_lifecycle, pair, peer, randomize

from sparsekern.integrations.acceleration import LateTensor, report

peer("overcomplete")
from overcomplete.sae import RATopKSAE, TopKSAE, train_sae  # noqa: E402
from overcomplete.sae.losses import mse_l1, top_k_auxiliary_loss  # noqa: E402


def make(encoder=None, **options):
    sae = TopKSAE(D, N, top_k=K, encoder_module=encoder, **options)
    randomize(sae)
    return sae


@pytest.mark.parametrize("encoder", [None, "mlp_ln_1", "mlp_bn_1", "mlp_ln_3"])
def test_forward(encoder):
    slow, fast = pair(make(encoder))
    kinds = []

    def call(sae):
        result = sae(batch())
        kinds.append(type(result[1]))
        return result

    check_equal(slow, fast, call, lambda out: out[2].square().sum())
    assert kinds == [torch.Tensor, LateTensor]
    for sae in (slow, fast):
        sae.eval()
    check_equal(slow, fast, lambda sae: (*sae(batch()), *sae.encode(batch())))
    assert all(type(tensor) is torch.Tensor for tensor in fast(batch()))


def mse(x, x_hat, pre_codes, codes, dictionary):
    return (x - x_hat).square().mean()


@pytest.mark.parametrize("criterion", [mse, mse_l1, top_k_auxiliary_loss])
@pytest.mark.parametrize("multiplier", [False, True])
def test_losses(criterion, multiplier):
    slow, fast = pair(make(dictionary_params={"use_multiplier": multiplier}))

    def call(sae):
        pre_codes, codes, out = sae(batch())
        return criterion(batch(), out, pre_codes, codes, sae.get_dictionary())

    check_equal(slow, fast, call, lambda loss: loss)


def test_own_training():
    slow, fast = pair(make())
    logs = []
    for sae in (slow, fast):
        loader = [batch(seed) for seed in range(5)]
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        logs.append(train_sae(sae, loader, mse, optimizer, nb_epochs=2, monitoring=2))
    assert set(logs[0]) == set(logs[1])
    for name in logs[0]:
        if name not in ("time_epoch", "z"):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3, abs=1e-4), name


def test_encode_sparse():
    _, fast = pair(make())
    values, indices = fast.encode_sparse(batch())
    dense = torch.zeros(len(values), N).scatter(-1, indices, values)
    torch.testing.assert_close(dense, fast.encode(batch())[1])


def test_tied_and_archetypal():
    slow, fast = pair(make().tied())
    check_equal(slow, fast, lambda sae: sae(batch()), lambda out: out[2].square().sum())
    sae = RATopKSAE(D, N, points=batch(3, 30), top_k=K)
    slow, fast = pair(sae)
    assert "" in report(fast).replaced
    check_equal(slow, fast, lambda sae: sae(batch()), lambda out: out[2].square().sum())


def test_hooks():
    slow, fast = pair(make())
    for sae in (slow, fast):
        sae.encoder.register_forward_hook(lambda module, args, out: (out[0], out[1] * 2))
    check_equal(slow, fast, lambda sae: sae(batch()), lambda out: out[2].square().sum())


def test_lifecycle():
    sae = make()
    with torch.no_grad():  # the dictionary that it keeps for evaluation
        sae.eval()
    check_lifecycle(sae, lambda sae: sae(batch()))
