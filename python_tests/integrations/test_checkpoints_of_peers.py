"""Checkpoints that other libraries write themselves are read, and what is written they load: the
same weights, the same activations.

Without the libraries, test_checkpoint_formats.py and test_checkpoints_of_hubs.py keep the layouts.
OpenAI's is not on PyPI: its checkout must be on the path.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch
from accelerated import peer
from safetensors.torch import load_file, save_file

from sparsekern.integrations.checkpoints import read, write
from sparsekern.models import SparseAutoencoder
from sparsekern.nn import BatchTopK, TopK

D, N, K = 24, 96, 6


def draw(module):
    """Gives each parameter other numbers than at first, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs():
    return torch.randn(40, D, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def check_same(model, codes, reconstruction):
    """The model has these dense codes [B, N] and this reconstruction [B, D] of the inputs."""
    values, indices = model.encode(inputs())
    dense = torch.zeros(codes.shape).scatter_add(-1, indices, values)
    assert torch.equal(dense != 0, codes != 0) and (codes != 0).any()
    torch.testing.assert_close(dense, codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(inputs()).reconstruction, reconstruction, rtol=1e-5, atol=1e-5)


def assert_equal_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def back(folder, to, through="sparsekern"):
    """Reads a folder, writes it in our format and that one in ``to``; returns the last folder."""
    write(read(folder), folder.parent / "ours", through)
    write(read(folder.parent / "ours"), folder.parent / "back", to)
    return folder.parent / "back"


# -- SAELens -------------------------------------------------------------------------------------


def sae_lens_config(**more):
    return {"d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", **more}


INFERENCE = [
    {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False},
    {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
    {"architecture": "topk", "k": K, "apply_b_dec_to_input": False},
    {"architecture": "topk", "k": K, "normalize_activations": "layer_norm"},
    {"architecture": "jumprelu", "normalize_activations": "layer_norm"},
    {"architecture": "jumprelu"},
    {"architecture": "standard"},
]


@pytest.mark.parametrize("more", INFERENCE)
def test_sae_lens(tmp_path, more):
    lens = peer("sae_lens")
    sae = draw(lens.SAE.from_dict(sae_lens_config(**more)))
    if more["architecture"] == "jumprelu":
        sae.threshold.data.abs_()
    sae.save_model(tmp_path / "a")
    model = SparseAutoencoder.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        check_same(model, sae.encode(inputs()), sae(inputs()))
    folder = back(tmp_path / "a", "saelens")
    assert_equal_tensors(
        load_file(tmp_path / "a" / "sae_weights.safetensors"),
        load_file(folder / "sae_weights.safetensors"),
    )
    loaded = lens.SAE.load_from_disk(folder)
    assert_equal_tensors(sae.state_dict(), loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.encode(inputs()), sae.encode(inputs()))
    before, after = (
        json.loads((path / "cfg.json").read_text()) for path in (tmp_path / "a", folder)
    )
    assert after == before


TRAINING = [
    {"architecture": "topk", "k": K},
    {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False},
    {"architecture": "batchtopk", "k": 3.5, "rescale_acts_by_decoder_norm": False},
    {"architecture": "batchtopk", "k": K},
    {"architecture": "matryoshka_batchtopk", "k": K, "matryoshka_widths": [16, 48, N]},
    {"architecture": "jumprelu"},
    {"architecture": "standard"},
]


@pytest.mark.parametrize("more", TRAINING)
def test_sae_lens_in_training(tmp_path, more):
    """Their batch is ours in training; the file for inference that they make of it is ours in
    evaluation."""
    lens = peer("sae_lens")
    sae = draw(lens.TrainingSAE.from_dict(sae_lens_config(**more)))
    if more["architecture"] == "jumprelu":
        sae.threshold.data.abs_()
    batch = "batchtopk" in more["architecture"]
    if batch:
        sae.topk_threshold.fill_(0.8)
    sae.save_model(tmp_path / "a")
    model = SparseAutoencoder.from_pretrained(tmp_path / "a").train(batch)
    with torch.no_grad():
        check_same(model, sae.encode(inputs()), sae(inputs()))
    assert model.prefixes == tuple(more.get("matryoshka_widths", [])[:-1])
    sae.save_inference_model(tmp_path / "b")
    inference = lens.SAE.load_from_disk(tmp_path / "b")
    model = SparseAutoencoder.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        check_same(model, inference.encode(inputs()), inference(inputs()))
    model.fold_norms()
    model.save_pretrained(tmp_path / "c", to="saelens")
    ours = lens.SAE.load_from_disk(tmp_path / "c")
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs()), inference(inputs()), rtol=1e-5, atol=1e-5)


