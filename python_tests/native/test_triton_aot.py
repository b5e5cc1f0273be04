"""Every Triton kernel compiles ahead of time, without a GPU, for every architecture we name, and
fits the machine.

The compiler refuses to run in a process that interprets kernels, so this file is also a script:
each target is compiled by `python test_triton_aot.py TARGET RESULT`, two at a time, and the tests
read the results.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

from sparsekern.ops import triton_keys as keys  # noqa: E402
from sparsekern.ops.adam_step import triton as adam  # noqa: E402
from sparsekern.ops.channel_threshold import triton as channel_threshold  # noqa: E402
from sparsekern.ops.codes_to_dense import triton as codes_to_dense  # noqa: E402
from sparsekern.ops.count_active import triton as count_active  # noqa: E402
from sparsekern.ops.linear_topk import triton as linear_topk  # noqa: E402
from sparsekern.ops.sparse_matmul import triton as sparse_matmul  # noqa: E402
from sparsekern.ops.threshold_relu import triton as threshold_relu  # noqa: E402
from sparsekern.ops.topk import triton as topk  # noqa: E402
from sparsekern.ops.topk import triton_finish as topk_finish  # noqa: E402
from sparsekern.ops.topk import triton_groups as topk_groups  # noqa: E402
from sparsekern.ops.topk import triton_passes as topk_passes  # noqa: E402

pytestmark = pytest.mark.compiles
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# What a block may allocate: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100, 64 KiB of LDS on
# gfx942.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Sizes and strides that a typical call passes as multiples of 16, which Triton then knows.
ALIGNED = (
    "n", "d", "length", "width", "row_stride", "weight_stride_n", "grad_weight_stride_n",
    "columns", "inner", "part", "size", "first", "capacity", "x_stride_n", "rounded_stride_n",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel as one kind of call specialises it."""

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    registers: int = 96  # ceilings are little above what triton 3.6 and 3.9 need


# -- cases -----------------------------------------------------------------------------------------


def float_constants(dtype: torch.dtype) -> dict[str, Any]:
    bits = keys.bits_of(dtype)
    return {"MAGNITUDE": bits.magnitude, "INFINITY": bits.infinity, "ABS": False}


def bits_pointer(dtype: torch.dtype) -> str:
    return "*i32" if dtype == torch.float32 else "*i16"


def topk_constants(dtype: torch.dtype) -> dict[str, Any]:
    return {**float_constants(dtype), "SMALLEST": False}


def select_case(n: int, dtype: torch.dtype, **changes: Any) -> Case:
    """A whole row with unit stride; a constant changed to None is left to the call."""
    rows, columns, warps = topk.row_block(n)
    constants = {
        **topk_constants(dtype), "SPAN": 0, "UNIT_STRIDE": True, "ROWS": rows, "BLOCK": columns,
        "slices": 1, "col_stride": 1, **changes,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if value is not None}
    pointers = {"x": bits_pointer(dtype), "candidates": "*i32", "taken": "*i32"}
    # 64-bit addresses of single elements take more, where columns are strided or listed.
    registers = 80 if constants["UNIT_STRIDE"] and not constants["SPAN"] else 112
    return Case(topk.select_kernel, pointers, constants, warps, registers)


def maxima_case(span: int, dtype: str, **changes: Any) -> Case:
    constants = {
        "ABS": False, "SMALLEST": False, "UNIT_STRIDE": True, "SPAN": span,
        "BLOCK": topk_groups.BLOCK, "col_stride": 1, **changes,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if value is not None}
    if not constants["UNIT_STRIDE"]:
        constants["BLOCK"] = topk_groups.STRIDED_BLOCK
    pointers = {"x": f"*{dtype}", "best": f"*{dtype}"}
    return Case(topk_groups.maxima_kernel, pointers, constants, topk_groups.WARPS, registers=64)


