"""Checkpoints as OpenMOSS, Gemma Scope 2, Qwen-Scope and overcomplete lay them out; each formula
stands in its test."""

from __future__ import annotations

import json
import math

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
from peak_memory import memory
from safetensors.torch import load_file, save_file

from sparsekern import BatchTopK, JumpReLU, TopK
from sparsekern.cli.command import main
from sparsekern.integrations.checkpoints import WRITTEN, Checkpoint, read, write
from sparsekern.models import SparseAutoencoder

# -- OpenMOSS ------------------------------------------------------------------------------------

CONFIG = {
    "sae_type": "sae", "d_model": D, "expansion_factor": N / D, "use_decoder_bias": True,
    "act_fn": "topk", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
    "top_k": K, "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996,
    "jumprelu_threshold_window": 2.0, "hook_point_in": "blocks.3", "hook_point_out": "blocks.3",
    "use_glu_encoder": False,
}  # fmt: skip
LOGARITHMS = "activation_function.log_jumprelu_threshold"


def without(content):
    return {name: value for name, value in content.items() if value is not None}


def write_openmoss(folder, state, **changes):
    folder.mkdir(exist_ok=True)
    tensors = {
        "W_E": state["encoder"].t().contiguous(), "b_E": state["encoder_bias"],
        "W_D": state["dictionary"], "b_D": state["decoder_bias"],
        "dataset_average_activation_norm.blocks.3": torch.tensor(8.5).to(state["encoder"].dtype),
    }  # fmt: skip
    if changes.get("act_fn") == "jumprelu":
        tensors[LOGARITHMS] = torch.linspace(-3, 0.5, N).to(state["encoder"].dtype)
    tensors |= changes.pop("tensors", {})
    save_file(without(tensors), folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(without(CONFIG | changes)))
    return folder


def codes_of_openmoss(state, x, act_fn, include_norm):
    """Codes times norms, as ours are, and their reconstruction."""
    norms = state["dictionary"].norm(dim=1) if include_norm else 1
    scores = scores_of(state, x, biased=False) * norms
    if act_fn == "topk":
        codes = dense_topk(scores, K)
    elif act_fn == "jumprelu":
        codes = scores * (scores > torch.linspace(-3, 0.5, N).exp())
    else:
        codes = scores.relu()
    return codes, (codes / norms) @ state["dictionary"] + state["decoder_bias"]


@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["topk", "jumprelu", "relu"])
def test_openmoss_is_read(tmp_path, act_fn, include_norm):
    state, x = random_state(), inputs()
    folder = write_openmoss(
        tmp_path / "a", state, act_fn=act_fn, sparsity_include_decoder_norm=include_norm
    )
    model = SparseAutoencoder.from_pretrained(folder)
    check_equal(model, state, *codes_of_openmoss(state, x, act_fn, include_norm), x)
    assert read(folder).metadata["dataset_average_activation_norm"] == {"blocks.3": 8.5}


def test_openmoss_batchtopk_has_no_threshold(tmp_path):
    folder = write_openmoss(tmp_path / "a", random_state(), act_fn="batchtopk")
    model, x = SparseAutoencoder.from_pretrained(folder), inputs()
    with pytest.raises(RuntimeError, match="threshold must be set"):
        model.eval()(x)
    assert model.k == K and int((model.train().encode(x).values > 0).sum()) == K * len(x)
    for to in ("openmoss", "saelens"):
        if to == "saelens":
            with pytest.raises(ValueError, match="scale_scores must be False"):
                write(read(folder), tmp_path / to, to)
        else:
            write(read(folder), tmp_path / to, to)
            assert_same_files(
                *(path / "sae_weights.safetensors" for path in (folder, tmp_path / to))
            )


