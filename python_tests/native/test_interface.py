"""The interface to the compiled modules: arguments by name, dtypes by number, errors that say
where."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from conftest import TARGETS, Target, activated

from sparsekern.dispatch.launch import DTYPE_TAGS, INDEX_TAGS, codes, matrix
from sparsekern.dispatch.modules import native_module

COMPILED = [target for target in TARGETS if target.backend == "native"]


@pytest.fixture(params=COMPILED, ids=lambda target: target.name)
def compiled(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from activated(request.param)


@pytest.fixture
def module(compiled: Target) -> ModuleType:
    found, reason = native_module(compiled.device)
    assert found is not None, reason
    return found


def call(module: ModuleType, name: str, **arguments: object) -> object:
    """Call a kernel on one thread, or in the default stream, without scratch memory."""
    workspace = (0,) if hasattr(module, name + "_workspace") else ()
    return getattr(module, name)(arguments, 0, *workspace)


# Of codes_to_dense, which reads nothing before it has read its arguments.
ARGUMENTS = {"codes": (0, 0, 0, 0, 1, 1), "n": 4, "dense": 0}


def test_dtypes_have_the_same_numbers_on_both_sides(module):
    assert {getattr(torch, name): i for i, name in enumerate(module.DTYPES)} == DTYPE_TAGS
    assert {getattr(torch, name): i for i, name in enumerate(module.INDEX_DTYPES)} == INDEX_TAGS


def test_a_missing_argument_is_named(module):
    with pytest.raises(TypeError, match=r"^codes_to_dense: lacks the argument n$"):
        call(module, "codes_to_dense", codes=ARGUMENTS["codes"], dense=0)


def test_an_argument_that_no_field_has_is_named(module):
    with pytest.raises(TypeError, match=r"^codes_to_dense: takes 3 arguments, got .*'width'"):
        call(module, "codes_to_dense", width=4, **ARGUMENTS)


def test_an_operand_of_other_fields_is_refused(module):
    with pytest.raises(TypeError, match="an operand must be a tuple of 6 fields"):
        call(module, "codes_to_dense", **ARGUMENTS | {"codes": (0, 0, 0)})


@pytest.mark.parametrize("number", [-1, 4, 99])
def test_an_unknown_dtype_is_an_error_that_names_the_kernel(module, compiled, number):
    x = torch.zeros(3, 8, device=compiled.device)
    strange = (x.data_ptr(), number, *matrix(x)[2:])
    out = torch.zeros(3, 8, dtype=torch.int64, device=compiled.device)
    with pytest.raises(RuntimeError, match=f"^topk: there is no dtype number {number}$"):
        call(
            module,
            "topk",
            x=strange,
            k=2,
            sorted=True,
            relu=False,
            abs=False,
            values=out.data_ptr(),
            indices=out.data_ptr(),
            masked=0,
            counts=0,
            smallest=False,
        )
    channels = (x.data_ptr(), number, 3, 2, 4)
    with pytest.raises(
        RuntimeError, match=f"^channel_threshold: there is no dtype number {number}"
    ):
        call(module, "channel_threshold", x=channels, rank=1, thresholds=out.data_ptr())


def test_an_unknown_dtype_of_indices_is_an_error_that_names_the_kernel(module, compiled):
    indices = torch.zeros(8, dtype=torch.int64, device=compiled.device)
    strange = (0, 0, indices.data_ptr(), 2, 1, 8)
    with pytest.raises(RuntimeError, match=r"^count_active: .* dtype of indices number 2$"):
        call(module, "count_active", codes=strange, n=4, counts=indices.data_ptr())


def test_a_weight_of_another_dtype_is_an_error_that_names_the_kernel(module, compiled):
    values = torch.ones(1, 1, device=compiled.device)
    indices = torch.zeros(1, 1, dtype=torch.int64, device=compiled.device)
    weight = torch.ones(2, 2, dtype=torch.bfloat16, device=compiled.device)
    with pytest.raises(RuntimeError, match=r"^sparse_matmul: the weight must have"):
        call(
            module,
            "sparse_matmul",
            codes=codes(values, indices),
            weight=matrix(weight),
            bias=0,
            out=values.data_ptr(),
        )


def test_keywords_come_in_the_order_of_the_fields():
    """The quick way to top-k of the CPU module names its arguments, too."""
    module, reason = native_module("cpu")
    if module is None:
        pytest.skip(reason)
    x = torch.tensor([[1.0, 3.0, 2.0]])
    values, indices = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int64)
    fields = {
        "x": matrix(x), "k": 2, "sorted": True, "relu": False, "abs": False,
        "values": values.data_ptr(), "indices": indices.data_ptr(), "masked": 0, "counts": 0,
        "smallest": False,
    }  # fmt: skip
    module.topk_of_keywords(1, **fields)
    assert values.tolist() == [[3, 2]] and indices.tolist() == [[1, 2]]
    few = dict(list(fields.items())[:-1])
    swapped = {"k": 2, "x": matrix(x)} | fields
    for wrong in (few, swapped, fields | {"width": 1}):
        with pytest.raises(TypeError, match=r"^topk: keywords must be all fields in their order"):
            module.topk_of_keywords(1, **wrong)
    with pytest.raises(TypeError, match="takes the threads, and keywords"):
        module.topk_of_keywords(fields, 1)
    with pytest.raises(TypeError, match="an operand must be a tuple of 6 fields"):
        module.topk_of_keywords(1, **fields | {"x": (0, 0)})
    strange = (x.data_ptr(), 9, *matrix(x)[2:])
    with pytest.raises(RuntimeError, match=r"^topk: there is no dtype number 9$"):
        module.topk_of_keywords(1, **fields | {"x": strange})
