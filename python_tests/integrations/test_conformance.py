"""What other libraries document of their autoencoders, as they are and accelerated.

The packages ship no tests. So each test states a sentence of a library's documentation, and runs on
the library's own model ("upstream") and on one that is accelerated ("accelerated").
bench/conformance.py records how many of each pass.
"""

from __future__ import annotations

import copy
import json

import openai_stand_in
import pytest
import torch
from accelerated import ROWS, D, K, N, batch, imported, randomize
from torch.nn import functional as F

import sparsekern


@pytest.fixture(params=["upstream", "accelerated"])
def ready(request):
    """Give a model random weights and, in half of the tests, accelerate it."""

    def prepare(model):
        randomize(model)
        return sparsekern.accelerate(model) if request.param == "accelerated" else model

    return prepare


def kept(scores, k):
    values, indices = scores.topk(k)
    return torch.zeros_like(scores).scatter(-1, indices, values.relu())


def close(one, two):
    torch.testing.assert_close(one + 0, two, rtol=1e-4, atol=1e-4)


# -- SAELens -------------------------------------------------------------------------------------


class TestSAELens:
    """docs/training_saes.md, docs/usage.md, docs/extending_saelens.md."""

    @pytest.fixture
    def library(self):
        return imported("sae_lens")

    def training(self, library, ready, kind="TopK", **options):
        config = getattr(library, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=N, k=K, **options)
        return ready(getattr(library, f"{kind}TrainingSAE")(config))

    def inference(self, library, ready, **options):
        return ready(library.TopKSAE(library.TopKSAEConfig(d_in=D, d_sae=N, k=K, **options)))

    def step(self, sae, dead=None):
        module = imported("sae_lens.saes.sae")
        return sae.training_forward_pass(
            module.TrainStepInput(
                sae_in=batch(), coefficients={}, dead_neuron_mask=dead, n_training_steps=0,
                is_logging_step=False,
            )
        )  # fmt: skip

    def test_encode_keeps_k_latents(self, library, ready):
        sae = self.inference(library, ready)
        acts = sae.encode(batch())
        assert acts.shape == (ROWS, N) and (acts != 0).sum(-1).max() <= K and (acts >= 0).all()
        close(acts, kept((batch() - sae.b_dec) @ sae.W_enc + sae.b_enc, K))

    def test_decode_is_linear_in_the_activations(self, library, ready):
        sae = self.inference(library, ready)
        acts = torch.rand(3, N)
        close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)

    def test_forward_is_decode_of_encode(self, library, ready):
        sae = self.inference(library, ready)
        close(sae(batch()), sae.decode(sae.encode(batch())))

    def test_activations_keep_leading_dimensions(self, library, ready):
        sae = self.inference(library, ready)
        x = batch(0, 2, 5)
        assert sae.encode(x).shape == (2, 5, N) and sae(x).shape == x.shape
        close(sae.encode(x)[1], sae.encode(x[1]))

    def test_rescaled_activations_do_not_depend_on_decoder_norms(self, library, ready):
        sae = self.training(library, ready)
        out = sae(batch())
        with torch.no_grad():
            factors = torch.rand(N, 1) + 0.5
            sae.W_dec.mul_(factors)
            sae.W_enc.div_(factors.T)
            sae.b_enc.div_(factors[:, 0])
        close(sae(batch()), out)

    def test_fold_w_dec_norm_keeps_outputs(self, library, ready):
        sae = self.inference(library, ready, rescale_acts_by_decoder_norm=True)
        out = sae(batch())
        sae.fold_W_dec_norm()
        close(sae.W_dec.norm(dim=-1), torch.ones(N))
        close(sae(batch()), out)

    @pytest.mark.parametrize("kind", ["TopK", "BatchTopK"])
    def test_loss_is_mean_squared_error_summed_over_features(self, library, ready, kind):
        sae = self.training(library, ready, kind)
        output = self.step(sae)
        error = (output.sae_out - batch()).square().sum(-1).mean()
        close(output.losses["mse_loss"], error)
        close(output.loss, sum(output.losses.values()))

    @pytest.mark.parametrize("kind", ["TopK", "BatchTopK"])
    def test_auxiliary_loss_trains_dead_latents_only(self, library, ready, kind):
        sae = self.training(library, ready, kind)
        dead = torch.arange(N) % 3 == 0
        self.step(sae, dead).losses["auxiliary_reconstruction_loss"].backward()
        moved = sae.b_enc.grad != 0
        assert moved.any() and not moved[~dead].any()

    def test_no_auxiliary_loss_without_dead_latents(self, library, ready):
        sae = self.training(library, ready)
        losses = self.step(sae, torch.zeros(N, dtype=torch.bool)).losses
        assert losses["auxiliary_reconstruction_loss"] == 0

    def test_batch_topk_keeps_k_on_average(self, library, ready):
        sae = self.training(library, ready, "BatchTopK")
        acts = self.step(sae).feature_acts
        assert (acts > 0).float().sum() == ROWS * K

    def test_batch_topk_follows_the_smallest_activation(self, library, ready):
        sae = self.training(library, ready, "BatchTopK", topk_threshold_lr=0.5)
        acts = self.step(sae).feature_acts
        close(sae.topk_threshold.float(), 0.5 * acts[acts > 0].min().detach())

    def test_matryoshka_has_a_loss_for_each_level(self, library, ready):
        sae = self.training(
            library, ready, "MatryoshkaBatchTopK", matryoshka_widths=[20, 60, N]
        )  # fmt: skip
        output = self.step(sae)
        acts = (output.feature_acts + 0) / sae.W_dec.norm(dim=-1)
        for width in (20, 60):
            inner = acts[:, :width] @ sae.W_dec[:width] + sae.b_dec
            error = (inner - batch()).square().sum(-1).mean()
            close(output.losses[f"inner_mse_loss_{width}"], error)

    def test_run_with_cache_has_every_hook(self, library, ready):
        sae = self.inference(library, ready)
        out, cache = sae.run_with_cache(batch())
        names = ("input", "acts_pre", "acts_post", "recons", "output")
        assert {f"hook_sae_{name}" for name in names} <= set(cache)
        close(cache["hook_sae_acts_post"], sae.encode(batch()))
        close(cache["hook_sae_output"], out)

    def test_hooks_change_activations(self, library, ready):
        sae = self.inference(library, ready)

        def ablate(acts, hook):
            acts[:, : N // 2] = 0
            return acts

        acts = sae.encode(batch())
        acts[:, : N // 2] = 0
        out = sae.run_with_hooks(batch(), fwd_hooks=[("hook_sae_acts_post", ablate)])
        close(out, sae.decode(acts))

    @pytest.mark.parametrize("kind", ["TopK", "BatchTopK"])
    def test_saved_for_inference_and_loaded(self, library, ready, kind, tmp_path):
        sae = self.training(library, ready, kind)
        self.step(sae)
        sae.save_inference_model(tmp_path)
        loaded = library.SAE.load_from_disk(tmp_path)
        config = json.loads((tmp_path / "cfg.json").read_text())
        assert config["architecture"] == {"TopK": "topk", "BatchTopK": "jumprelu"}[kind]
        if kind == "TopK":
            close(loaded(batch()), sae(batch()))

    def test_saved_and_loaded_for_training(self, library, ready, tmp_path):
        sae = self.training(library, ready)
        sae.save_model(tmp_path)
        loaded = library.TrainingSAE.load_from_disk(tmp_path)
        assert type(loaded) is library.TopKTrainingSAE
        close(loaded(batch()), sae(batch()))

    def test_config_round_trip(self, library, ready):
        sae = self.training(library, ready)
        again = library.TrainingSAE.from_dict(sae.cfg.to_dict())
        assert isinstance(again, library.TopKTrainingSAE) and again.cfg.k == K

    def test_registered_classes(self, library, ready):
        registry = imported("sae_lens.registry")
        cls, _ = registry.get_sae_training_class("topk")
        assert isinstance(self.training(library, ready), cls)

    def test_conversion_of_dtypes(self, library, ready):
        sae = self.inference(library, ready).to(torch.bfloat16)
        assert sae(batch()).dtype == torch.bfloat16 and sae.cfg.dtype in (
            "bfloat16",
            "torch.bfloat16",
        )

    def test_trainer_trains(self, library, ready):
        config = imported("sae_lens.config")
        sae = self.training(library, ready)
        trainer = library.SAETrainer(
            config.SAETrainerConfig(
                total_training_samples=ROWS * 20, train_batch_size_samples=ROWS, lr=1e-2,
                lr_end=1e-2, logger=config.LoggingConfig(log_to_wandb=False),
            ), sae, iter(batch(seed % 4) for seed in range(1000)),
        )  # fmt: skip
        before = self.step(sae).loss.item()
        assert trainer.fit() is sae
        assert self.step(sae).loss.item() < before / 2
        assert trainer.act_freq_scores.sum() <= ROWS * 20 * K


# -- sparsify ------------------------------------------------------------------------------------


class TestSparsify:
    """README.md and the fields of EncoderOutput and ForwardOutput."""

    @pytest.fixture
    def library(self):
        return imported("sparsify")

    def make(self, library, ready, **options):
        config = library.SparseCoderConfig(num_latents=N, k=K, **options)
        return ready(library.SparseCoder(D, config))

    def test_encode_returns_the_k_largest(self, library, ready):
        coder = self.make(library, ready)
        out = coder.encode(batch())
        scores = F.relu(F.linear(batch() - coder.b_dec, coder.encoder.weight, coder.encoder.bias))
        close(out.pre_acts, scores)
        close(torch.zeros(ROWS, N).scatter(-1, out.top_indices, out.top_acts), kept(scores, K))

    def test_decode_sums_rows_of_w_dec(self, library, ready):
        coder = self.make(library, ready)
        acts, indices = torch.rand(5, K), torch.randint(N, (5, K))
        expected = torch.einsum("bk,bkd->bd", acts, coder.W_dec[indices]) + coder.b_dec
        close(coder.decode(acts, indices), expected)

    def test_fvu(self, library, ready):
        coder, x = self.make(library, ready), batch()
        out = coder(x)
        close(out.fvu, (x - out.sae_out).pow(2).sum() / (x - x.mean(0)).pow(2).sum())

    def test_auxk_is_zero_without_dead_latents(self, library, ready):
        coder = self.make(library, ready)
        assert coder(batch(), dead_mask=torch.zeros(N, dtype=torch.bool)).auxk_loss == 0

    def test_auxk_trains_dead_decoder_rows_only(self, library, ready):
        coder = self.make(library, ready)
        dead = torch.arange(N) % 3 == 0
        coder(batch(), dead_mask=dead).auxk_loss.backward()
        moved = (coder.W_dec.grad != 0).any(-1)
        assert moved.any() and not moved[~dead].any()

    def test_multi_topk_uses_four_times_k(self, library, ready):
        coder = self.make(library, ready, multi_topk=True)
        out = coder(batch())
        assert out.multi_topk_fvu > 0 and out.latent_indices.shape[-1] == 4 * K

    def test_groupmax_takes_one_latent_of_each_group(self, library, ready):
        config = library.SparseCoderConfig(num_latents=N, k=8, activation="groupmax")
        coder = ready(library.SparseCoder(D, config))
        groups = coder.encode(batch()).top_indices.sort(-1).values // (N // 8)
        assert torch.equal(groups, torch.arange(8).expand(ROWS, 8))

    def test_transcoder_with_a_skip_connection(self, library, ready):
        coder = self.make(library, ready, transcode=True, skip_connection=True)
        out = coder(batch(), batch(2))
        acts, indices, _ = coder.encode(batch())
        close(out.sae_out, coder.decode(acts, indices) + batch() @ coder.W_skip.mT)

    def test_decoder_rows_of_norm_one(self, library, ready):
        coder = self.make(library, ready)
        coder.set_decoder_norm_to_unit_norm()
        close(coder.W_dec.norm(dim=1), torch.ones(N))
        coder(batch()).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        close((coder.W_dec.grad * coder.W_dec).sum(1), torch.zeros(N))

    def test_saved_and_loaded(self, library, ready, tmp_path):
        coder = self.make(library, ready)
        coder.save_to_disk(tmp_path)
        close(library.SparseCoder.load_from_disk(tmp_path)(batch()).sae_out, coder(batch()).sae_out)


# -- dictionary_learning ---------------------------------------------------------------------------


class TestDictionaryLearning:
    """README.md: encode, decode, forward with output_features, from_pretrained, trainers."""

    @pytest.fixture
    def library(self):
        imported("dictionary_learning")
        return imported("dictionary_learning.trainers.top_k")

    def make(self, library, ready):
        return ready(library.AutoEncoderTopK(D, N, K))

    def test_encode(self, library, ready):
        ae = self.make(library, ready)
        scores = F.linear(batch() - ae.b_dec, ae.encoder.weight, ae.encoder.bias)
        close(ae.encode(batch()), kept(scores, K))

    def test_encode_with_its_codes(self, library, ready):
        ae = self.make(library, ready)
        acts, values, indices, scores = ae.encode(batch(), return_topk=True)
        close(acts, torch.zeros(ROWS, N).scatter(-1, indices, values))
        assert (scores >= 0).all() and scores.shape == (ROWS, N)

    def test_decode(self, library, ready):
        ae = self.make(library, ready)
        acts = torch.rand(5, N)
        close(ae.decode(acts), acts @ ae.decoder.weight.T + ae.b_dec)

    def test_forward_with_features(self, library, ready):
        ae = self.make(library, ready)
        out, features = ae(batch(), output_features=True)
        close(out, ae(batch()))
        close(features, ae.encode(batch()))

    def test_threshold(self, library, ready):
        ae = self.make(library, ready)
        ae.threshold.fill_(0.5)
        acts = ae.encode(batch(), use_threshold=True)
        assert (acts[acts != 0] > 0.5).all()

    def test_scale_biases(self, library, ready):
        ae = self.make(library, ready)
        out = ae(batch())
        ae.scale_biases(3.0)
        close(ae(3 * batch()), 3 * out)

    def test_saved_and_loaded(self, library, ready, tmp_path):
        ae = self.make(library, ready)
        torch.save(ae.state_dict(), tmp_path / "ae.pt")
        loaded = library.AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt", k=K)
        close(loaded(batch()), ae(batch()))

    def test_gradients_parallel_to_directions_are_removed(self, library, ready):
        trainer = library.TopKTrainer(
            steps=10, activation_dim=D, dict_size=N, k=K, layer=0, lm_name="none", device="cpu",
            warmup_steps=1, lr=1e-2,
        )  # fmt: skip
        ready(trainer.ae)
        losses = [trainer.update(step, batch(step % 3)) for step in range(9)]
        assert losses[-1] < losses[0]
        close(trainer.ae.decoder.weight.norm(dim=0), torch.ones(N))

    @pytest.mark.parametrize("module, name", [
        ("batch_top_k", "BatchTopKSAE"), ("matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE"),
    ])  # fmt: skip
    def test_batch_topk_keeps_k_on_average(self, library, ready, module, name):
        cls = getattr(imported(f"dictionary_learning.trainers.{module}"), name)
        sizes = ([50, N - 50],) if name.startswith("Matryoshka") else ()
        ae = ready(cls(D, N, K, *sizes))
        acts = ae.encode(batch(), use_threshold=False)
        assert (acts > 0).sum() == ROWS * K
        ae.threshold.fill_(0.5)
        assert (ae.encode(batch())[ae.encode(batch()) != 0] > 0.5).all()


# -- overcomplete ----------------------------------------------------------------------------------


class TestOvercomplete:
    """docs/saes: pre-codes, codes and reconstruction; a dictionary of norm 1."""

    @pytest.fixture
    def library(self):
        return imported("overcomplete.sae")

    def make(self, library, ready, **options):
        return ready(library.TopKSAE(D, nb_concepts=N, top_k=K, **options))

    def test_forward_returns_three_tensors(self, library, ready):
        sae = self.make(library, ready)
        pre_codes, codes, out = sae(batch())
        close(codes, kept(pre_codes + 0, K))
        close(out, (codes + 0) @ sae.get_dictionary())

    def test_dictionary_of_norm_one(self, library, ready):
        close(self.make(library, ready).get_dictionary().norm(dim=1), torch.ones(N))

    def test_tied(self, library, ready):
        sae = self.make(library, ready).tied()
        pre_codes, _ = sae.encode(batch())
        close(pre_codes, batch() @ sae.get_dictionary().T)

    def test_evaluation_mode(self, library, ready):
        sae = self.make(library, ready)
        out = sae(batch())[2]
        close(sae.eval()(batch())[2], out)

    def test_train_sae(self, library, ready):
        sae = self.make(library, ready)
        loader = [batch(seed) for seed in range(4)]

        def criterion(x, x_hat, pre_codes, codes, dictionary):
            return (x - x_hat).square().mean()

        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        logs = library.train_sae(sae, loader, criterion, optimizer, nb_epochs=8)
        assert logs["avg_loss"][-1] < logs["avg_loss"][0]


# -- OpenAI ----------------------------------------------------------------------------------------


class TestOpenAI:
    """README.md of sparse_autoencoder; the classes are a stand-in, since no index has them."""

    @pytest.fixture
    def library(self, monkeypatch):
        return openai_stand_in.install(monkeypatch)

    def make(self, library, ready):
        return ready(library.Autoencoder(N, D, library.TopK(K)))

    def test_forward_returns_three_tensors(self, library, ready):
        autoencoder = self.make(library, ready)
        scores, latents, out = autoencoder(batch())
        close(latents, kept(scores + 0, K))
        close(out, autoencoder.decode(latents + 0))

    def test_encode_and_decode(self, library, ready):
        autoencoder = self.make(library, ready)
        latents, info = autoencoder.encode(batch())
        close(autoencoder.decode(latents, info), autoencoder(batch())[2])

    def test_steps_since_a_latent_fired(self, library, ready):
        autoencoder = self.make(library, ready)
        for _ in range(3):
            _, latents, _ = autoencoder(batch())
        fired = (latents != 0).any(0)
        expected = torch.where(fired, 1, 3)
        assert torch.equal(autoencoder.stats_last_nonzero, expected)

    def test_state_dict(self, library, ready):
        autoencoder = self.make(library, ready)
        other = library.Autoencoder(N, D, library.TopK(K))
        other.load_state_dict(copy.deepcopy(autoencoder.state_dict()))
        close(other(batch())[2], autoencoder(batch())[2])