@pytest.mark.parametrize("to", ["sparsekern", "openmoss"])
@pytest.mark.parametrize("act_fn", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_openmoss_goes_out_and_comes_back(tmp_path, act_fn, to, dtype, biased):
    changes = {} if biased else {"use_decoder_bias": False, "tensors": {"b_D": None}}
    source = write_openmoss(tmp_path / "a", random_state(dtype=dtype), act_fn=act_fn, **changes)
    write(read(source), tmp_path / "b", to)
    write(read(tmp_path / "b"), tmp_path / "c", "openmoss")
    assert_same_files(*(tmp_path / name / "sae_weights.safetensors" for name in "ac"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ac")
    assert after == before


@pytest.mark.parametrize("thresholds", ["config", "file"])
@pytest.mark.parametrize("place", ["checkpoints/final.safetensors", "sae_weights.safetensors"])
def test_llama_scope_is_read(tmp_path, thresholds, place):
    state, x = random_state(), inputs()
    (tmp_path / "checkpoints").mkdir()
    tensors = {
        "encoder.weight": state["encoder"], "encoder.bias": state["encoder_bias"],
        "decoder.weight": state["dictionary"].t().contiguous(),
        "decoder.bias": state["decoder_bias"],
    }  # fmt: skip
    config = CONFIG | {
        "d_sae": N, "act_fn": "jumprelu", "apply_decoder_bias_to_pre_encoder": False,
        "jump_relu_threshold": 0.5, "dataset_average_activation_norm": {"in": 8.5, "out": 8.5},
    }  # fmt: skip
    theta = torch.tensor(0.5)
    if thresholds == "file":
        del config["jump_relu_threshold"]
        tensors["log_jumprelu_threshold"] = torch.linspace(-3, 0.5, N)
        theta = torch.linspace(-3, 0.5, N).exp()
    save_file(tensors, tmp_path / place)
    name = "hyperparams.json" if thresholds == "config" else "config.json"
    (tmp_path / name).write_text(json.dumps(config))
    model = SparseAutoencoder.from_pretrained(tmp_path)
    norms = state["dictionary"].norm(dim=1)
    scores = scores_of(state, x, biased=False) * norms
    codes = scores * (scores > theta)
    check_equal(
        model, state, codes, (codes / norms) @ state["dictionary"] + state["decoder_bias"], x
    )
    scale = D**0.5 / 8.5
    before = model(scale * x).reconstruction / scale
    model.fold_normalization(scale)
    torch.testing.assert_close(model(x).reconstruction, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_glu_encoder": True}, "config.json: use_glu_encoder must be False"),
        ({"sae_type": "clt"}, "config.json: sae_type must be 'sae', .* got 'clt'"),
        ({"hook_point_out": "blocks.4"}, "hook_point_out must be hook_point_in, a transcoder"),
        ({"norm_activation": "token-wise"}, "norm_activation must be 'dataset-wise' or"),
        ({"act_fn": "layertopk"}, "act_fn must be one of relu, .* got 'layertopk'"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"top_k": N + 1}, f"top_k must be at most the number of latents, {N}"),
        ({"d_model": None}, "config.json: d_model is missing"),
        ({"expansion_factor": "8"}, "expansion_factor must be a number"),
        ({"expansion_factor": 5}, r"W_D must have shape \[120, 24\], got \[96, 24\]"),
        ({"use_decoder_bias": False}, "b_D is not known"),
        ({"use_decoder_bias": 1}, "use_decoder_bias must be true or false"),
        ({"tensors": {"W_E": None}}, "W_E is missing"),
        ({"tensors": {"W_E_glu": torch.ones(D, N)}}, "W_E_glu is not known"),
        ({"tensors": {"W_D": torch.full((N, D), torch.nan)}}, "W_D must be finite, got nan"),
        ({"act_fn": "jumprelu", "tensors": {LOGARITHMS: None}}, f"{LOGARITHMS} is missing"),
        ({"act_fn": "jumprelu", "tensors": {LOGARITHMS: torch.full((N,), 1e3)}},
         "must be logarithms of finite thresholds, got 1000"),
        ({"act_fn": "jumprelu", "tensors": {LOGARITHMS: torch.full((N,), torch.nan)}},
         "must be logarithms of finite thresholds, got nan"),
        ({"act_fn": "jumprelu", "jump_relu_threshold": -1, "tensors": {LOGARITHMS: None}},
         "jump_relu_threshold must be a number of at least 0, got -1"),
    ],
)  # fmt: skip
def test_what_openmoss_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_openmoss(tmp_path / "a", random_state(), **changes))