def passes_case(dtype: torch.dtype) -> Case:
    constants = {
        **topk_constants(dtype), "WAYS": topk_passes.WAYS, "BLOCK": topk_passes.BLOCK,
        "col_stride": 1,
    }  # fmt: skip
    pointers = {"x": bits_pointer(dtype), "taken": "*i32"}
    return Case(topk_passes.passes_kernel, pointers, constants, 4, registers=168)


def finish_case(k: int, dtype: torch.dtype, ordered: bool) -> Case:
    rows, side, warps = topk_finish.finish_block(k, ordered)
    constants = {
        **topk_constants(dtype), "SORTED": ordered, "RELU": True, "MASKED": not ordered,
        "COUNT": True, "ROWS": rows, "SIDE": side, "col_stride": 1,
    }  # fmt: skip
    pointer = bits_pointer(dtype)
    pointers = {
        "x": pointer, "columns": "*i32", "values": pointer, "indices": "*i64", "masked": pointer,
        "counts": "*i64",
    }  # fmt: skip
    return Case(topk_finish.finish_kernel, pointers, constants, warps, 168 if k > 512 else 96)


def forward_case(d: int, values: str, weight: str, row_major: bool = True) -> Case:
    columns, warps = sparse_matmul.forward_block(d, 4 if weight == "fp32" else 2)
    pointers = {
        "values": f"*{values}", "indices": "*i64", "weight": f"*{weight}", "bias": f"*{weight}",
        "out": f"*{values}",
    }  # fmt: skip
    constants = {
        "HAS_BIAS": True, "BLOCK": columns,
        "UNROLL": sparse_matmul.UNROLL,
        "weight_stride_d" if row_major else "weight_stride_n": 1,
    }  # fmt: skip
    return Case(sparse_matmul.forward_kernel, pointers, constants, warps)


def adam_case(kernel: Any, size: str, warps: int) -> Case:
    matrices = dict.fromkeys(("parameter", "grad", "mean", "square"), "*fp32")
    names = ("step_size", "new_mean", "beta2", "new_square", "root_scale", "eps", "weight_decay")
    numbers = dict.fromkeys(names, "fp32")
    return Case(kernel, {**matrices, size: "i64", **numbers}, {"BLOCK": adam.BLOCK}, warps)


def digits_case(dtype: torch.dtype, channels: int, inner: int, top: bool) -> Case:
    """A pass over [outer, channels, inner]; the sizes of a program's part may pass 2^31."""
    constants = {name: value for name, value in float_constants(dtype).items() if name != "ABS"}
    bits, slots = channel_threshold.digit_block(channels, inner)
    constants |= {
        "TOP": top, "BITS": bits, "SLOTS": slots, "LONG": inner >= channel_threshold.BLOCK,
        "BLOCK": channel_threshold.BLOCK,
    }  # fmt: skip
    if inner == 1:
        constants["inner"] = 1
    pointers = {
        "x": bits_pointer(dtype), "prefixes": "*i32", "counts": "*i64", "size": "i64",
        "part": "i64",
    }  # fmt: skip
    return Case(channel_threshold.digits_kernel, pointers, constants, 8, registers=112)


def extend_case(dtype: torch.dtype, bits: int, top: bool) -> Case:
    constants = {name: value for name, value in float_constants(dtype).items() if name != "ABS"}
    pointers = {
        "counts": "*i64", "prefixes": "*i32", "wanted": "*i64", "thresholds": bits_pointer(dtype),
    }  # fmt: skip
    constants |= {"TOP": top, "LAST": not top, "BITS": bits}
    return Case(channel_threshold.extend_kernel, pointers, constants, 4)


def threshold_relu_case(columns: int, dtype: str, runs: bool, normalized: bool) -> Case:
    rows, side = threshold_relu.tile_block(columns)
    constants = {"NORMALIZED": normalized, "RUNS": runs, "ROWS": rows, "COLUMNS": side}
    if not runs:
        constants["inner"] = 1
    pointers = {name: "*fp32" for name in ("threshold", "scale", "shift")}
    pointers |= {"x": f"*{dtype}", "y": f"*{dtype}", "counts": "*i64"}
    return Case(threshold_relu.threshold_relu_kernel, pointers, constants, 8)


