"""Checkpoints of other libraries, read and written; each library's formula stands in its test."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from autoencoders import (
    D,
    K,
    N,
    assert_same_files,
    check_equal,
    dense_topk,
    inputs,
    random_state,
    scores_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsekern
from sparsekern.cli.command import main
from sparsekern.integrations import checkpoints
from sparsekern.integrations.checkpoints import WRITTEN, read, write
from sparsekern.models import SparseAutoencoder

# -- sparsify ------------------------------------------------------------------------------------


def write_sparsify(folder, state, **changes):
    folder.mkdir(exist_ok=True)
    tensors = {
        "encoder.weight": state["encoder"], "encoder.bias": state["encoder_bias"],
        "W_dec": state["dictionary"], "b_dec": state["decoder_bias"],
    }  # fmt: skip
    tensors |= changes.pop("tensors", {})
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "sae.safetensors")
    config = {
        "activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0,
        "k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    } | changes  # fmt: skip
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_is_read(tmp_path, activation):
    state, x = random_state(), inputs()
    model = SparseAutoencoder.from_pretrained(
        write_sparsify(tmp_path / "a", state, activation=activation)
    )
    scores = scores_of(state, x).relu()
    if activation == "topk":
        codes = dense_topk(scores, K)
    else:
        values, places = scores.unflatten(-1, (K, -1)).max(-1)
        offsets = torch.arange(K) * (N // K)
        codes = torch.zeros_like(scores).scatter(-1, places + offsets, values)
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["sparsekern", "sparsify", "saelens", "dictionary_learning"])
def test_sparsify_goes_out_and_comes_back(tmp_path, to, dtype):
    source = write_sparsify(tmp_path / "a", random_state(dtype=dtype))
    write(read(source), tmp_path / "b", to)
    write(read(tmp_path / "b"), tmp_path / "c", "sparsify")
    assert_same_files(source / "sae.safetensors", tmp_path / "c" / "sae.safetensors")
    assert json.loads((tmp_path / "c" / "cfg.json").read_text())["k"] == K
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "cfg.json", "sae.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"skip_connection": True}, "cfg.json: skip_connection must be False, .* got True"),
        ({"transcode": True}, "cfg.json: transcode must be False"),
        ({"activation": "relu"}, "cfg.json: activation must be 'topk' or 'groupmax', got 'relu'"),
        ({"k": "absent"}, "cfg.json: k is missing"),
        ({"k": 0}, "cfg.json: k must be an integer of at least 1, got 0"),
        ({"k": N + 1}, f"cfg.json: k must be at most the number of latents, {N}, got {N + 1}"),
        ({"k": 7, "activation": "groupmax"}, "cfg.json: k must be a divisor"),
        ({"colour": 3}, "cfg.json: colour is not known, got 3"),
        ({"num_latents": 50}, r"must have shape \[50(, 24)?\], got \[96(, 24)?\]"),
        ({"tensors": {"b_dec": None}}, "sae.safetensors: b_dec is missing"),
        ({"tensors": {"W_skip": torch.zeros(D, D)}}, "sae.safetensors: W_skip is not known"),
        ({"tensors": {"b_dec": torch.zeros(D).half()}}, "b_dec must have the dtype of"),
        ({"tensors": {"b_dec": torch.full((D,), torch.nan)}}, "b_dec must be finite, got nan"),
    ],
)
def test_what_sparsify_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_sparsify(tmp_path / "a", random_state(), **changes))


# -- SAELens -------------------------------------------------------------------------------------


def write_saelens(folder, state, architecture, **changes):
    folder.mkdir(exist_ok=True)
    tensors = {
        "W_enc": state["encoder"].t().contiguous(), "b_enc": state["encoder_bias"],
        "W_dec": state["dictionary"], "b_dec": state["decoder_bias"],
    }  # fmt: skip
    tensors |= changes.pop("tensors", {})
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "d_in": D, "d_sae": N, "dtype": "float32", "device": "cuda", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "m", "hook_name": "blocks.3"},
        "architecture": architecture,
    } | changes  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("rescale", [False, True])
def test_saelens_topk_is_read(tmp_path, rescale):
    state, x = random_state(), inputs()
    folder = write_saelens(tmp_path / "a", state, "topk", k=K, rescale_acts_by_decoder_norm=rescale)
    model = SparseAutoencoder.from_pretrained(folder)
    norms = state["dictionary"].norm(dim=-1) if rescale else 1
    codes = dense_topk(scores_of(state, x) * norms, K)
    check_equal(
        model, state, codes, (codes / norms) @ state["dictionary"] + state["decoder_bias"], x
    )


def test_saelens_jumprelu_is_read_with_its_thresholds_to_the_bit(tmp_path):
    """A score equal to its threshold is not active; one bit above it is."""
    state = random_state()
    state["decoder_bias"] = torch.zeros(D)
    theta = torch.rand(N, generator=torch.Generator().manual_seed(4)) * 2
    theta[0], theta[1], theta[2] = 0.0, 1e-30, 1e30
    folder = write_saelens(tmp_path / "a", state, "jumprelu", tensors={"threshold": theta})
    model = SparseAutoencoder.from_pretrained(folder)
    x = inputs()
    scores = scores_of(state, x)
    codes = scores.relu() * (scores > theta)
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)
    assert torch.equal(model.activation.threshold.float(), theta)
    above = torch.nextafter(theta, torch.full_like(theta, torch.inf))
    assert not model.activation(theta).any()
    assert torch.equal(model.activation(above), above)


def test_many_latents_take_the_sparse_path(tmp_path):
    """With few active among many, the codes are selected without all scores."""
    draw = torch.Generator().manual_seed(1)
    n = 4096
    state = {
        "encoder": torch.randn(n, D, generator=draw) / D**0.5, "encoder_bias": torch.zeros(n),
        "dictionary": torch.randn(n, D, generator=draw), "decoder_bias": torch.randn(D) * 0.1,
    }  # fmt: skip
    theta = 2.5 + torch.rand(n, generator=draw)
    folder = write_saelens(tmp_path / "a", state, "jumprelu", d_sae=n, tensors={"threshold": theta})
    model, x = SparseAutoencoder.from_pretrained(folder), inputs()
    scores = scores_of(state, x)
    codes = scores.relu() * (scores > theta)
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)
    assert model.encode(x).values.shape[-1] < n // 8


def test_saelens_standard_is_read(tmp_path):
    state, x = random_state(), inputs()
    model = SparseAutoencoder.from_pretrained(write_saelens(tmp_path / "a", state, "standard"))
    codes = scores_of(state, x).relu()
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)


def test_saelens_without_its_bias_in_the_input(tmp_path):
    state, x = random_state(), inputs()
    folder = write_saelens(tmp_path / "a", state, "topk", k=K, apply_b_dec_to_input=False)
    model = SparseAutoencoder.from_pretrained(folder)
    codes = dense_topk(x @ state["encoder"].t() + state["encoder_bias"], K)
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)
    for to in ("sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match=f"{to}: subtract_bias must be True"):
            model.save_pretrained(tmp_path / "b", to=to)
    for to in ("saelens", "sparsekern"):
        model.save_pretrained(tmp_path / to, to=to)
        assert not SparseAutoencoder.from_pretrained(tmp_path / to).subtract_bias


@pytest.mark.parametrize("to", ["sparsekern", "saelens"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saelens_goes_out_and_comes_back(tmp_path, architecture, to, dtype):
    more = {}
    if architecture == "topk":
        more = {"k": K, "rescale_acts_by_decoder_norm": True}
    if architecture == "jumprelu":
        more = {"tensors": {"threshold": torch.rand(N).to(dtype)}}
    source = write_saelens(tmp_path / "a", random_state(dtype=dtype), architecture, **more)
    write(read(source), tmp_path / "b", to)
    write(read(tmp_path / "b"), tmp_path / "c", "saelens")
    assert_same_files(*(tmp_path / name / "sae_weights.safetensors" for name in "ac"))
    before, after = (json.loads((tmp_path / name / "cfg.json").read_text()) for name in "ac")
    where = {"dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    assert after == before | where


def test_batch_topk_becomes_jumprelu(tmp_path):
    model, x = SparseAutoencoder(D, N, activation=sparsekern.BatchTopK(4)), inputs()
    with pytest.raises(ValueError, match="BatchTopK's threshold must be set"):
        model.eval().save_pretrained(tmp_path / "a", to="saelens")
    assert not (tmp_path / "a").exists()
    model.initialize(x)
    model.save_pretrained(tmp_path / "a", to="saelens")
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["architecture"] == "jumprelu"
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "a").eval()
    x = inputs(seed=10)  # a score that set the threshold is equal to it but for rounding
    torch.testing.assert_close(loaded(x).reconstruction, model(x).reconstruction)
    assert torch.equal(loaded.activation.threshold.float(), model.activation.threshold.expand(N))


def write_saelens_batch(folder, state, architecture="batchtopk", **changes):
    tensors = {"topk_threshold": torch.tensor(0.75, dtype=torch.double)}
    tensors |= changes.pop("tensors", {})
    settings = {
        "k": 3.5, "use_sparse_activations": False, "aux_loss_coefficient": 1.0,
        "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01, "decoder_init_norm": 0.1,
    } | changes  # fmt: skip
    return write_saelens(folder, state, architecture, tensors=tensors, **settings)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_in_training_is_read(tmp_path, architecture):
    state, x = random_state(), inputs()
    more = {"matryoshka_widths": [16, N]} if architecture.startswith("m") else {}
    folder = write_saelens_batch(tmp_path / "a", state, architecture, **more)
    model = SparseAutoencoder.from_pretrained(folder)
    norms = state["dictionary"].norm(dim=-1)
    scores = scores_of(state, x).relu() * norms
    codes = scores * (scores > 0.75)
    check_equal(
        model, state, codes, (codes / norms) @ state["dictionary"] + state["decoder_bias"], x
    )
    assert model.k == 3.5 and model.prefixes == ((16,) if more else ())
    with pytest.raises(ValueError, match=r"scale_scores must be False .*fold_norms"):
        model.save_pretrained(tmp_path / "b", to="saelens")
    before = model(x).reconstruction
    model.fold_norms()
    model.save_pretrained(tmp_path / "b", to="saelens")
    after = SparseAutoencoder.from_pretrained(tmp_path / "b").eval()(x).reconstruction
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_saelens_jumprelu_in_training_has_float32_thresholds(tmp_path):
    theta = torch.rand(N) + 0.1
    folder = write_saelens(
        tmp_path / "a", random_state(dtype=torch.bfloat16), "jumprelu",
        tensors={"threshold": theta}, jumprelu_bandwidth=0.05, l0_coefficient=2.0, target_l0=None,
    )  # fmt: skip
    model = SparseAutoencoder.from_pretrained(folder)
    assert torch.equal(model.activation.threshold.float(), theta)


OLD = {
    "hook_point": "blocks.5.hook_resid_pre", "model_name": "gpt2-small", "hook_point_layer": 5,
    "activation_fn_str": "relu", "l1_coefficient": 8e-5, "finetuning_scaling_factor": False,
    "normalize_activations": False, "reshape_activations": "none", "prepend_bos": True,
}  # fmt: skip


def write_old_saelens(folder, state, **changes):
    folder = write_saelens(folder, state, "standard", tensors=changes.pop("tensors", {}))
    config = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "device": "cpu"} | OLD | changes
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_saelens_before_6_is_read(tmp_path, activation):
    state, x = random_state(), inputs()
    more = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    folder = write_old_saelens(
        tmp_path / "a", state, tensors={"scaling_factor": torch.ones(N)},
        **(more if activation == "topk" else {"sae_lens_version": "5.3.0"}),
    )  # fmt: skip
    codes = scores_of(state, x).relu()
    codes = dense_topk(codes, K) if activation == "topk" else codes
    model = SparseAutoencoder.from_pretrained(folder)
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)
    write(read(folder), tmp_path / "b", "saelens")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert config["metadata"] == {
        "sae_lens_version": "6.0.0", "model_name": "gpt2-small", "prepend_bos": True,
        "hook_name": "blocks.5.hook_resid_pre",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor must be False"),
        ({"normalize_activations": True}, "normalize_activations must be 'none' .* got True"),
        ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn must be 'relu' or 'topk'"),
        ({"activation_fn_str": "topk"}, "cfg.json: k is missing"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": 3}, "kwargs must be an object"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "postact_fn": "relu"}},
         "postact_fn is not known"),
        ({"sae_lens_version": "new"}, "sae_lens_version must be a version"),
        ({"architecture": "gated"}, "architecture must be one of .* got 'gated'"),
        ({"tensors": {"scaling_factor": torch.full((N,), 2.0)}}, "scaling_factor must be 1"),
    ],
)  # fmt: skip
def test_what_old_saelens_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_old_saelens(tmp_path / "a", random_state(), **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 0}, "cfg.json: k must be a number above 0"),
        ({"k": True}, "cfg.json: k must be a number above 0"),
        ({"tensors": {"topk_threshold": torch.tensor(-1.0)}}, "topk_threshold must be at least 0"),
        ({"tensors": {"topk_threshold": torch.ones(N)}}, r"topk_threshold must have shape \[\]"),
        ({"tensors": {"topk_threshold": torch.tensor(torch.nan)}}, "topk_threshold must be finite"),
        ({"architecture": "matryoshka_batchtopk"}, "matryoshka_widths is missing"),
        ({"architecture": "matryoshka_batchtopk", "matryoshka_widths": [0, N]},
         "matryoshka_widths must be integers in 1..96"),
        ({"matryoshka_widths": [16]}, "matryoshka_widths is not known"),
    ],
)  # fmt: skip
def test_what_saelens_in_training_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_saelens_batch(tmp_path / "a", random_state(), **changes))


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("topk", {"k": K, "normalize_activations": "constant_norm_rescale"},
         "cfg.json: normalize_activations must be 'none' .* got 'constant_norm_rescale'"),
        ("topk", {"k": K, "apply_b_dec_to_input": 1}, "apply_b_dec_to_input must be true or false"),
        ("topk", {"k": K, "reshape_activations": "hook_z"}, "reshape_activations must be 'none'"),
        ("topk", {"k": K, "finetuning_scaling_factor": True},
         "cfg.json: finetuning_scaling_factor is not known, got True"),
        ("topk", {}, "cfg.json: k is missing"),
        ("standard", {"k": K}, "cfg.json: k is not known"),
        ("gated", {}, "cfg.json: architecture must be .* got 'gated'"),
        ({"topk": 1}, {}, "cfg.json: architecture must be .* got {'topk': 1}"),
        ("transcoder", {"d_out": 3}, "cfg.json: architecture must be .* got 'transcoder'"),
        ("jumprelu", {}, "sae_weights.safetensors: threshold is missing"),
        ("jumprelu", {"tensors": {"threshold": torch.full((N,), -1.0)}},
         "threshold must be at least 0, got -1.0"),
        ("standard", {"tensors": {"scaling_factor": torch.ones(N)}}, "scaling_factor is not known"),
        ("standard", {"d_in": N, "d_sae": D}, r"W_... must have shape \[.*\], got \[.*\]"),
    ],
)  # fmt: skip
def test_what_saelens_cannot_mean_here_is_refused(tmp_path, architecture, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_saelens(tmp_path / "a", random_state(), architecture, **changes))


# -- ours ----------------------------------------------------------------------------------------


MODELS = {
    "topk": lambda: SparseAutoencoder(D, N, k=K, auxk=8, multi_k=12, dead_after=77),
    "groups": lambda: SparseAutoencoder(D, N, activation=sparsekern.TopK(K, groups=3)),
    "tied": lambda: SparseAutoencoder(D, N, k=K, tied=True, scale_scores=True),
    "batch": lambda: SparseAutoencoder(
        D, N, activation=sparsekern.BatchTopK(3.5), prefixes=(8, 32)
    ),
    "jumprelu": lambda: SparseAutoencoder(
        D, N, activation=sparsekern.JumpReLU(N, bandwidth=0.25), target_l0=5
    ),
    "relu": lambda: SparseAutoencoder(D, N, activation=torch.nn.ReLU(), sparsity_weight=0.1),
    "normalized": lambda: SparseAutoencoder(D, N, k=K, normalize_rows=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_our_own_keeps_everything(tmp_path, name):
    model, x = MODELS[name](), inputs()
    model.initialize(x)
    model.loss(x)  # counts rows, moves thresholds
    if name == "topk":
        model.k = 4
    model.save_pretrained(tmp_path / "a")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "a")
    before, after = model.state_dict(), loaded.state_dict()
    assert set(before) - {"activation.current_k"} <= set(after)
    for key in before:
        same = (
            torch.equal(before[key], loaded.activation.current_k)
            if (key == "activation.current_k")
            else torch.equal(before[key], after[key])
        )
        assert same, key
    assert repr(loaded) == repr(model) and loaded.training
    for option in ("auxk", "multi_k", "dead_after", "prefixes", "target_l0", "sparsity_weight",
                   "scale_scores", "tied", "normalize_rows"):  # fmt: skip
        assert getattr(loaded, option) == getattr(model, option), option
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    one, other = model.loss(x)[1], loaded.loss(x)[1]
    assert torch.equal(one.total, other.total)
    other.total.backward()
    assert torch.equal(model.eval()(x).reconstruction, loaded.eval()(x).reconstruction)


@pytest.mark.parametrize(
    ("name", "to", "named"),
    [
        ("groups", "sparsify", "sparsify: activation must be TopK in 1 or k groups"),
        ("groups", "saelens", "saelens: activation must be TopK without groups"),
        ("tied", "sparsify", "sparsify: scale_scores must be False"),
        ("relu", "sparsify", "sparsify: activation must be TopK"),
        (
            "relu",
            "nowhere",
            "format must be one of sparsekern, .* got 'nowhere'",
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, name, to, named):
    with pytest.raises(ValueError, match=named):
        MODELS[name]().save_pretrained(tmp_path / "a", to=to)
    assert not (tmp_path / "a").exists()


def test_tied_matrix_is_written_under_both_names(tmp_path):
    model = MODELS["tied"]()
    model.save_pretrained(tmp_path / "a", to="saelens")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.encoder, model.dictionary) and not loaded.tied


@pytest.mark.parametrize("cut", [1, 100, 4000])
def test_truncated_and_foreign_files_are_refused(tmp_path, cut):
    MODELS["topk"]().save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "sparsekern.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"sparsekern.safetensors: .*truncated"):
        read(tmp_path / "a")
    file.write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"sparsekern.safetensors: .*no safetensors file"):
        read(tmp_path / "a")
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="header's sparsekern must be JSON, got None"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("tied", 1, "tied must be true or false, got 1"),
        ("normalize_rows", "yes", "normalize_rows must be true or false"),
        ("auxk_weight", None, "auxk_weight must be a number, got None"),
        ("auxk", 1.5, "the model must be one that can be made: .*auxk must be an integer, got 1.5"),
        ("prefixes", [40, 30], "the model must be .*prefixes must ascend"),
        ("prefixes", None, "the model must be one that can be made"),
        ("colour", 3, "colour is not known"),
    ],
)
def test_what_our_own_header_cannot_mean_is_refused(tmp_path, option, value, named):
    MODELS["topk"]().save_pretrained(tmp_path)
    file = tmp_path / "sparsekern.safetensors"
    with safe_open(file, "pt") as saved:
        config = json.loads(saved.metadata()["sparsekern"])
    config["options"][option] = value
    save_file(load_file(file), file, {"sparsekern": json.dumps(config)})
    with pytest.raises(ValueError, match=named):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must exist"):
        read(tmp_path / "none")
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a checkpoint of one of sparsekern, sparsify"):
        read(tmp_path)
    with pytest.raises(ValueError, match="must be a checkpoint of one of"):
        read(tmp_path / "cfg.json")


# -- dictionary_learning ------------------------------------------------------------------------


BIAS = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}
WITHOUT_K = ("AutoEncoder", "AutoEncoderNew", "JumpReluAutoEncoder")
UNBIASED = ("AutoEncoderNew", "JumpReluAutoEncoder")


def write_dictionary_learning(folder, state, kind, **changes):
    folder.mkdir(exist_ok=True)
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        tensors = {
            "W_enc": state["encoder"].t().contiguous(), "b_enc": state["encoder_bias"],
            "W_dec": state["dictionary"], "b_dec": state["decoder_bias"],
        }  # fmt: skip
        if kind == "JumpReluAutoEncoder":
            tensors["threshold"] = torch.linspace(0, 1, N)
        else:
            tensors["group_sizes"] = torch.tensor([16, 32, N - 48])
    else:
        tensors = {
            "encoder.weight": state["encoder"], "encoder.bias": state["encoder_bias"],
            "decoder.weight": state["dictionary"].t().contiguous(),
            BIAS.get(kind, "b_dec"): state["decoder_bias"],
        }  # fmt: skip
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "lm_name": "m", "lr": 1e-3}
    if kind not in WITHOUT_K:
        tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
        trainer["k"] = K
    tensors |= changes.pop("tensors", {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    torch.save(tensors, folder / "ae.pt")
    config = {"trainer": trainer | changes, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CLASSES = ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", *WITHOUT_K]


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_is_read(tmp_path, kind):
    state, x = random_state(), inputs()
    model = SparseAutoencoder.from_pretrained(
        write_dictionary_learning(tmp_path / "a", state, kind)
    )
    codes = scores_of(state, x, biased=kind not in UNBIASED).relu()
    if kind == "AutoEncoderTopK":
        codes = dense_topk(codes, K)
    elif kind == "JumpReluAutoEncoder":
        codes = codes * (codes > torch.linspace(0, 1, N))
    elif kind not in WITHOUT_K:
        codes = codes * (codes > 0.7)
        assert model.k == K
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)
    assert model.prefixes == ((16, 48) if kind == "MatryoshkaBatchTopKSAE" else ())


@pytest.mark.parametrize("to", ["sparsekern", "dictionary_learning"])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("threshold", [0.7, -1.0])
def test_dictionary_learning_goes_out_and_comes_back(tmp_path, kind, to, threshold):
    more = {} if kind in WITHOUT_K else {"tensors": {"threshold": torch.tensor(threshold)}}
    source = write_dictionary_learning(tmp_path / "a", random_state(), kind, **more)
    write(read(source), tmp_path / "b", to)
    write(read(tmp_path / "b"), tmp_path / "c", "dictionary_learning")
    one, other = (torch.load(tmp_path / name / "ae.pt", weights_only=True) for name in "ac")
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ac")
    if kind == "MatryoshkaBatchTopKSAE":
        assert after["trainer"].pop("group_sizes") == [16, 32, N - 48]
    assert after == before


def test_thresholds_below_0_are_0_after_the_relu(tmp_path):
    """The library's trainer leaves such thresholds."""
    state, x, theta = random_state(), inputs(), torch.linspace(-1, 1, N)
    folder = write_dictionary_learning(
        tmp_path / "a", state, "JumpReluAutoEncoder", tensors={"threshold": theta}
    )
    scores = scores_of(state, x, biased=False)
    codes = (scores * (scores > theta)).relu()
    model = SparseAutoencoder.from_pretrained(folder)
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)
    assert torch.equal(model.activation.threshold.float(), theta.clamp_min(0))


