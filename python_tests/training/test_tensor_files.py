"""Tensor files: what the safetensors package reads and writes, in the memory of one tensor."""

import json
import os

import pytest
import torch
from peak_memory import memory
from safetensors.torch import load_file, save_file

from sparsekern._tensor_files import DTYPES, SavedTensors
from sparsekern.training import CheckpointError, checkpoints

MIB = 1 << 20


def every_kind():
    torch.manual_seed(0)
    weight = torch.randn(3, 5)
    tensors = {f"of {dtype}": (100 * weight).to(dtype) for dtype in DTYPES.values()}
    return {
        **tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "shared": weight,
        "shared again": weight, "transposed": weight.t(), "part": weight[:, 1:3],
        "spread": weight[0].expand(4, 5), "parameter": torch.nn.Parameter(weight),
    }  # fmt: skip


def assert_same(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        same = torch.equal(tensor.detach().double(), other[name].detach().double())
        assert same, name


def test_the_package_reads_what_is_written(tmp_path):
    checkpoints.write_checkpoint(tmp_path, 1, every_kind(), {})
    assert_same(load_file(tmp_path / "checkpoint-1.safetensors"), every_kind())


def test_what_the_package_writes_is_read(tmp_path):
    plain = {name: tensor.detach().clone() for name, tensor in every_kind().items()}
    plain = {name: tensor.contiguous() for name, tensor in plain.items()}
    save_file(plain, tmp_path / "a.safetensors", {"made by": "a test"})
    saved = SavedTensors(tmp_path / "a.safetensors")
    assert_same(saved, plain)
    assert saved.metadata == {"made by": "a test"}


def test_checkpoints_need_the_memory_of_one_tensor(tmp_path):
    tensors = {f"model.{i}.weight": torch.ones(2 * MIB // 4, 1) for i in range(8)}
    tensors["model.8.weight"] = torch.ones(1024, 512).t()  # must be put in order
    checkpoints.write_checkpoint(tmp_path, 0, {"a": torch.ones(1)}, {})  # what is imported lazily
    written = memory(lambda: checkpoints.write_checkpoint(tmp_path, 1, tensors, {}))
    assert written < 3 * MIB, written
    model = torch.nn.Sequential(*(torch.nn.Linear(1, MIB // 2, bias=False) for _ in range(8)))
    model.append(torch.nn.Linear(1024, 512, bias=False))

    def read():
        checkpoints.load_model(tmp_path, model, checkpoints.read_checkpoint(tmp_path).tensors)

    taken = memory(read)
    assert taken < 5 * MIB, taken  # a tensor is let go when the next one is there
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters())


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x01", (1 << 62).to_bytes(8, "little"), header()[:-1], b"\x02" + 7 * b"\0" + b"[]",
        header(a=F32), header(a=F32) + b"12345",
        header(a=F32 | {"shape": [2]}) + b"1234", header(a=F32 | {"shape": [-1]}) + b"1234",
        header(a=F32 | {"dtype": "F31"}) + b"1234", header(a=F32 | {"shape": None}) + b"1234",
        header(a=F32 | {"data_offsets": [4, 8]}) + b"12345678",
        header(a=F32, b=F32 | {"data_offsets": [8, 12]}) + 12 * b"1",
        header(a=F32, b=F32) + b"1234", header(a=7) + b"1234",
    ],
)  # fmt: skip
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError):
        SavedTensors(tmp_path / "a.safetensors")


def test_a_checkpoint_that_is_replaced_while_it_is_read_stays_itself(tmp_path):
    checkpoints.write_checkpoint(tmp_path, 1, {"a": torch.zeros(3)}, {})
    saved = checkpoints.read_checkpoint(tmp_path)
    checkpoints.write_checkpoint(tmp_path, 2, {"a": torch.ones(3)}, {})
    assert saved.tensors["a"].tolist() == [0, 0, 0]
    assert checkpoints.read_checkpoint(tmp_path).tensors["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "", 3, "a/b"])
def test_tensors_outside_of_the_folder_are_refused(name, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps({"format": 1, "tensors": name}))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.read_checkpoint(folder)


@pytest.mark.parametrize("name", ["checkpoint.json", "checkpoint-1.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_checkpoint_that_is_no_file_is_refused_at_once(name, kind, tmp_path):
    checkpoints.write_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, {})
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"is damaged: .*not a plain file"):
        checkpoints.read_checkpoint(tmp_path)


def test_tensors_of_another_checkpoint_are_refused(tmp_path):
    for folder, value in ((tmp_path / "a", 1.0), (tmp_path / "b", 2.0)):
        folder.mkdir()
        checkpoints.write_checkpoint(folder, 1, {"a": torch.tensor(value)}, {})
    name = "checkpoint-1.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{name} was not written with checkpoint.json"):
        checkpoints.read_checkpoint(tmp_path / "a")
    save_file({"a": torch.tensor(3.0)}, tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=f"{name} was not written with checkpoint.json"):
        checkpoints.read_checkpoint(tmp_path / "a")


def test_a_checkpoint_without_the_mark_of_its_pair_is_read(tmp_path):
    """As versions before the mark have written them."""
    save_file({"a": torch.tensor(3.0)}, tmp_path / "checkpoint-1.safetensors")
    facts = {"format": 1, "tensors": "checkpoint-1.safetensors", "step": 1}
    (tmp_path / "checkpoint.json").write_text(json.dumps(facts))
    saved = checkpoints.read_checkpoint(tmp_path)
    assert saved.facts["step"] == 1 and saved.tensors["a"] == 3