def test_sae_lens_reads_an_old_config_as_we_do(tmp_path):
    lens = peer("sae_lens")
    state = draw(lens.SAE.from_dict(sae_lens_config(architecture="standard"))).state_dict()
    (tmp_path / "a").mkdir()
    save_file(dict(state), tmp_path / "a" / "sae_weights.safetensors")
    config = {
        "d_in": D, "d_sae": N, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2",
        "hook_point": "blocks.5.hook_resid_pre", "hook_point_layer": 5, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K}, "normalize_activations": "none", "prepend_bos": True,
        "dataset_path": "x", "context_size": 128, "sae_lens_training_version": "3.1.0",
        "apply_b_dec_to_input": False, "finetuning_scaling_factor": False, "l1_coefficient": 5,
    }  # fmt: skip
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(config))
    sae = lens.SAE.load_from_disk(tmp_path / "a", dtype="float32")
    model = SparseAutoencoder.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        check_same(model, sae.encode(inputs()), sae(inputs()))
    write(read(tmp_path / "a"), tmp_path / "b", "saelens")
    loaded = lens.SAE.load_from_disk(tmp_path / "b")
    assert loaded.cfg.metadata.hook_name == "blocks.5.hook_resid_pre"
    with torch.no_grad():
        assert torch.equal(loaded(inputs()), sae(inputs()))


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(64, D, generator=generator)


@pytest.mark.parametrize("more", TRAINING)
def test_sae_lens_trainer(tmp_path, more):
    """Its checkpoint has other files, too."""
    lens = peer("sae_lens")
    trainers = importlib.import_module("sae_lens.training.sae_trainer")
    configs = importlib.import_module("sae_lens.config")
    sae = lens.TrainingSAE.from_dict(sae_lens_config(**more))
    settings = configs.SAETrainerConfig(
        total_training_samples=64 * 20, train_batch_size_samples=64, device="cpu", autocast=False,
        lr=1e-3, lr_end=1e-4, lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0,
        n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999, dead_feature_window=10,
        feature_sampling_window=10, n_checkpoints=0, checkpoint_path=str(tmp_path),
        save_final_checkpoint=True, logger=configs.LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainers.SAETrainer(cfg=settings, sae=sae, data_provider=batches()).fit()
    (folder,) = tmp_path.glob("final_*")
    assert (folder / "trainer_state.pt").exists()
    model = SparseAutoencoder.from_pretrained(folder).train("batch" in more["architecture"])
    with torch.no_grad():
        check_same(model, sae.encode(inputs()), sae(inputs()))


# -- files of the hub, as SAELens' loaders read them ---------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """SAELens' loaders, which find the hub's files in a folder."""
    peer("sae_lens")
    loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")

    def download(repo_id, filename, subfolder=None, **_):
        return str(tmp_path / (subfolder or "") / filename)

    def shapes(repo_id, filename):
        tensors = load_file(tmp_path / filename)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return loaders


def sae_of(config, state):
    from sae_lens import SAE

    loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state)
    return sae


