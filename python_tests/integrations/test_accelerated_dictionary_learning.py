"""dictionary_learning's dictionaries and their trainers, accelerated and not."""

from __future__ import annotations

import pytest
import torch
from accelerated import D, K, N, batch, check_equal, check_lifecycle, pair, peer, randomize

import sparsekern
from sparsekern.integrations.acceleration import LateTensor

peer("dictionary_learning")
from dictionary_learning.trainers.batch_top_k import (  # noqa: E402
    BatchTopKSAE,
    BatchTopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import (  # noqa: E402
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402

KINDS = {
    "TopK": lambda: AutoEncoderTopK(D, N, K),
    "BatchTopK": lambda: BatchTopKSAE(D, N, K),
    "Matryoshka": lambda: MatryoshkaBatchTopKSAE(D, N, K, [40, 100, N - 140]),
}


def make(kind):
    dictionary = KINDS[kind]()
    randomize(dictionary)
    return dictionary


def trainer(kind, seed=0):
    options = dict(
        steps=1000, activation_dim=D, dict_size=N, k=3, layer=0, lm_name="none", seed=seed,
        device="cpu", lr=1e-3, warmup_steps=1, threshold_start_step=4,
    )  # fmt: skip
    if kind == "TopK":
        made = TopKTrainer(**options)
    elif kind == "BatchTopK":
        made = BatchTopKTrainer(**options)
    else:
        made = MatryoshkaBatchTopKTrainer(group_fractions=[0.2, 0.3, 0.5], **options)
    made.dead_feature_threshold = 100  # rows
    return made


@pytest.mark.parametrize("threshold", [False, True], ids=["selection", "threshold"])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kind, threshold):
    slow, fast = pair(make(kind))
    slow.threshold.fill_(0.4)
    fast.threshold.fill_(0.4)

    def call(dictionary):
        acts = dictionary.encode(batch(), use_threshold=threshold)
        assert type(acts) is torch.Tensor
        return acts, dictionary.decode(acts)

    check_equal(slow, fast, call, lambda result: result[1].square().sum() + result[0].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind):
    slow, fast = pair(make(kind))
    check_equal(slow, fast, lambda one: one(batch()), lambda out: out.square().sum())
    check_equal(slow, fast, lambda one: one(batch(), output_features=True))
    assert type(fast(batch(), output_features=True)[1]) is torch.Tensor


def test_three_dimensions():
    slow, fast = pair(make("TopK"))
    x = batch(0, 4, 7)
    check_equal(slow, fast, lambda one: (one(x), one.encode(x)), lambda out: out[0].sum())


def test_what_trainers_ask_for():
    slow, fast = pair(make("TopK"))
    one = slow.encode(batch(), return_topk=True)
    two = fast.encode(batch(), return_topk=True)
    assert isinstance(two[0], LateTensor) and isinstance(two[3], LateTensor)
    for place in (0, 3):
        torch.testing.assert_close(two[place] + 0, one[place], rtol=1e-5, atol=1e-5)
    order = one[2].argsort(-1)
    assert torch.equal(one[2].gather(-1, order), two[2])
    for kind in ("BatchTopK", "Matryoshka"):
        slow, fast = pair(make(kind))
        check_equal(
            slow, fast, lambda d: d.encode(batch(), return_active=True, use_threshold=False)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_active_than_k(kind):
    dictionary = make(kind)
    with torch.no_grad():
        bias = dictionary.b_enc if kind == "Matryoshka" else dictionary.encoder.bias
        bias.fill_(-5.0)
    slow, fast = pair(dictionary)
    check_equal(
        slow, fast, lambda one: one.decode(one.encode(batch(), use_threshold=False)),
        lambda out: out.square().sum(),
    )  # fmt: skip


def test_fewer_groups():
    dictionary = make("Matryoshka")
    dictionary.active_groups = 2
    slow, fast = pair(dictionary)
    check_equal(slow, fast, lambda one: one.encode(batch(), use_threshold=False))


@pytest.mark.parametrize("kind", KINDS)
def test_own_trainer(kind):
    """Losses, thresholds, counts and weights, over steps in which latents die."""
    slow, fast = trainer(kind), trainer(kind)
    sparsekern.accelerate(fast.ae)
    died = False
    for step in range(12):
        x = batch(step)
        losses = [one.update(step, x) for one in (slow, fast)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert slow.dead_features == fast.dead_features
        died |= slow.dead_features > 0
        if kind != "TopK":  # it also counts selected latents that are zero, which are arbitrary
            assert torch.equal(slow.num_tokens_since_fired, fast.num_tokens_since_fired)
        torch.testing.assert_close(fast.ae.threshold, slow.ae.threshold, rtol=1e-4, atol=1e-5)
    assert died, "AuxK was never on"
    for one, two in zip(slow.ae.parameters(), fast.ae.parameters(), strict=True):
        # Adam takes the sign of a gradient that is near zero: one of its steps, at most
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    logged = [one.loss(batch(), step=20, logging=True) for one in (slow, fast)]
    torch.testing.assert_close(logged[1].f + 0, logged[0].f, rtol=1e-3, atol=1e-3)
    assert logged[1].losses == pytest.approx(logged[0].losses, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainers_loss_never_makes_dense_tensors(kind, monkeypatch):
    one = trainer(kind)
    sparsekern.accelerate(one.ae)
    one.num_tokens_since_fired.fill_(1000)  # AuxK is on

    def refuse(*_):
        raise AssertionError("a dense tensor was made")

    for content in ("LateCodes", "LateScores"):
        monkeypatch.setattr(f"sparsekern.integrations.acceleration.late.{content}.dense", refuse)
    one.loss(batch(), step=10).backward()


def test_scores_after_a_step_are_refused():
    dictionary = sparsekern.accelerate(make("TopK"))
    _, _, _, scores = dictionary.encode(batch(), return_topk=True)
    with torch.no_grad():
        dictionary.encoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="must be used before the tensors"):
        scores.sum()


def test_hooks():
    slow, fast = pair(make("TopK"))
    for one in (slow, fast):
        one.encoder.register_forward_hook(lambda module, args, out: out * 2)
        one.decoder.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check_equal(slow, fast, lambda one: one(batch()), lambda out: out.square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_lifecycle(kind):
    check_lifecycle(make(kind), lambda one: one(batch()))