def test_unset_threshold_is_an_error_in_evaluation(tmp_path):
    """The library would take -1 for a threshold, above which is everything."""
    folder = write_dictionary_learning(
        tmp_path / "a", random_state(), "BatchTopKSAE", tensors={"threshold": torch.tensor(-1.0)}
    )
    with pytest.raises(RuntimeError, match="threshold must be set before evaluation"):
        SparseAutoencoder.from_pretrained(folder).eval()(inputs())


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("AutoEncoder", {"dict_class": "IdentityDict"},
         "config.json: dict_class must be one of .* got 'IdentityDict'"),
        ("AutoEncoder", {"dict_class": ["AutoEncoder"]}, "config.json: dict_class must be one of"),
        ("AutoEncoder", {"dict_class": "GatedAutoEncoder"}, "a gate .* got 'GatedAutoEncoder'"),
        ("JumpReluAutoEncoder", {"tensors": {"threshold": torch.full((N,), torch.nan)}},
         "ae.pt: threshold must be finite, got nan"),
        ("JumpReluAutoEncoder", {"tensors": {"threshold": torch.tensor(0.5)}},
         r"ae.pt: threshold must have shape \[96\], got \[\]"),
        ("AutoEncoder", {"dict_size": N + 1}, r"must have shape \[97"),
        ("AutoEncoder", {"tensors": {"bias": None}}, "ae.pt: bias is missing"),
        ("AutoEncoder", {"tensors": {"k": torch.tensor(3)}}, "ae.pt: k is not known"),
        ("AutoEncoderTopK", {"k": K + 1}, "config.json: k must be 6"),
        ("AutoEncoderTopK", {"tensors": {"k": None}}, "ae.pt: k is missing"),
        ("BatchTopKSAE", {"tensors": {"k": torch.tensor(0)}}, "ae.pt: k must be .* got 0"),
        ("BatchTopKSAE", {"tensors": {"threshold": torch.tensor(-0.5)}},
         "ae.pt: threshold must be at least 0, .* got -0.5"),
        ("BatchTopKSAE", {"tensors": {"decoder.weight": torch.full((D, N), torch.inf)}},
         "ae.pt: decoder.weight must be finite, got inf"),
        ("MatryoshkaBatchTopKSAE", {"tensors": {"group_sizes": torch.tensor([4, 5])}},
         "ae.pt: group_sizes must have the sum 96"),
        ("BatchTopKSAE", {"tensors": {"epoch": 7}}, "ae.pt: epoch must be a tensor, got 7"),
    ],
)  # fmt: skip
def test_what_dictionary_learning_cannot_mean_here_is_refused(tmp_path, kind, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_dictionary_learning(tmp_path / "a", random_state(), kind, **changes))


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_pickles_with_code_and_damaged_ones_are_refused(tmp_path):
    folder = write_dictionary_learning(tmp_path / "a", random_state(), "BatchTopKSAE")
    file = folder / "ae.pt"
    content = file.read_bytes()
    torch.save({"k": Planted()}, file)
    for damaged in (file.read_bytes(), content[:-700], b"", pickle.dumps(Planted())):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ae\.pt: the file must be an intact torch file"):
            read(folder)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("groups", "activation must be TopK without groups"),
        ("tied", "scale_scores must be False"),
        ("batch", "activation must be .*BatchTopK with an integer k, .*k = 3.5"),
        ("jumprelu", "subtract_bias must be False"),
    ],
)
def test_what_dictionary_learning_lacks_is_refused(tmp_path, name, named):
    with pytest.raises(ValueError, match=f"dictionary_learning: {named}"):
        MODELS[name]().save_pretrained(tmp_path / "a", to="dictionary_learning")
    assert not (tmp_path / "a").exists()