def backward_case(d: int, values: str, weight: str, row_major: bool = True) -> Case:
    pointers = {
        "grad": f"*{values}", "values": f"*{values}", "weight": f"*{weight}", "offsets": "*i64",
        "entries": "*i64", "dots": "*fp32", "grad_weight": f"*{weight}",
    }  # fmt: skip
    constants = {
        "NEED_VALUES": True, "NEED_WEIGHT": True,
        "BLOCK": sparse_matmul.backward_block(d), "UNROLL": sparse_matmul.UNROLL,
    }  # fmt: skip
    for matrix in ("weight", "grad_weight"):
        constants[f"{matrix}_stride_{'d' if row_major else 'n'}"] = 1
    return Case(sparse_matmul.backward_kernel, pointers, constants, 1)


def round_case(row_major: bool) -> Case:
    rows, columns = linear_topk.round_tile(768, row_major)
    constants = {"ROWS": rows, "COLUMNS": columns}
    for matrix in ("x", "rounded"):
        constants[f"{matrix}_stride_{'d' if row_major else 'n'}"] = 1
    pointers = {"x": "*fp32", "rounded": "*i16", "lengths": "*fp32", "errors": "*fp32"}
    return Case(linear_topk.round_kernel, pointers, constants, linear_topk.WARPS)


def screening_pointers(scores: str) -> dict[str, str]:
    vectors = ("bias", "scale", "lengths", "errors", "x_errors", "x_lengths", "thresholds", "upper")
    numbers = ("score_error", "bias_error", "least_error")
    return {
        "scores": f"*{scores}", "latents": "*i32", "counts": "*i32", "maxima": "*fp32",
        **dict.fromkeys(vectors, "*fp32"), **dict.fromkeys(numbers, "fp32"),
    }  # fmt: skip


def bound_maxima_case(scores: str, affine: bool, span: int) -> Case:
    constants = {
        "HAS_BIAS": affine, "HAS_SCALE": affine, "SPAN": span, "ROWS": linear_topk.MAXIMA_ROWS,
        "BLOCK": linear_topk.MAXIMA_BLOCK,
    }  # fmt: skip
    pointers = screening_pointers(scores)
    return Case(linear_topk.maxima_kernel, pointers, constants, linear_topk.WARPS)


def append_case(scores: str, affine: bool) -> Case:
    constants = {"HAS_BIAS": affine, "HAS_SCALE": affine, "BLOCK": linear_topk.APPEND_BLOCK}
    pointers = screening_pointers(scores)
    return Case(linear_topk.append_kernel, pointers, constants, linear_topk.WARPS, registers=120)


def score_case(d: int, row_major: bool = True) -> Case:
    listed, features = linear_topk.score_tile(d)
    constants = {
        "HAS_BIAS": True, "HAS_SCALE": True, "LISTED": listed, "BLOCK": features,
        "weight_stride_d" if row_major else "weight_stride_n": 1,
    }  # fmt: skip
    matrices = dict.fromkeys(("x", "weight", "bias", "scale", "scores"), "*fp32")
    pointers = {**matrices, "latents": "*i32", "counts": "*i32"}
    # Without neighbours in memory every factor has an address of its own.
    registers = 96 if row_major else 144
    return Case(linear_topk.score_kernel, pointers, constants, linear_topk.WARPS, registers)


