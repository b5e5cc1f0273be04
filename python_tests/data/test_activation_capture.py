"""Capturing activations: which rows are written, what of outputs, and where rows come from."""

import os
import runpy
import sys
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from test_activation_sources import content, data, here  # noqa: F401
from torch import nn

from sparsekern.data import ActivationStore, DataError, capture, convert

PAD, CLS, SEP = 0, 1, 2


class Encoder(nn.Module):
    """A stand-in for a transformer: positions see the real tokens before them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.pooler = nn.Linear(8, 4)
        self.to(dtype)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        hidden = self.block(hidden.cumsum(1))
        pooled = self.pooler(hidden[:, 0])
        return hidden, pooled


TEXTS = ([CLS, 5, 6, SEP], [CLS, 7, SEP], [CLS, 8, 9, 10, 11, SEP])


def batch_of(texts=TEXTS, left=False, kind=dict):
    """Token ids and mask [batch, positions], padded on one side."""
    width = max(map(len, texts))
    pads = [[PAD] * (width - len(text)) for text in texts]
    ids = [pad + text if left else text + pad for text, pad in zip(texts, pads, strict=True)]
    masks = [
        [0] * len(pad) + [1] * len(text) if left else [1] * len(text) + [0] * len(pad)
        for text, pad in zip(texts, pads, strict=True)
    ]
    return kind({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)})


def alone(texts=TEXTS):
    """What each text gives without padding, one after the other."""
    with torch.no_grad():
        return torch.cat([Encoder()(torch.tensor([text]))[0][0] for text in texts])


def origins(path):
    with ActivationStore(path) as store:
        found = store.origins()
        return [None if column is None else column.tolist() for column in found]


ALL_TOKENS = [token for text in TEXTS for token in text]
ALL_POSITIONS = [position for text in TEXTS for position in range(len(text))]
ALL_DOCUMENTS = [number for number, text in enumerate(TEXTS) for _ in text]


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, UserDict, lambda given: tuple(given.values())])
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_written_wherever_the_mask_is_given(left, kind, tmp_path):
    path = tmp_path / "a.h5"
    assert capture(Encoder(), "block", [batch_of(left=left, kind=kind)], path) == 13
    torch.testing.assert_close(content(path), alone())
    assert origins(path) == [ALL_DOCUMENTS, ALL_POSITIONS, ALL_TOKENS]


def test_all_positions_are_written_where_asked_or_where_nothing_is_padding(tmp_path):
    given = batch_of()
    assert capture(Encoder(), "block", [given], tmp_path / "a.h5", mask=None) == 18
    assert origins(tmp_path / "a.h5")[1][:6] == [0, 1, 2, 3, 3, 3]
    assert capture(Encoder(), "block", [given["input_ids"]], tmp_path / "b.h5") == 18
    assert origins(tmp_path / "b.h5")[0] == [0] * 6 + [1] * 6 + [2] * 6


def test_a_mask_of_ones_own(tmp_path):
    def third(given):
        return torch.arange(6).expand(3, 6) == 2

    given = batch_of()
    assert capture(Encoder(), "block", [given], tmp_path / "a.h5", mask=third) == 3
    assert origins(tmp_path / "a.h5") == [[0, 1, 2], [2, 2, 2], [6, SEP, 9]]

    class Other(Encoder):
        def forward(self, input_ids, real):
            return super().forward(input_ids, real)

    given = {"input_ids": given["input_ids"], "real": given["attention_mask"]}
    assert capture(Other(), "block", [given], tmp_path / "b.h5", mask="real") == 13
    with pytest.raises(DataError, match=r"the inputs have no 'rael'; they have 'input_ids', 're"):
        capture(Other(), "block", [given], tmp_path / "c.h5", mask="rael")
    with pytest.raises(ValueError, match="mask must be a name, a function or None, got True"):
        capture(Other(), "block", [given], tmp_path / "c.h5", mask=True)


def test_masks_that_do_not_say_which_rows_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(DataError, match=r"attention_mask \[3, 6\] does not say which rows of 'poo"):
        capture(Encoder(), "pooler", [batch_of()], path)
    assert capture(Encoder(), "pooler", [batch_of()], path, mask=None) == 3
    assert origins(path) == [[0, 1, 2], [0, 0, 0], None]
    with pytest.raises(DataError, match="mask must hold 0 and 1, got 0"):
        mask = torch.full((3, 6), -1e9).triu(1)
        capture(Encoder(), "block", [batch_of()], tmp_path / "b.h5", mask=lambda given: mask)


def test_outputs_of_flattened_positions_keep_their_mask(tmp_path):
    class Flat(Encoder):
        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids) * attention_mask[..., None]
            return self.block(hidden.cumsum(1).reshape(-1, 8))

    assert capture(Flat(), "block", [batch_of()], tmp_path / "a.h5") == 13
    torch.testing.assert_close(content(tmp_path / "a.h5"), alone())
    assert origins(tmp_path / "a.h5") == [ALL_DOCUMENTS, ALL_POSITIONS, ALL_TOKENS]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_padding_that_torchs_transformer_is_told_is_not_written(kind, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    real = batch_of()["attention_mask"].bool()
    padding = torch.zeros(3, 6).masked_fill(~real, -torch.inf) if kind.is_floating_point else ~real
    given = {"src": torch.randn(3, 6, 8), "src_key_padding_mask": padding}
    assert capture(module, "layers.0", [given], tmp_path / "a.h5") == 13
    assert capture(module, "", [(given["src"], None, padding)], tmp_path / "b.h5") == 13
    with torch.no_grad():
        alone = module.eval()(**given)[real]
    torch.testing.assert_close(content(tmp_path / "b.h5"), alone)
    assert origins(tmp_path / "a.h5")[:2] == [ALL_DOCUMENTS, ALL_POSITIONS]


class EncoderDecoder(nn.Module):
    """A stand-in for a model that writes one text after reading another."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Encoder()

    def forward(
        self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None
    ):
        self.encoder(input_ids, attention_mask)
        return self.decoder(decoder_input_ids, decoder_attention_mask)


