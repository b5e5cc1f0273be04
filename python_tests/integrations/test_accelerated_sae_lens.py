"""SAELens' autoencoders, its trainer, hooks and registries, accelerated and not."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from accelerated import ROWS, D, K, N, batch, check_equal, check_lifecycle, pair, peer, randomize

import sparsekern
from sparsekern.integrations.acceleration import LateTensor, report

sae_lens = peer("sae_lens")
from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput  # noqa: E402

WIDTHS = [40, 120, N]
KINDS = {
    "TopK": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {}),
    "BatchTopK": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {}),
    "Matryoshka": (
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": WIDTHS},
    ),
    "Matryoshka, own AuxK": (
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": WIDTHS, "use_matryoshka_aux_loss": True},
    ),
}


def make(kind="TopK", k=K, **options):
    cls, config, extra = KINDS[kind]
    sae = cls(config(d_in=D, d_sae=N, k=k, **{**copy.deepcopy(extra), **options}))
    randomize(sae)
    return sae


def step_input(dead=None, x=None):
    return TrainStepInput(
        sae_in=batch() if x is None else x, coefficients={}, dead_neuron_mask=dead,
        n_training_steps=0, is_logging_step=False,
    )  # fmt: skip


DEAD = {
    "no AuxK": None,
    "none dead": torch.zeros(N, dtype=torch.bool),
    "few dead": torch.arange(N) % 37 == 5,
    "many dead": torch.arange(N) % 3 == 0,
}


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("kind", KINDS)
def test_training_pass(kind, dead, rescale):
    slow, fast = pair(make(kind, rescale_acts_by_decoder_norm=rescale))
    check_equal(
        slow, fast, lambda sae: sae.training_forward_pass(step_input(DEAD[dead])),
        lambda output: output.loss,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_pass_never_makes_dense_tensors(kind, monkeypatch):
    _, fast = pair(make(kind))
    output = fast.training_forward_pass(step_input(DEAD["many dead"]))
    output.loss.backward()
    for tensor in (output.feature_acts, output.hidden_pre):
        assert type(tensor) is LateTensor and tensor._state.dense is None


def test_fewer_positive_scores_than_k():
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-6.0)
    slow, fast = pair(sae)
    check_equal(
        slow, fast, lambda sae: sae.training_forward_pass(step_input(DEAD["many dead"])),
        lambda output: output.loss,
    )  # fmt: skip


@pytest.mark.parametrize("options", [
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": False},
    {"k": 1}, {"k": N},
], ids=str)  # fmt: skip
def test_options(options):
    slow, fast = pair(make(**options))
    check_equal(slow, fast, lambda sae: sae(batch()), lambda out: out.square().sum())
    check_equal(slow, fast, lambda sae: sae.encode(batch()), lambda acts: acts.square().sum())
    check_equal(
        slow, fast, lambda sae: sae.training_forward_pass(step_input()), lambda out: out.loss
    )


def test_losses_may_look_at_scores_and_activations():
    """Whatever codes cannot express is the dense tensor, with its gradient."""
    slow, fast = pair(make())

    def call(sae):
        acts, scores = sae.encode_with_hidden_pre(batch())
        return acts, scores, sae.decode(acts)

    def loss(result):
        acts, scores, out = result
        return acts.exp().sum() + scores.tanh().sum() + (scores[:, 3:9] * 2).sum() + out.sum()

    check_equal(slow, fast, call, loss)


def test_gradients_of_activations_that_are_kept():
    grads = []
    for sae in pair(make()):
        acts, _ = sae.encode_with_hidden_pre(batch())
        acts.retain_grad()
        sae.decode(acts).square().sum().backward()
        grads.append(acts.grad + 0)
    assert grads[0].count_nonzero() > ROWS * K  # those of latents that are not active, too
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (5,), (4, 7)], ids=str)
@pytest.mark.parametrize("rescale", [True, False])
def test_inference(shape, rescale):
    config = sae_lens.TopKSAEConfig(d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=rescale)
    sae = sae_lens.TopKSAE(config)
    randomize(sae)
    slow, fast = pair(sae)
    x = batch(0, *shape) if shape else batch(0, 1)[0]
    check_equal(slow, fast, lambda sae: (sae.encode(x), sae(x)), lambda out: out[1].square().sum())
    assert type(fast.encode(x)) is torch.Tensor and type(fast(x)) is torch.Tensor
    values, indices = fast.encode_sparse(x)
    dense = torch.zeros(*x.shape[:-1], N).scatter(-1, indices, values)
    torch.testing.assert_close(dense, slow.encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 4.0, -1.0])
def test_jumprelu(threshold):
    """As which BatchTopK is saved for inference."""
    sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=N))
    randomize(sae)
    with torch.no_grad():
        sae.threshold.copy_(threshold + 0.1 * torch.rand(N))
    slow, fast = pair(sae)
    for x in (batch(), batch(0, 2, 3), batch(0, 1)[0]):
        check_equal(
            slow, fast, lambda sae, x=x: (sae.encode(x), sae(x)),
            lambda out: out[0].sum() + out[1].square().sum(),
        )  # fmt: skip
    values, indices = fast.encode_sparse(batch())
    dense = torch.zeros(ROWS, N).scatter_add(-1, indices, values)
    torch.testing.assert_close(dense, slow.encode(batch()), rtol=1e-5, atol=1e-5)


def test_sparse_activations_stay_sparse():
    slow, fast = pair(make(use_sparse_activations=True, rescale_acts_by_decoder_norm=False))
    one, two = slow.encode(batch()), fast.encode(batch())
    assert two.is_sparse
    torch.testing.assert_close(two.to_dense(), one.to_dense(), rtol=1e-5, atol=1e-5)
    check_equal(
        slow, fast, lambda sae: sae.training_forward_pass(step_input()).losses,
        lambda losses: losses["mse_loss"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_hooks_get_dense_tensors_and_may_change_them(name):
    slow, fast = pair(make())
    seen = []

    def change(acts, hook):
        seen.append(type(acts))
        return acts * 2

    for sae in (slow, fast):
        getattr(sae, name).add_hook(change)
    check_equal(slow, fast, lambda sae: sae(batch()), lambda out: out.square().sum())
    assert seen == [torch.Tensor] * 2
    for sae in (slow, fast):
        sae.reset_hooks()
    cached = [sae.run_with_cache(batch())[1] for sae in (slow, fast)]
    assert set(cached[0]) == set(cached[1])
    for key in cached[0]:
        torch.testing.assert_close(cached[1][key], cached[0][key], rtol=1e-5, atol=1e-5)


def test_error_term():
    slow, fast = pair(make())
    for sae in (slow, fast):
        sae._use_error_term = True
    check_equal(slow, fast, lambda sae: sae(batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_lifecycle(kind):
    check_lifecycle(make(kind), lambda sae: sae(batch()), pickled=False)  # it holds lambdas


def trainer(sae, rows=ROWS):
    config = SAETrainerConfig(
        total_training_samples=rows * 30, train_batch_size_samples=rows, lr=1e-3, lr_end=1e-3,
        dead_feature_window=3, feature_sampling_window=7,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return sae_lens.SAETrainer(config, sae, iter(batch(seed, rows) for seed in range(1000)))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_own_trainer(kind, autocast):
    """The same losses, counts, thresholds and weights, over steps in which latents die."""
    slow, fast = pair(make(kind, k=3))
    trainers = [trainer(slow), trainer(fast)]
    for one in trainers:
        if autocast:
            one.autocast_if_enabled = torch.autocast("cpu", dtype=torch.bfloat16)
    steps = 2 if autocast else 30  # in bfloat16 near ties are decided otherwise
    for _ in range(steps):
        outputs = []
        for one in trainers:
            outputs.append(one.step(next(one.data_provider)))
            one.n_training_steps += 1
        rtol = 3e-2 if autocast else 1e-4
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=rtol, atol=1e-4)
    if autocast:
        return
    torch.testing.assert_close(trainers[1].act_freq_scores, trainers[0].act_freq_scores)
    torch.testing.assert_close(
        trainers[1].n_forward_passes_since_fired, trainers[0].n_forward_passes_since_fired
    )
    assert trainers[0].dead_neurons.any(), "AuxK was never on"
    logs = [
        one.build_train_step_log_dict(output, 1)
        for one, output in zip(trainers, outputs, strict=True)
    ]
    assert set(logs[0]) == set(logs[1])
    for key, value in logs[0].items():
        if isinstance(value, float):
            assert logs[1][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    for one, two in zip(slow.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)


def test_saved_and_loaded(tmp_path):
    slow, fast = pair(make("BatchTopK"))
    for sae, name in ((slow, "slow"), (fast, "fast")):
        sae.training_forward_pass(step_input())
        sae.save_inference_model(tmp_path / name)
    loaded = [sae_lens.SAE.load_from_disk(tmp_path / name) for name in ("slow", "fast")]
    check_equal(*loaded, lambda sae: sae(batch()))


def test_classes_made_later():
    """A subclass that is registered later, with methods of its own, which stay."""

    @dataclasses.dataclass
    class LaterConfig(sae_lens.TopKTrainingSAEConfig):
        @classmethod
        def architecture(cls):
            return "later"

    class Later(sae_lens.TopKTrainingSAE):
        def calculate_aux_loss(self, **arguments):
            own = arguments["feature_acts"].abs().sum(-1).mean()
            return {**super().calculate_aux_loss(**arguments), "own": own}

    class Overriding(sae_lens.TopKTrainingSAE):
        def encode_with_hidden_pre(self, x):
            acts, scores = super().encode_with_hidden_pre(x)
            return acts * 2, scores

    sae_lens.register_sae_class("later", sae_lens.TopKSAE, sae_lens.TopKSAEConfig)
    sae_lens.register_sae_training_class("later", Later, LaterConfig)
    sae = Later(LaterConfig(d_in=D, d_sae=N, k=K))
    randomize(sae)
    slow, fast = pair(sae)
    check_equal(
        slow, fast, lambda sae: sae.training_forward_pass(step_input(DEAD["many dead"])),
        lambda output: output.loss,
    )  # fmt: skip
    own = Overriding(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K))
    randomize(own)
    expected = own.encode(batch())
    sparsekern.accelerate(own)
    assert type(own) is Overriding and "encode_with_hidden_pre is its own" in str(report(own))
    assert "activation_fn" in report(own).replaced  # its layer is still faster
    torch.testing.assert_close(own.encode(batch()), expected)


def test_other_classes_are_left():
    sae = sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(d_in=D, d_sae=N))
    with pytest.warns(UserWarning, match="no faster form of this class is known"):
        sparsekern.accelerate(sae)
    assert type(sae) is sae_lens.StandardTrainingSAE


COMPILED = """
import torch, sae_lens, sparsekern
sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=8, d_sae=40, k=3))
x = torch.randn(5, 8)
expected = sae(x)
compiled = torch.compile(sparsekern.accelerate(sae), backend="eager")
torch.testing.assert_close(compiled(x), expected)
try:
    sparsekern.accelerate(compiled)
except ValueError as error:
    assert "must not be compiled yet" in str(error)
else:
    raise AssertionError("a compiled model was accelerated")
"""


def test_compiled_afterwards():
    """In a process of its own: nnsight, which dictionary_learning imports, changes torch."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
