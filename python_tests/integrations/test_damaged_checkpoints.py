"""Whatever a damaged checkpoint holds, it is read or refused with one line that names the file."""

from __future__ import annotations

import json
import random

import pytest
import torch
from autoencoders import D, K, N

from sparsekern import TopK
from sparsekern.integrations.checkpoints import WRITTEN
from sparsekern.models import SparseAutoencoder

WRONG = (None, "x", -1, 0, 1.5, True, [], {}, [None], {"k": 1}, float("nan"), 10**30, 2**31)
TEXTS = ("", "[]", "null", "{", "[" * 9000, "\xff", '{"a": 1, "a": 2}')


@pytest.fixture(params=WRITTEN)
def saved(request, tmp_path):
    """A folder, and a function that reads it; true if it was refused."""
    torch.manual_seed(0)
    layer = torch.nn.ReLU() if request.param == "openai" else TopK(K)
    biased = request.param not in ("openmoss", "overcomplete")
    model = SparseAutoencoder(D, N, activation=layer, subtract_bias=biased)
    model.save_pretrained(tmp_path / "a", to=request.param)

    def refused():
        given = TopK(K) if request.param == "overcomplete" else None
        try:
            SparseAutoencoder.from_pretrained(tmp_path / "a", activation=given)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert str(tmp_path / "a") in str(error)
            return True
        return False

    assert not refused()
    return tmp_path / "a", refused


def entries(config):
    """Each dictionary in a config with each of its keys."""
    for key in list(config):
        yield config, key
        if isinstance(config[key], dict):
            yield from entries(config[key])


@pytest.mark.parametrize(
    "saved", ["sparsify", "saelens", "dictionary_learning", "openmoss"], indirect=True
)
def test_configs(saved):
    folder, refused = saved
    (file,) = folder.glob("*.json")
    text = file.read_text()
    config = json.loads(text)
    found = 0
    for where, key in list(entries(config)):
        right = where[key]
        for wrong in WRONG:
            where[key] = wrong
            file.write_text(json.dumps(config))
            found += refused()
        where[key] = right
    assert found > 10
    for content in (*TEXTS, text[: len(text) // 2]):
        file.write_bytes(content.encode("latin1"))
        assert refused()


def test_bytes(saved):
    folder, refused = saved
    draw = random.Random(0)
    for file in folder.iterdir():
        if file.suffix == ".json":
            continue
        content = file.read_bytes()
        for length in (0, 1, 7, 100, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            assert refused(), length
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[draw.randrange(1200) - draw.choice((0, 1200))] = draw.randrange(256)
            file.write_bytes(damaged)
            refused()