@pytest.mark.parametrize("mask", [True, False])
def test_positions_of_a_decoder_are_its_own(mask, tmp_path):
    other = batch_of([[CLS, 9, 9, 9, 9, SEP], [CLS, 9, 9, 9, SEP], [CLS]])
    given = other | {f"decoder_{name}": value for name, value in batch_of().items()}
    if not mask:
        del given["decoder_attention_mask"]
    for hook in ("decoder.block", "decoder", ""):
        path = tmp_path / f"of {hook}.h5"
        rows = capture(EncoderDecoder(), hook, [given], path, skip_tokens=[] if mask else [PAD])
        assert rows == 13, hook
        assert origins(path)[::2] == [ALL_DOCUMENTS, ALL_TOKENS], hook
    torch.testing.assert_close(content(tmp_path / "of decoder.block.h5"), alone())
    assert capture(EncoderDecoder(), "encoder.block", [given], tmp_path / "e.h5") == 12


def test_positions_of_torchs_decoder_are_its_own(tmp_path):
    module = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    module.encoder.use_nested_tensor = False
    real = batch_of()["attention_mask"].bool()
    given = {
        "src": torch.randn(3, 6, 8), "tgt": torch.randn(3, 6, 8),
        "src_key_padding_mask": torch.arange(6).expand(3, 6) > 1, "tgt_key_padding_mask": ~real,
    }  # fmt: skip
    assert capture(module, "decoder.layers.0", [given], tmp_path / "d.h5") == 13
    assert origins(tmp_path / "d.h5")[:2] == [ALL_DOCUMENTS, ALL_POSITIONS]
    assert capture(module, "encoder.layers.0.linear2", [given], tmp_path / "e.h5") == 6


SEQUENCE_LAYERS = {
    "LSTM": (lambda first: nn.LSTM(8, 8, batch_first=first), ""),
    "MultiheadAttention": (lambda first: nn.MultiheadAttention(8, 2, batch_first=first), ""),
    "TransformerEncoder": (
        lambda first: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=first), 1, enable_nested_tensor=False
        ),
        "layers.0.linear2",
    ),
}