CASES = {
    "select 16, several rows, bfloat16": select_case(16, torch.bfloat16),
    "select 512 float16": select_case(512, torch.float16),
    "select 2048 float32": select_case(2048, torch.float32),
    "select 8192 float32": select_case(8192, torch.float32),
    "select 8192 float32, smallest": select_case(8192, torch.float32, SMALLEST=True),
    "select 8192 bfloat16, sliced": select_case(8192, torch.bfloat16, slices=None),
    "select 4096 float32, strided": select_case(
        4096, torch.float32, UNIT_STRIDE=False, col_stride=None
    ),
    "select 8192 float32, candidates": select_case(8192, torch.float32, SPAN=1),
    "select 2048 bfloat16, groups": select_case(2048, torch.bfloat16, SPAN=32),
    "select 4096 float32, groups": select_case(4096, torch.float32, SPAN=64),
    "maxima 32 float32": maxima_case(32, "fp32"),
    "maxima 4 float16": maxima_case(4, "fp16"),
    "maxima 4 float16, smallest": maxima_case(4, "fp16", SMALLEST=True),
    "maxima 128 bfloat16, strided": maxima_case(128, "bf16", UNIT_STRIDE=False, col_stride=None),
    "passes float32": passes_case(torch.float32),
    "finish 64 bfloat16, sorted": finish_case(64, torch.bfloat16, True),
    "finish 20 float32, sorted": finish_case(20, torch.float32, True),
    "finish 8 float32, sorted": finish_case(8, torch.float32, True),
    "finish 1000 float32, sorted": finish_case(1000, torch.float32, True),
    "finish 64 float32, masked": finish_case(64, torch.float32, False),
    "scatter 16-bit": Case(
        codes_to_dense.scatter_kernel,
        {"values": "*i16", "indices": "*i64", "dense": "*i16"},
        {"BLOCK": codes_to_dense.SCATTER_BLOCK},
        4,
    ),
    "forward bfloat16": forward_case(4096, "bf16", "bf16"),
    "forward float16, float32 weight": forward_case(768, "fp16", "fp32"),
    "forward float32, column-major": forward_case(4096, "fp32", "fp32", row_major=False),
    "backward bfloat16": backward_case(4096, "bf16", "bf16"),
    "backward bfloat16, float32 weight": backward_case(4096, "bf16", "fp32"),
    "backward float16, float32 weight": backward_case(768, "fp16", "fp32", row_major=False),
    "backward float32, column-major": backward_case(4096, "fp32", "fp32", row_major=False),
    "adam step": adam_case(adam.adam_step_kernel, "count", 4),
    "adam, unit rows": adam_case(adam.adam_unit_rows_kernel, "d", 4),
    "digits float32, first": digits_case(torch.float32, 10, 10000, True),
    "digits float32, short runs": digits_case(torch.float32, 512, 49, False),
    "digits bfloat16": digits_case(torch.bfloat16, 10, 10000, False),
    "digits float32, channels last": digits_case(torch.float32, 64, 1, False),
    "digits float16, channels last": digits_case(torch.float16, 64, 1, True),
    "extend float32": extend_case(torch.float32, 11, True),
    "extend bfloat16, last": extend_case(torch.bfloat16, 8, False),
    "threshold_relu bfloat16": threshold_relu_case(10000, "bf16", True, True),
    "threshold_relu float32, 49": threshold_relu_case(49, "fp32", True, False),
    "threshold_relu float32, rows": threshold_relu_case(64, "fp32", False, True),
    "round rows": round_case(True),
    "round columns": round_case(False),
    "bound maxima 16 float32": bound_maxima_case("fp32", False, 16),
    "bound maxima 1 bfloat16, affine": bound_maxima_case("i16", True, 1),
    "append float32": append_case("fp32", False),
    "append bfloat16, affine": append_case("i16", True),
    "score candidates": score_case(768),
    "score candidates, column-major": score_case(64, row_major=False),
    "count_active bfloat16": Case(
        count_active.count_active_kernel,
        {"indices": "*i64", "values": "*bf16", "counts": "*i64"},
        {"HAS_VALUES": True, "BLOCK": count_active.BLOCK},
        4,
    ),
}


# -- compiling, in a process of its own ------------------------------------------------------------