def test_what_openmoss_lacks_is_refused(tmp_path):
    for layer, named in (
        (TopK(K, groups=3), "activation must be TopK without groups"),
        (BatchTopK(3.5), "activation must be .*BatchTopK with an integer k or a threshold"),
    ):
        model = SparseAutoencoder(D, N, activation=layer, subtract_bias=False)
        with pytest.raises(ValueError, match=f"openmoss: {named}"):
            model.save_pretrained(tmp_path / "a", to="openmoss")
    with pytest.raises(
        ValueError,
        match=r"subtract_bias must be False, .* or convert --fold bias",
    ):
        SparseAutoencoder(D, N, k=K).save_pretrained(tmp_path / "a", to="openmoss")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("latents", [N, N - 1, 101, 2047])
def test_what_is_trained_here_goes_to_openmoss(tmp_path, latents):
    """Also where N / D is not a number of few digits; BatchTopK's threshold becomes JumpReLU's."""
    model, x = SparseAutoencoder(D, latents, activation=BatchTopK(4)), inputs()
    model.initialize(x)
    model.eval().fold_bias()
    model.save_pretrained(tmp_path / "a", to="openmoss")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert int(D * config["expansion_factor"]) == latents and config["act_fn"] == "jumprelu"
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "a").eval()
    x = inputs(seed=11)
    torch.testing.assert_close(loaded(x).reconstruction, model(x).reconstruction)


def test_thresholds_become_the_nearest_logarithms(tmp_path):
    layer = JumpReLU(N)
    layer.log_threshold = torch.nn.Parameter(torch.linspace(-9, 9, N, dtype=torch.double))
    model = SparseAutoencoder(D, N, activation=layer, subtract_bias=False)
    with torch.no_grad():
        layer.log_threshold[0] = -math.inf  # a threshold of 0
    model.save_pretrained(tmp_path / "a", to="openmoss")
    saved = load_file(tmp_path / "a" / "sae_weights.safetensors")[LOGARITHMS]
    assert torch.equal(saved, layer.log_threshold.float())
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "a").activation
    assert torch.equal(loaded.log_threshold, saved)


# -- Gemma Scope 2 -------------------------------------------------------------------------------