# -- OpenAI --------------------------------------------------------------------------------------


TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def write_openai(path, state, **changes):
    content = {
        "pre_bias": state["decoder_bias"], "latent_bias": state["encoder_bias"],
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "latents_activation_frequency": torch.ones(N), "latents_mean_square": torch.zeros(N),
        "encoder.weight": state["encoder"],
        "decoder.weight": state["dictionary"].t().contiguous(),
        "activation": "ReLU", "activation_state_dict": {},
    } | changes  # fmt: skip
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def test_openai_is_read(tmp_path):
    state, x = random_state(), inputs()
    model = SparseAutoencoder.from_pretrained(write_openai(tmp_path / "5.pt", state))
    codes = scores_of(state, x).relu()
    check_equal(model, state, codes, codes @ state["dictionary"] + state["decoder_bias"], x)


def test_files_from_before_zip_archives_are_read(tmp_path):
    path = write_openai(tmp_path / "5.pt", random_state())
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    for name, tensor in random_state().items():
        assert torch.equal(read(path).tensors[name], tensor), name


@pytest.mark.parametrize("to", WRITTEN)
def test_openai_goes_out_and_comes_back(tmp_path, to):
    source = write_openai(tmp_path / "5.pt", random_state())
    refused = {
        "sparsify": "activation must be TopK",
        "openmoss": "subtract_bias must be False, .*fold_bias",
        "overcomplete": "subtract_bias must be False, .*fold_bias",
    }
    if to in refused:
        with pytest.raises(ValueError, match=f"{to}: {refused[to]}"):
            write(read(source), tmp_path / "b", to)
        assert not (tmp_path / "b").exists()
        return
    write(read(source), tmp_path / "b", to)
    write(read(tmp_path / "b"), tmp_path / "c", "openai")
    one = torch.load(source, weights_only=True)
    other = torch.load(tmp_path / "c" / "autoencoder.pt", weights_only=True)
    assert one.keys() == other.keys() and other["activation"] == "ReLU"
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation": "Identity"}, "5.pt: activation must be 'ReLU' or 'TopK', got 'Identity'"),
        (TOPK | {"activation_state_dict": {}}, "must hold k and postact_fn for TopK"),
        (TOPK | {"activation_state_dict": {"k": 0, "postact_fn": "ReLU"}},
         "activation_state_dict.k must be an integer in 1..96, got 0"),
        (TOPK | {"activation_state_dict": {"k": 3, "postact_fn": "Identity"}},
         "postact_fn must be 'ReLU', got 'Identity'"),
        (TOPK | {"activation.k": 5}, "5.pt: activation.k must be 6, got 5"),
        ({"activation_state_dict": {"k": 3}}, "activation_state_dict must be empty"),
        ({"pre_bias": None}, "5.pt: pre_bias is missing"),
        ({"encoder.weight": None}, "5.pt: encoder.weight is missing"),
        ({"encoder.weight": torch.zeros(N)}, "encoder.weight must have two dimensions"),
        ({"encoder.weight": torch.zeros(D, N)}, "must have shape"),
        ({"latent_bias": torch.full((N,), torch.nan)}, "latent_bias must be finite, got nan"),
        ({"scale": torch.ones(1)}, "5.pt: scale is not known"),
    ],
)  # fmt: skip
def test_what_openai_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_openai(tmp_path / "5.pt", random_state(), **changes))