def cuobjdump() -> str | None:
    """The tool that reads registers and stack from a cubin: triton's own, or the one on PATH."""
    bundled = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def compile_case(case: Case, target: tuple[str, Any, int]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.pointers.get(name, "i32")
        for name in names
    }
    aligned = [
        name
        for name in names
        if (name in case.pointers or name in ALIGNED)
        and name not in case.kernel.do_not_specialize_on_alignment
    ]
    source = ASTSource(
        case.kernel,
        signature,
        {(names.index(name),): value for name, value in case.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in aligned
            if signature[name] != "constexpr"
        },
    )
    options = {"num_warps": case.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def resources(compiled: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Registers, spills, shared bytes and size of a compiled kernel; None where no tool tells."""
    found = {"registers": None, "spills": None, "shared": compiled.metadata.shared}
    if "hsaco" in compiled.asm:
        listing = compiled.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", listing)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", listing)[1])
        found["bytes"] = len(compiled.asm["hsaco"])
        return found
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    found["bytes"] = len(compiled.asm["cubin"])
    if tool := cuobjdump():
        usage = subprocess.run(
            [tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
        found["registers"] = numbers["REG"]
        found["spills"] = numbers["STACK"] + numbers["LOCAL"]
    return found


def compile_all(target: str, result: pathlib.Path) -> None:
    """Write one row per case, before and after each, so that a crash of the compiler is seen."""
    rows = {}
    for name, case in CASES.items():
        rows[name] = {"error": "the compiler took its process down"}
        result.write_text(json.dumps(rows))
        begin = time.perf_counter()
        try:
            rows[name] = resources(compile_case(case, TARGETS[target]), result.parent)
        except Exception as error:  # reported by the tests of this kernel and target
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
        rows[name]["seconds"] = time.perf_counter() - begin
        result.write_text(json.dumps(rows))


def compile_apart(target: str, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of `compile_all` run by another interpreter that does not interpret kernels."""
    own = folder / target
    own.mkdir()
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(own / "cache")
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    finished = subprocess.run(
        [sys.executable, __file__, target, str(own / "result.json")],
        env=environment,
        capture_output=True,
        text=True,
    )
    missing = {"error": f"not reached, the process ended with {finished.stderr[-2000:]}"}
    result = own / "result.json"
    rows = json.loads(result.read_text()) if result.exists() else {}
    return {name: rows.get(name, missing) for name in CASES}


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("aot")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda target: compile_apart(target, folder), TARGETS)
        return dict(zip(TARGETS, results, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(compiled: dict, target: str, name: str) -> None:
    row = compiled[target][name]
    assert "error" not in row, row.get("error")
    assert row["bytes"] > 0
    assert row["shared"] <= SHARED_BYTES[target]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(compiled: dict, target: str, name: str) -> None:
    row = compiled[target][name]
    assert "error" not in row, row.get("error")
    if row["registers"] is None:
        pytest.skip("cuobjdump is neither in triton's wheel nor on the path: put CUDA's bin there")
    assert row["spills"] == 0
    if target != "gfx942":  # there, a wave of 64 lanes may hold 512 registers each
        assert row["registers"] <= CASES[name].registers


def test_table(compiled: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Print what was compiled: registers / spilled bytes / shared bytes for each target."""
    lines = [f"{'kernel':34s}" + "".join(f"{target:>20s}" for target in TARGETS)]
    for name in CASES:
        cells = []
        for target in TARGETS:
            row = compiled[target][name]
            fields = (row.get(field, "-") for field in ("registers", "spills", "shared"))
            cells.append("failed" if "error" in row else "/".join(map(str, fields)))
        lines.append(f"{name:34s}" + "".join(f"{cell:>20s}" for cell in cells))
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(lines) == len(CASES) + 1


if __name__ == "__main__":
    compile_all(sys.argv[1], pathlib.Path(sys.argv[2]))