def write_gemma_scope(folder, state, **changes):
    folder.mkdir(exist_ok=True)
    tensors = {
        "w_enc": state["encoder"].t().contiguous(), "b_enc": state["encoder_bias"],
        "w_dec": state["dictionary"], "b_dec": state["decoder_bias"],
        "threshold": torch.linspace(0.1, 1.5, N),
    } | changes.pop("tensors", {})  # fmt: skip
    save_file(without(tensors), folder / "params.safetensors")
    config = {
        "hf_hook_point_in": "model.layers.9.output", "width": N, "architecture": "jump_relu",
        "model_name": "gemma-v3-270m-pt", "affine_connection": False, "l0": 10,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_gemma_scope_2_is_read(tmp_path):
    state, x = random_state(), inputs()
    folder = write_gemma_scope(tmp_path / "a", state)
    scores = scores_of(state, x, biased=False)
    codes = scores * (scores > torch.linspace(0.1, 1.5, N))
    reconstruction = codes @ state["dictionary"] + state["decoder_bias"]
    for path in (folder, folder / "params.safetensors"):
        check_equal(SparseAutoencoder.from_pretrained(path), state, codes, reconstruction, x)
    (folder / "config.json").unlink()
    check_equal(SparseAutoencoder.from_pretrained(folder), state, codes, reconstruction, x)
    for to in ("saelens", "dictionary_learning", "openmoss", "sparsekern"):
        write(read(folder), tmp_path / to, to)
        loaded = SparseAutoencoder.from_pretrained(tmp_path / to)
        check_equal(loaded, state, codes, reconstruction, x)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "gated"}, "config.json: architecture must be 'jump_relu'"),
        ({"affine_connection": True}, "config.json: affine_connection must be False"),
        ({"hf_hook_point_out": "model.layers.9.mlp"}, "hf_hook_point_out must be .* a transcoder"),
        ({"tensors": {"affine_skip_connection": torch.zeros(D, D)}}, "connection is not known"),
        ({"tensors": {"w_enc": None}}, "params.safetensors: w_enc is missing"),
        ({"tensors": {"w_enc": torch.ones(N)}}, "w_enc must have two dimensions"),
        ({"tensors": {"w_dec": torch.ones(N, 2, D)}}, "w_dec must have shape"),
        ({"tensors": {"threshold": torch.full((N,), -1.0)}}, "threshold must be at least 0"),
    ],
)
def test_what_gemma_scope_2_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_gemma_scope(tmp_path / "a", random_state(), **changes))


# -- Qwen-Scope ----------------------------------------------------------------------------------


def write_qwen(path, state, **changes):
    content = {
        "W_enc": state["encoder"], "W_dec": state["dictionary"].t().contiguous(),
        "b_enc": state["encoder_bias"], "b_dec": state["decoder_bias"],
    } | changes  # fmt: skip
    torch.save(without(content), path)
    return path


def test_qwen_scope_is_read(tmp_path, capsys):
    state, x = random_state(), inputs()
    path = write_qwen(tmp_path / "layer3.sae.pt", state)
    codes = dense_topk(scores_of(state, x, biased=False), K)
    reconstruction = codes @ state["dictionary"] + state["decoder_bias"]
    model = SparseAutoencoder.from_pretrained(path, k=K)
    check_equal(model, state, codes, reconstruction, x)
    command = ["convert", str(path), str(tmp_path / "b"), "--to", "saelens"]
    assert main(command) == 2
    assert "activation (or k) must be given, it is not in a checkpoint of qwen_scope" in (
        capsys.readouterr().err
    )
    assert main([*command, "--k", str(K)]) == 0
    check_equal(SparseAutoencoder.from_pretrained(tmp_path / "b"), state, codes, reconstruction, x)
    with pytest.raises(
        ValueError, match="must be None, it is in a checkpoint of saelens, got TopK"
    ):
        SparseAutoencoder.from_pretrained(tmp_path / "b", k=K)
    with pytest.raises(ValueError, match="k must be None with an activation"):
        SparseAutoencoder.from_pretrained(path, k=K, activation=TopK(K))
    with pytest.raises(ValueError, match="k must be at most 96"):
        SparseAutoencoder.from_pretrained(path, k=N + 1)


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"W_dec": None}, "layer3.sae.pt: W_dec is missing"),
        ({"W_skip": torch.ones(3)}, "W_skip is not known"),
        ({"W_dec": torch.ones(N, D)}, r"W_dec must have shape \[24, 96\]"),
        ({"b_enc": torch.full((N,), torch.nan)}, "b_enc must be finite"),
        ({"b_enc": 3}, "b_enc must be a tensor, got 3"),
        ({"b_enc": Planted()}, "must be an intact torch file of tensors and plain values"),
    ],
)
def test_what_qwen_scope_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_qwen(tmp_path / "layer3.sae.pt", random_state(), **changes), TopK(K))


# -- overcomplete --------------------------------------------------------------------------------