def test_openai_normalizes_rows_for_topk(tmp_path):
    """The decoder's bias is of normalized rows; the file says k once or twice."""
    state, x = random_state(), 3 * inputs() + 1
    path = write_openai(tmp_path / "5.pt", state, **TOPK, **{"activation.k": K})
    model = SparseAutoencoder.from_pretrained(path)
    rows = x - x.mean(-1, keepdim=True)
    scale = rows.std(-1, keepdim=True)
    codes = dense_topk(scores_of(state, rows / (scale + 1e-5)), K)
    reconstruction = codes @ state["dictionary"] + state["decoder_bias"]
    reconstruction = reconstruction * scale + x.mean(-1, keepdim=True)
    check_equal(model, state, codes, reconstruction, x)
    for to in ("sparsekern", "saelens", "openai"):
        write(read(path), tmp_path / to, to)
        again = SparseAutoencoder.from_pretrained(tmp_path / to)
        check_equal(again, state, codes, reconstruction, x)
    one = torch.load(path, weights_only=True)
    other = torch.load(tmp_path / "openai" / "autoencoder.pt", weights_only=True)
    assert one.keys() - {"activation.k"} == other.keys()
    for name, value in other.items():
        same = torch.equal(value, one[name]) if torch.is_tensor(value) else value == one[name]
        assert same, name
    for to in ("sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match=f"{to}: normalize_rows must be False"):
            write(read(path), tmp_path / "b", to)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("topk", "normalize_rows must be True with TopK"),
        ("groups", "activation must be ReLU, or TopK without groups"),
        ("jumprelu", "activation must be ReLU, or TopK without groups"),
    ],
)
def test_what_openai_lacks_is_refused(tmp_path, name, named):
    with pytest.raises(ValueError, match=f"openai: {named}"):
        MODELS[name]().save_pretrained(tmp_path / "a", to="openai")
    model = SparseAutoencoder(D, N, activation=torch.nn.ReLU(), normalize_rows=True)
    with pytest.raises(ValueError, match="openai: normalize_rows must be False with ReLU"):
        model.save_pretrained(tmp_path / "a", to="openai")
    assert not (tmp_path / "a").exists()