def random_tensors(**shapes):
    generator = torch.Generator().manual_seed(5)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_qwen_scope(tmp_path, hub):
    tensors = random_tensors(W_enc=(N, D), W_dec=(D, N), b_enc=(N,), b_dec=(D,))
    torch.save(tensors, tmp_path / "layer3.sae.pt")
    config, state, _ = hub.qwen_scope_sae_huggingface_loader(
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_6", "layer3.sae.pt",
        cfg_overrides={"d_in": D, "d_sae": N},
    )  # fmt: skip
    sae = sae_of(config, state)
    model = SparseAutoencoder.from_pretrained(tmp_path / "layer3.sae.pt", k=K).eval()
    assert torch.equal(model.dictionary, tensors["W_dec"].t())
    with torch.no_grad():
        check_same(model, sae.encode(inputs()), sae(inputs()))


def test_gemma_scope_2(tmp_path, hub):
    tensors = random_tensors(w_enc=(D, N), w_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,))
    tensors["threshold"].abs_()
    folder = tmp_path / "resid_post" / "layer_9_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    config = {
        "hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output",
        "width": N, "model_name": "gemma-v3-270m-pt", "architecture": "jump_relu", "l0": 10,
        "affine_connection": False, "type": "sae",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    found, state, _ = hub.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-270m-pt", str(folder.relative_to(tmp_path))
    )
    sae = sae_of(found, state)
    for path in (folder, folder / "params.safetensors"):
        model = SparseAutoencoder.from_pretrained(path).eval()
        with torch.no_grad():
            check_same(model, sae.encode(inputs()), sae(inputs()))


def test_llama_scope(tmp_path, hub):
    """Their loader folds the norm of activations into the weights; we have it done."""
    folder = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = random_tensors(
        **{"encoder.weight": (N, D), "decoder.weight": (D, N), "encoder.bias": (N,)},
        **{"decoder.bias": (D,)},
    )
    tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    config = {
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
        "d_model": D, "d_sae": N, "expansion_factor": N // D, "act_fn": "jumprelu", "top_k": 50,
        "jump_relu_threshold": 0.53125, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 8.5, "out": 8.5}, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": False,
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    found, state, _ = hub.llama_scope_sae_huggingface_loader(
        "fnlp/Llama3_1-8B-Base-LXR-8x", folder.name, cfg_overrides={"dtype": "float32"}
    )
    scale = D**0.5 / 8.5
    state["threshold"] = state["threshold"] / scale  # theirs for weights that are not folded yet
    sae = sae_of(found | {"normalize_activations": "none"}, state)
    model = SparseAutoencoder.from_pretrained(folder).eval()
    with torch.no_grad():
        check_same(model, sae.encode(inputs()), sae(inputs()))
        before = model(scale * inputs()).reconstruction / scale
        model.fold_normalization(scale)
        torch.testing.assert_close(model(inputs()).reconstruction, before, rtol=1e-4, atol=1e-5)