class Tagger(nn.Module):
    """A layer of torch that has positions or sequences first, in a module that has sequences."""

    def __init__(self, make, first):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.first = nn.Embedding(20, 8), make(first), first

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x if self.first else x.transpose(0, 1)
        return (
            self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        )


@pytest.mark.parametrize("skip_first", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sequences", [6, 4], ids=["as many as positions", "fewer"])
@pytest.mark.parametrize("name", SEQUENCE_LAYERS)
def test_layers_of_torch_with_positions_first_are_written_by_sequence(
    name, sequences, masked, skip_first, tmp_path
):
    make, inner = SEQUENCE_LAYERS[name]
    given = {"input_ids": torch.arange(6 * sequences).view(sequences, 6) % 20}
    if masked:
        given["attention_mask"] = (torch.arange(6) < 1 + torch.arange(sequences)[:, None]).long()
    hook = f"layer.{inner}" if inner else "layer"
    for first in (True, False):
        path = tmp_path / f"{first}.h5"
        capture(Tagger(make, first), hook, [given], path, skip_first=skip_first)
    one, other = tmp_path / "True.h5", tmp_path / "False.h5"
    torch.testing.assert_close(content(other), content(one))
    assert origins(other) == origins(one)


CONVOLUTIONS = {
    "Conv1d": (lambda: nn.Conv1d(3, 5, 2), (2, 3, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 5, 2), (2, 3, 7, 4)),
    "Conv2d without a batch": (lambda: nn.Conv2d(3, 5, 2), (3, 7, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 5, 2), (2, 3, 7, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(5), (2, 5, 7, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (6, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_features_of_convolutions_are_their_channels(name, tmp_path):
    make, shape = CONVOLUTIONS[name]
    layer, x = make(), torch.randn(shape)
    capture(layer, "", [x], tmp_path / "a.h5")
    with torch.no_grad():
        output = layer.eval()(x)
    batched = output if len(shape) != 3 or name == "Conv1d" else output[None]
    expected = batched.flatten(2).transpose(1, 2).reshape(-1, 5) if len(shape) > 2 else output
    torch.testing.assert_close(content(tmp_path / "a.h5"), expected)


def test_nested_tensors_are_refused(tmp_path):
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    given = {"src": torch.randn(3, 6, 8), "src_key_padding_mask": torch.arange(6).expand(3, 6) > 3}
    with pytest.raises(DataError, match=r"'layers.0' must return a dense tensor"):
        capture(module, "layers.0", [given], tmp_path / "a.h5")


# -- skipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_first_tokens_are_skipped_on_either_side_of_padding(left, tmp_path):
    path = tmp_path / "a.h5"
    assert capture(Encoder(), "block", [batch_of(left=left)], path, skip_first=2) == 7
    assert origins(path)[2] == [6, SEP, SEP, 9, 10, 11, SEP]
    assert origins(path)[1] == [2, 3, 2, 2, 3, 4, 5]


def test_tokens_are_skipped_by_name(tmp_path):
    path = tmp_path / "a.h5"
    assert capture(Encoder(), "block", [batch_of()], path, skip_tokens=[CLS, SEP, PAD]) == 7
    assert origins(path)[2] == [5, 6, 7, 8, 9, 10, 11]
    assert origins(path)[1] == [1, 2, 1, 1, 2, 3, 4]


def test_nothing_can_be_skipped_where_there_are_no_positions_or_tokens(tmp_path):
    layer, rows = nn.Linear(3, 2), torch.randn(5, 3)
    with pytest.raises(DataError, match=r"skip_first needs outputs \[batch, positions, D\]"):
        capture(layer, "", [rows], tmp_path / "a.h5", skip_first=1)
    heads = torch.randn(2, 4, 6, 3)  # [batch, heads, positions, D]
    with pytest.raises(DataError, match=r"skip_first needs outputs \[batch, positions, D\]"):
        capture(layer, "", [heads], tmp_path / "a.h5", skip_first=1)
    with pytest.raises(DataError, match=r"skip_tokens needs 'input_ids' for each row"):
        capture(layer, "", [rows], tmp_path / "a.h5", skip_tokens=[1])
    with pytest.raises(ValueError, match="skip_first must be an integer of at least 0, got -1"):
        capture(layer, "", [rows], tmp_path / "a.h5", skip_first=-1)
    assert os.listdir(tmp_path) == []


# -- outputs and dtypes ----------------------------------------------------------------------------


def test_outputs_with_a_last_hidden_state(tmp_path):
    class Output:
        def __init__(self, hidden):
            self.last_hidden_state = hidden

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Encoder()

        def forward(self, **given):
            return Output(self.inner(**given)[0])

    assert capture(Wrapped(), "", [batch_of()], tmp_path / "a.h5") == 13
    torch.testing.assert_close(content(tmp_path / "a.h5"), alone())


def test_what_the_module_does_in_place_afterwards_is_not_captured(tmp_path):
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), torch.randn(9, 3)
    capture(module, "0", [x], tmp_path / "a.h5")
    assert torch.equal(content(tmp_path / "a.h5"), module[0](x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_stored_dtype_is_the_outputs(dtype, tmp_path):
    layer = nn.Linear(3, 2).to(dtype)
    capture(layer, "", [torch.randn(5, 3, dtype=dtype)], tmp_path / "a.h5")
    stored = torch.float32 if dtype == torch.float64 else dtype
    content(tmp_path / "a.h5", stored)


def test_an_error_keeps_what_was_captured(tmp_path):
    inputs = [torch.ones(4, 8)] * 2 + [torch.full((4, 8), 1e5)]
    with pytest.raises(DataError, match=r"too large for torch.float16 .*; the 8 rows before are k"):
        capture(nn.Identity(), "", inputs, tmp_path / "a.h5", dtype=torch.float16)
    assert torch.equal(content(tmp_path / "a.partial.h5"), torch.ones(8, 8).half())
    assert origins(tmp_path / "a.partial.h5")[0] == list(range(8))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        capture(nn.Linear(8, 2), "", [inputs[0], torch.ones(4, 7)], tmp_path / "b.h5")
    assert len(content(tmp_path / "b.partial.h5")) == 4


# -- origins ---------------------------------------------------------------------------------------


def test_documents_are_numbered_through_all_inputs(tmp_path):
    inputs = [batch_of(TEXTS[:2]), batch_of(TEXTS[2:])]
    capture(Encoder(), "block", inputs, tmp_path / "a.h5")
    assert origins(tmp_path / "a.h5") == [ALL_DOCUMENTS, ALL_POSITIONS, ALL_TOKENS]
    with h5py.File(tmp_path / "a.h5") as file:
        assert {name: str(file[name].dtype) for name in file} == {
            "activations": "float32", "documents": "int64", "positions": "int32",
            "token_ids": "int32",
        }  # fmt: skip


def test_origins_follow_rows_left_out_files_joined_and_ranges(tmp_path):
    for name in ("a.h5", "b.h5"):
        capture(Encoder(), "block", [batch_of()], tmp_path / name)
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    norms = content(paths[0]).double().norm(dim=1)
    limit = float(norms.median())
    kept = [i for i in range(13) if norms[i] <= limit]
    with ActivationStore(paths, max_norm=limit) as store:
        assert 0 < store.outliers < 26
        found = store.origins()
        tokens = [ALL_TOKENS[i] for i in kept]
        documents = [ALL_DOCUMENTS[i] for i in kept]
        assert found.token_ids.tolist() == 2 * tokens
        assert found.documents.tolist() == documents + [3 + number for number in documents]
        for start in range(0, store.tokens, 3):
            part = store.origins(start, start + 4)
            for column, whole in zip(part, found, strict=True):
                assert torch.equal(column, whole[start : start + 4])
    convert(paths, tmp_path / "c.h5")
    expected = ALL_DOCUMENTS + [3 + number for number in ALL_DOCUMENTS]
    assert origins(tmp_path / "c.h5") == [expected, 2 * ALL_POSITIONS, 2 * ALL_TOKENS]


def test_files_that_do_not_say_have_no_origins(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 8), np.float32))
    capture(Encoder(), "block", [batch_of()], tmp_path / "b.h5")
    with ActivationStore([tmp_path / "a.npy", tmp_path / "b.h5"]) as store:
        assert store.origins() is None
    convert([tmp_path / "b.h5", tmp_path / "a.npy"], tmp_path / "c.h5")
    with ActivationStore(tmp_path / "c.h5") as store:
        assert store.origins() is None
    with h5py.File(tmp_path / "b.h5", "a") as file:
        del file["positions"]
        file["positions"] = np.zeros(5, int)
    with ActivationStore(tmp_path / "b.h5") as store:
        with pytest.raises(DataError, match=r"positions must be integers \[13\], got int64 \[5\]"):
            store.origins()


# -- the command -----------------------------------------------------------------------------------

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from test_activation_capture import Encoder as make
"""


def test_the_command_leaves_padding_out(here, capsys):  # noqa: F811
    (here / "some_encoder.py").write_text(FACTORY.format(tests=os.path.dirname(__file__)))
    for name, array in batch_of().items():
        np.save(f"{name}.npy", array.numpy())
    inputs = ["--inputs", "input_ids=input_ids.npy", "attention_mask=attention_mask.npy"]
    flags = ["capture", "--module", "some_encoder:make", "--hook", "block", "--batch-size", 2]
    assert data(*flags, *inputs, "--out", "a.h5") == 0
    assert "a.h5: 13 tokens of 8 features, float32" in capsys.readouterr().out
    torch.testing.assert_close(content("a.h5"), alone())
    only = ["--inputs", "input_ids.npy"]
    for number, (more, rows) in enumerate(
        (
            ([*inputs, "--keep-padding"], 18), ([*inputs, "--skip-first", 1], 10),
            ([*inputs, "--skip-tokens", CLS, SEP], 7), (only, 18),
            ([*only, "--mask", "attention_mask.npy", "--skip-first", 1], 10),
        )
    ):  # fmt: skip
        assert data(*flags, *more, "--out", f"{number}.h5") == 0
        assert f"{number}.h5: {rows} tokens of 8 features" in capsys.readouterr().out
    np.save("short.npy", np.ones((2, 6), int))
    for more, message in (
        ([*only, "--mask", "short.npy"], "input files differ in length: 3, 2 in short.npy"),
        ([*only, "--mask", "short.npy", "--keep-padding"], "--mask says what is written"),
        (["--inputs", "input_ids.npy", "short.npy"], "several files need different names"),
        (
            [*only, "--skip-first", -1],
            "capture: --skip-first must be an integer of at least 0",
        ),
        (["--inputs", "nothing.npy"], "input file not found: nothing.npy"),
    ):
        assert data(*flags, *more, "--out", "x.h5") == 2
        assert message in capsys.readouterr().err


# -- the example -----------------------------------------------------------------------------------


def test_the_example_runs_with_what_transformers_offers(tmp_path, monkeypatch, capsys):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.encoder = nn.Embedding(20, 8), nn.Module()
            self.encoder.layer = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids)
            for layer in self.encoder.layer:
                hidden = layer(hidden)
            return UserDict(last_hidden_state=hidden)

    class Tokenizer:
        all_special_ids = (PAD, CLS, SEP)

        def __call__(self, lines, padding, truncation, return_tensors):
            assert padding and truncation and return_tensors == "pt"
            texts = [[CLS, *(3 + len(word) for word in line.split()), SEP] for line in lines]
            return batch_of(texts, kind=UserDict)

    loaded = {
        "AutoModel": SimpleNamespace(from_pretrained=lambda name: Model()),
        "AutoTokenizer": SimpleNamespace(from_pretrained=lambda name: Tokenizer()),
    }
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(**loaded))
    (tmp_path / "text.txt").write_text("a few words\nand\n" * 50)
    path = str(tmp_path / "a.h5")
    monkeypatch.setattr(sys, "argv", ["", "model", str(tmp_path / "text.txt"), path])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "capture_tokens.py"))
    assert capsys.readouterr().out == "200 tokens of 100 lines\n"
    assert origins(path)[2] == [4, 6, 8, 6] * 50
    assert origins(path)[0][-4:] == [98, 98, 98, 99]