# -- Gemma Scope ---------------------------------------------------------------------------------


def write_gemma_scope(path, state, **changes):
    arrays = {
        "W_enc": state["encoder"].t().numpy(), "b_enc": state["encoder_bias"].numpy(),
        "W_dec": state["dictionary"].numpy(), "b_dec": state["decoder_bias"].numpy(),
        "threshold": np.linspace(0.1, 1.5, N, dtype=np.float32),
    } | changes  # fmt: skip
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_gemma_scope_is_read(tmp_path):
    """Its decoder's bias is not subtracted before the encoder."""
    state, x = random_state(), inputs()
    path = write_gemma_scope(tmp_path / "params.npz", state)
    theta = torch.from_numpy(np.load(path)["threshold"])
    scores = x @ state["encoder"].t() + state["encoder_bias"]
    codes = scores.relu() * (scores > theta)
    reconstruction = codes @ state["dictionary"] + state["decoder_bias"]
    for place in (path, tmp_path):
        model = SparseAutoencoder.from_pretrained(place)
        check_equal(model, state, codes, reconstruction, x)
        assert torch.equal(model.activation.threshold.float(), theta)
    write(read(path), tmp_path / "b", "saelens")
    model = SparseAutoencoder.from_pretrained(tmp_path / "b")
    check_equal(model, state, codes, reconstruction, x)
    assert torch.equal(model.activation.threshold.float(), theta)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"b_dec": None}, "params.npz: b_dec is missing"),
        ({"W_enc": None}, "params.npz: W_enc is missing"),
        ({"W_skip": np.zeros(3)}, "params.npz: W_skip is not known"),
        ({"W_enc": np.zeros(3)}, "W_enc must have two dimensions"),
        ({"b_enc": np.zeros(3)}, "b_enc must have shape"),
        ({"b_dec": np.zeros(D, np.int64)}, "b_dec must be of 16, 32 or 64 bits"),
        ({"b_dec": np.full(D, np.nan, np.float32)}, "b_dec must be finite"),
        ({"threshold": np.full(N, -1, np.float32)}, "threshold must be at least 0, got -1"),
        ({"b_dec": np.array([print] * D)}, "must be an intact npz file of numbers"),
    ],
)
def test_what_gemma_scope_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_gemma_scope(tmp_path / "params.npz", random_state(), **changes))