def write_overcomplete(path, state, **changes):
    content = {
        "encoder.final_block.0.weight": state["encoder"],
        "encoder.final_block.0.bias": state["encoder_bias"],
        "dictionary._weights": state["dictionary"], "dictionary.multiplier": torch.tensor(0.0),
    } | changes  # fmt: skip
    torch.save(without(content), path)
    return path


@pytest.mark.parametrize("kind", ["SAE", "TopKSAE", "JumpSAE"])
@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_overcomplete_is_read(tmp_path, kind, multiplier):
    """The dictionary's rows have norm 1 in evaluation; there is no bias of the decoder."""
    state, x = random_state(), inputs()
    logarithms = torch.linspace(-3, 0.5, N) if kind == "JumpSAE" else None
    path = write_overcomplete(
        tmp_path / "sae.pt", state, thresholds=logarithms,
        **{"dictionary.multiplier": torch.tensor(multiplier)},
    )  # fmt: skip
    weights = state["dictionary"] / (state["dictionary"].norm(dim=1, keepdim=True) + 1e-8)
    state |= {"dictionary": weights * math.exp(multiplier), "decoder_bias": torch.zeros(D)}
    codes = scores_of(state, x).relu()
    if kind == "TopKSAE":
        codes = dense_topk(codes, K)
    elif kind == "JumpSAE":
        codes = codes * (codes >= logarithms.exp())
    layer = {"SAE": torch.nn.ReLU(), "TopKSAE": TopK(K), "JumpSAE": None}[kind]
    for place in (path, tmp_path):
        model = SparseAutoencoder.from_pretrained(place, activation=layer)
        torch.testing.assert_close(
            model.dictionary.data, state.pop("dictionary"), rtol=1e-6, atol=0
        )
        check_equal(model, state, codes, codes @ model.dictionary.detach(), x)
        state["dictionary"] = model.dictionary.detach()
    if multiplier:
        with pytest.raises(
            ValueError, match="overcomplete: rows of the dictionary must have norm 1"
        ):
            model.save_pretrained(tmp_path / "b", to="overcomplete")
        return
    model.save_pretrained(tmp_path / "b", to="overcomplete")
    again = read(tmp_path / "b", layer)
    assert torch.equal(again.tensors["dictionary"], model.dictionary)
    saved = torch.load(tmp_path / "b" / "sae.pt", weights_only=True)
    first = torch.load(path, weights_only=True)
    assert saved.keys() == first.keys()
    for name in saved.keys() - {"dictionary._weights"}:
        assert torch.equal(saved[name], first[name]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dictionary.multiplier": None}, "sae.pt: dictionary.multiplier is missing"),
        ({"encoder.final_block.1.weight": torch.ones(N)}, "final_block.1.weight is not known"),
        ({"thresholds": torch.ones(3)}, r"thresholds must have shape \[96\]"),
        ({"thresholds": torch.full((N,), torch.inf)}, "must be logarithms of finite thresholds"),
        ({"dictionary._weights": torch.full((N, D), torch.nan)}, "_weights must be finite"),
        ({"dictionary._weights": torch.ones(N)}, "_weights must have two dimensions"),
        ({"encoder.final_block.0.bias": Planted()}, "must be an intact torch file"),
    ],
)
def test_what_overcomplete_cannot_mean_here_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read(write_overcomplete(tmp_path / "sae.pt", random_state(), **changes), TopK(K))


def test_what_overcomplete_lacks_is_refused(tmp_path):
    def save(**options):
        model = SparseAutoencoder(D, N, **({"k": K, "subtract_bias": False} | options))
        if "k" in options:
            model.decoder_bias.data.fill_(1)
        model.save_pretrained(tmp_path / "a", to="overcomplete")

    for options, named in (
        ({"subtract_bias": True}, "subtract_bias must be False"),
        ({"k": K}, "decoder_bias must be 0"),
        ({"k": None, "activation": TopK(K, groups=3)}, "activation must be TopK without groups"),
        ({"k": None, "activation": BatchTopK(K)}, "activation must be TopK without groups"),
    ):
        with pytest.raises(ValueError, match=f"overcomplete: {named}"):
            save(**options)
    assert not (tmp_path / "a").exists()