# -- sparsify ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify(tmp_path, activation):
    sparsify = peer("sparsify")
    settings = sparsify.SparseCoderConfig(activation, N // D, num_latents=N, k=K)
    coder = draw(sparsify.SparseCoder(D, settings, device="cpu"))
    coder.save_to_disk(tmp_path / "a")

    def results(coder):
        with torch.no_grad():
            found = coder.encode(inputs())
            dense = torch.zeros(40, N).scatter(-1, found.top_indices, found.top_acts)
            return dense, coder.decode(found.top_acts, found.top_indices)

    model = SparseAutoencoder.from_pretrained(tmp_path / "a").eval()
    check_same(model, *results(coder))
    folder = back(tmp_path / "a", "sparsify")
    assert_equal_tensors(
        *(load_file(path / "sae.safetensors") for path in (tmp_path / "a", folder))
    )
    loaded = sparsify.SparseCoder.load_from_disk(folder, device="cpu")
    assert loaded.cfg == coder.cfg
    for one, other in zip(results(coder), results(loaded), strict=True):
        assert torch.equal(one, other)


# -- dictionary_learning -------------------------------------------------------------------------

CLASSES = [
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning(tmp_path, kind):
    library = peer("dictionary_learning.utils")
    arguments = {"k": K} if kind.endswith(("TopK", "TopKSAE")) else {}
    if kind == "MatryoshkaBatchTopKSAE":
        arguments["group_sizes"] = [16, 32, N - 48]
    ae = draw(getattr(library, kind)(D, N, **arguments))
    if kind == "JumpReluAutoEncoder":
        ae.threshold.data.abs_()
    elif arguments:
        ae.threshold.fill_(0.7)
    if kind == "AutoEncoder":  # it divides the rows by their norms on loading
        ae.normalize_decoder()
    (tmp_path / "a").mkdir()
    torch.save(ae.state_dict(), tmp_path / "a" / "ae.pt")
    config = {"trainer": {"dict_class": kind, "activation_dim": D, "dict_size": N, **arguments}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))

    def results(ae):
        threshold = {} if "Batch" not in kind else {"use_threshold": True}
        with torch.no_grad():
            codes = ae.encode(inputs(), **threshold)
            return codes, ae.decode(codes)

    check_same(SparseAutoencoder.from_pretrained(tmp_path / "a").eval(), *results(ae))
    folder = back(tmp_path / "a", "dictionary_learning")
    loaded, found = library.load_dictionary(str(folder), device="cpu")
    assert found == config
    assert_equal_tensors(ae.state_dict(), loaded.state_dict())
    for one, other in zip(results(ae), results(loaded), strict=True):
        assert torch.equal(one, other)


TRAINERS = {
    "standard.StandardTrainer": {"sparsity_warmup_steps": 2},
    "standard.StandardTrainerAprilUpdate": {"sparsity_warmup_steps": 2},
    "p_anneal.PAnnealTrainer": {"sparsity_warmup_steps": 2},
    "top_k.TopKTrainer": {"k": K},
    "batch_top_k.BatchTopKTrainer": {"k": K, "threshold_start_step": 5},
    "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer": {
        "k": K, "threshold_start_step": 5, "group_fractions": [0.25, 0.75],
    },
    "jumprelu.JumpReluTrainer": {"sparsity_warmup_steps": 2},
    "gdm.GatedSAETrainer": {"sparsity_warmup_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_dictionary_learning_trainer(tmp_path, trainer):
    library = peer("dictionary_learning.utils")
    training = importlib.import_module("dictionary_learning.training")
    module, _, name = trainer.partition(".")
    settings = {
        "trainer": getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name),
        "activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "m", "device": "cpu",
        "steps": 20, "warmup_steps": 2, "lr": 1e-3, **TRAINERS[trainer],
    }  # fmt: skip
    training.trainSAE(batches(), [settings], steps=20, save_dir=str(tmp_path), log_steps=None)
    folder = tmp_path / "trainer_0"
    if name == "GatedSAETrainer":
        with pytest.raises(ValueError, match="a gate beside the encoder is not supported"):
            read(folder)
        return
    model = SparseAutoencoder.from_pretrained(folder).eval()
    ae, _ = library.load_dictionary(str(folder), device="cpu")
    threshold = {"use_threshold": True} if "Batch" in name else {}
    with torch.no_grad():
        codes = ae.encode(inputs(), **threshold)
        reconstruction = ae.decode(codes)
        if name == "StandardTrainerAprilUpdate":  # it divides the rows by their norms on loading
            codes = codes / read(folder).tensors["dictionary"].norm(dim=1)
        check_same(model, codes, reconstruction)


# -- OpenMOSS ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_openmoss(tmp_path, act_fn, norm):
    library = peer("llamascopium.models.sae")
    settings = library.SAEConfig(
        sae_type="sae", d_model=D, expansion_factor=N / D, act_fn=act_fn, top_k=K,
        hook_point_in="blocks.3", hook_point_out="blocks.3", sparsity_include_decoder_norm=norm,
    )  # fmt: skip
    sae = draw(library.SparseAutoEncoder(settings))
    sae.set_dataset_average_activation_norm({"blocks.3": 8.5})
    sae.save_pretrained(tmp_path / "a")
    settings.save_hyperparameters(tmp_path / "a")

    def results(sae):
        with torch.no_grad():
            codes = sae.encode(inputs())
            return codes * (sae.decoder_norm() if norm else 1), sae.decode(codes)

    model = SparseAutoencoder.from_pretrained(tmp_path / "a").train(act_fn == "batchtopk")
    check_same(model, *results(sae))
    folder = back(tmp_path / "a", "openmoss")
    name = "sae_weights.safetensors"
    assert_equal_tensors(load_file(tmp_path / "a" / name), load_file(folder / name))
    loaded = library.SparseAutoEncoder.from_pretrained(str(folder))
    assert loaded.cfg == sae.cfg
    assert loaded.dataset_average_activation_norm == {"blocks.3": 8.5}
    for one, other in zip(results(sae), results(loaded), strict=True):
        assert torch.equal(one, other)


def test_openmoss_loads_what_was_trained_here(tmp_path):
    library = peer("llamascopium.models.sae")
    model = draw(SparseAutoencoder(D, N - 1, activation=BatchTopK(3.5), scale_scores=True))
    model.initialize(inputs())
    model.eval().fold_bias()
    model.save_pretrained(tmp_path / "a", to="openmoss")
    sae = library.SparseAutoEncoder.from_pretrained(str(tmp_path / "a"))
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(x).reconstruction
        torch.testing.assert_close(sae(x), ours, rtol=1e-4, atol=1e-5)


# -- overcomplete --------------------------------------------------------------------------------


@pytest.fixture
def overcomplete(monkeypatch):
    """Its autoencoders, without the models of vision that its first import needs."""
    spec = importlib.util.find_spec("overcomplete")
    if spec is None:
        pytest.skip("overcomplete is not installed: its checkpoints are tested from fixtures alone")
    package = types.ModuleType("overcomplete")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "overcomplete", package)
    return pytest.importorskip(
        "overcomplete.sae", exc_type=ImportError, reason="a package that overcomplete needs"
    )


@pytest.mark.parametrize("kind", ["SAE", "TopKSAE", "JumpSAE"])
def test_overcomplete(tmp_path, overcomplete, kind):
    arguments = {"top_k": K} if kind == "TopKSAE" else {}
    sae = draw(getattr(overcomplete, kind)(D, N, **arguments)).eval()
    (tmp_path / "a").mkdir()
    torch.save(sae.state_dict(), tmp_path / "a" / "sae.pt")
    layer = {"SAE": torch.nn.ReLU(), "TopKSAE": TopK(K), "JumpSAE": None}[kind]

    def results(sae):
        with torch.no_grad():
            return sae(inputs())[1:]

    model = SparseAutoencoder.from_pretrained(tmp_path / "a", activation=layer).eval()
    check_same(model, *results(sae))
    write(read(tmp_path / "a", layer), tmp_path / "b", "overcomplete")
    loaded = getattr(overcomplete, kind)(D, N, **arguments)
    loaded.load_state_dict(torch.load(tmp_path / "b" / "sae.pt", weights_only=True))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    for one, other in zip(results(sae), results(loaded.eval()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- OpenAI --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ReLU", "TopK"])
def test_openai(tmp_path, kind):
    library = peer("sparse_autoencoder.model")
    layer = library.TopK(K) if kind == "TopK" else torch.nn.ReLU()
    model = draw(library.Autoencoder(N, D, activation=layer, normalize=kind == "TopK"))
    torch.save(model.state_dict(), tmp_path / "5.pt")

    def results(model):
        with torch.no_grad():
            return model(inputs())[1:]

    check_same(SparseAutoencoder.from_pretrained(tmp_path / "5.pt").eval(), *results(model))
    write(read(tmp_path / "5.pt"), tmp_path / "a", "openai")
    state = torch.load(tmp_path / "a" / "autoencoder.pt", weights_only=True)
    loaded = library.Autoencoder.from_state_dict(state)
    for one, other in zip(results(model), results(loaded), strict=True):
        assert torch.equal(one, other)