def test_damaged_npz_is_refused(tmp_path):
    path = write_gemma_scope(tmp_path / "params.npz", random_state())
    content = path.read_bytes()
    for damaged in (content[:-300], b"", b"text", content[:2000] + b"x" * 9 + content[2009:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"params\.npz: the file must be an intact npz"):
            read(path)


# -- the command ---------------------------------------------------------------------------------


def test_command_converts(tmp_path, capsys):
    source = write_sparsify(tmp_path / "a", random_state())
    assert main(["convert", str(source), str(tmp_path / "b"), "--to", "saelens"]) == 0
    assert f"{N} latents of {D} features with TopK, as saelens" in capsys.readouterr().out
    assert SparseAutoencoder.from_pretrained(tmp_path / "b").k == K


@pytest.mark.parametrize(
    "to, options, fold",
    [
        ("dictionary_learning", {"scale_scores": True}, "norms"),
        ("sparsify", {"scale_scores": True}, "norms"),
        ("openmoss", {}, "bias"),
    ],
)
def test_command_folds_what_a_format_lacks(tmp_path, capsys, to, options, fold):
    model = SparseAutoencoder(D, N, k=K, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "a")
    words = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", to]
    assert main(words) == 2
    assert f"or convert --fold {fold})" in capsys.readouterr().err
    assert main([*words, "--fold", fold]) == 0
    x = torch.randn(9, D)
    found = SparseAutoencoder.from_pretrained(tmp_path / "b")(x)
    wanted = model(x)
    torch.testing.assert_close(found.reconstruction, wanted.reconstruction, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.indices, wanted.indices)


@pytest.mark.parametrize("folder", ["new", "made/before/it", "empty"])
def test_a_destination_is_as_before_after_an_error_of_writing(tmp_path, monkeypatch, folder):
    source = write_sparsify(tmp_path / "a", random_state())
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def no_space(_):
        def fail(file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        return fail

    monkeypatch.setattr(checkpoints.sparsify, "json_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        write(read(source), tmp_path / folder, "sparsify")
    assert sorted(tmp_path.rglob("*")) == before


def test_command_leaves_a_destination_untouched(tmp_path, capsys):
    source = write_sparsify(tmp_path / "a", random_state())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").write_text("mine")
    assert main(["convert", str(source), str(tmp_path / "b"), "--to", "saelens"]) == 2
    assert "path must be a folder, new or empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["notes"]
    broken = write_sparsify(tmp_path / "broken", random_state(), skip_connection=True)
    assert main(["convert", str(broken), str(tmp_path / "c"), "--to", "saelens"]) == 2
    assert "cfg.json: skip_connection must be False" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