# -- where the activations come from -------------------------------------------------------------


def test_names_of_model_and_hook_go_to_saelens(tmp_path):
    """SAEBench and others look for them in its config."""
    write(read(write_gemma_scope(tmp_path / "a", random_state())), tmp_path / "b", "saelens")
    write(read(write_openmoss(tmp_path / "c", random_state())), tmp_path / "d", "saelens")
    found = [
        json.loads((tmp_path / name / "cfg.json").read_text())["metadata"] for name in ("b", "d")
    ]
    assert found[0]["model_name"] == "gemma-v3-270m-pt"
    assert found[0]["hf_hook_name"] == "model.layers.9.output"
    assert found[1]["hook_name"] == "blocks.3"
    write(read(tmp_path / "b"), tmp_path / "e", "dictionary_learning")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["trainer"]["lm_name"] == "gemma-v3-270m-pt"


def test_metadata_of_other_types_are_left_out(tmp_path):
    """They may come from any file."""
    checkpoint = read(write_openmoss(tmp_path / "a", random_state()))
    checkpoint.metadata |= {
        "openmoss": 3, "hook_name": [1], "dataset_average_activation_norm": {"x": "y"},
        "dictionary_learning": {"trainer": 3}, "dictionary_learning_threshold": "x",
    }  # fmt: skip
    write(checkpoint, tmp_path / "b", "openmoss")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["hook_point_in"] == "" and config["expansion_factor"] == N / D
    tensors = load_file(tmp_path / "b" / "sae_weights.safetensors")
    assert tensors.keys() == {"W_E", "W_D", "b_E", "b_D"}
    plain = Checkpoint(TopK(K), random_state(), {}, checkpoint.metadata)
    write(plain, tmp_path / "c", "dictionary_learning")
    assert read(tmp_path / "c").activation.k == K


# -- memory --------------------------------------------------------------------------------------

MIB = 1 << 20


def write_npz(folder, state):
    folder.mkdir()
    arrays = {
        "W_enc": state["encoder"].t(), "b_enc": state["encoder_bias"], "W_dec": state["dictionary"],
        "b_dec": state["decoder_bias"], "threshold": torch.ones(4096),
    }  # fmt: skip
    np.savez(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})


@pytest.mark.parametrize("to", [*WRITTEN, "gemma_scope"])
def test_weights_are_in_memory_once(tmp_path, to):
    """Two matrices of 8 MiB; writing copies one for a torch file, and parts for others. The count
    has the mapping of a torch file in it."""
    state = {
        "encoder": torch.randn(4096, 512), "encoder_bias": torch.zeros(4096),
        "dictionary": torch.nn.functional.normalize(torch.randn(4096, 512), dim=1),
        "decoder_bias": torch.zeros(512),
    }  # fmt: skip
    layer = torch.nn.ReLU() if to == "openai" else TopK(K)
    given = TopK(K) if to == "overcomplete" else None
    mapped = to in ("openai", "dictionary_learning", "overcomplete")
    if to == "gemma_scope":
        write_npz(tmp_path / "a", state)
    else:
        biased = to not in ("openmoss", "overcomplete")
        checkpoint = Checkpoint(layer, state, {"subtract_bias": biased})
        write(checkpoint, tmp_path / "warm", to)  # what is imported lazily
        written = memory(lambda: write(checkpoint, tmp_path / "a", to))
        assert written < (10 if mapped else 5) * MIB, written / MIB
    SparseAutoencoder.from_pretrained(tmp_path / "a", activation=given)
    taken = memory(lambda: SparseAutoencoder.from_pretrained(tmp_path / "a", activation=given))
    assert 16 * MIB < taken < (35 if mapped else 19) * MIB, taken / MIB
