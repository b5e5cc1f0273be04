"""How the CPU kernels use threads: not for little work, not in forked children, without losing what
a thread throws, and with one selection whatever a thread's floating-point mode is."""

import concurrent.futures
import subprocess
import sys

import pytest
import torch
from processes import spawn

import sparsekern
from sparsekern import testing
from sparsekern.dispatch import modules
from sparsekern.ops import batch_norm, threshold_codes, threshold_relu
from sparsekern.ops.adam_step import adam_step


def native_cpu():
    module, reason = modules.native_module("cpu")
    if module is None:
        pytest.skip(reason)
    return module


def run(code: str) -> subprocess.CompletedProcess:
    """A Python process of its own, with two threads, which must end within two minutes."""
    with spawn("-c", code, threads=2) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def work(rows: int, n: int, k: int = 4, d: int = 64) -> dict:
    """Calls of every kernel, on matrices [rows, n] and codes [rows, k] of d features."""
    x = torch.randn(rows, n)
    weight, grad = torch.randn(n, d), torch.randn(rows, d)
    columns = weight.t().clone().t()
    values, indices = sparsekern.topk(x, k)
    channels = x.view(rows, 4, n // 4)
    threshold = torch.full((4,), 2.0)
    codes = threshold_codes(channels, threshold)
    backward = torch.ops.sparsekern.sparse_matmul_backward
    conv = torch.ops.sparsekern.pointwise_conv_backward
    narrow = torch.randn(8, 4)
    return {
        "topk": lambda: sparsekern.topk(x, 4),
        "topk_mask": lambda: sparsekern.topk_mask(x, 4),
        "topk of a row": lambda: sparsekern.topk(x.view(1, -1), 4),
        "batch_topk": lambda: sparsekern.batch_topk(x, 4),
        "codes_to_dense": lambda: torch.ops.sparsekern.codes_to_dense(values, indices, n),
        "sparse_matmul": lambda: sparsekern.sparse_matmul(values, indices, weight),
        "column-major": lambda: sparsekern.sparse_matmul(values, indices, columns),
        "transpose_codes": lambda: sparsekern.transpose_codes(indices, n),
        "backward": lambda: backward(grad, values, indices, weight, True, True),
        "backward, column-major": lambda: backward(grad, values, indices, columns, True, True),
        "count_active": lambda: sparsekern.count_active(indices, n),
        "channel_threshold": lambda: sparsekern.channel_threshold(channels, 0.01),
        "threshold_relu": lambda: threshold_relu(channels, threshold),
        "threshold_codes": lambda: threshold_codes(channels, threshold),
        "batch_norm": lambda: batch_norm(channels),
        "pointwise_conv": lambda: sparsekern.pointwise_conv(
            codes.values, codes.indices, channels.shape, narrow
        ),
        "pointwise_conv backward": lambda: conv(
            torch.ones(rows, 8, n // 4), codes.values, codes.indices, narrow
        ),
        "adam_step": lambda: adam_step(
            x.clone(), x, torch.zeros_like(x), torch.zeros_like(x), lr=0.1, step=1
        ),
    }


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_little_work_is_done_by_one_thread(two_threads):
    """What one core does in tens of microseconds: threads that share a busy core wait for each
    other for milliseconds."""
    module = native_cpu()
    for name, call in work(8, 1024).items():
        before = module.started_teams()
        call()
        assert module.started_teams() == before, name


def test_much_work_is_divided(two_threads):
    module = native_cpu()
    calls = work(512, 8192, 32, 256)
    one_core = {"count_active", "transpose_codes", "codes_to_dense"}  # too little even so
    for name in calls.keys() - one_core:
        before = module.started_teams()
        calls[name]()
        assert module.started_teams() > before, name


FORKED = """
import multiprocessing, os, sys, torch, sparsekern
sys.path.insert(0, {folder!r})
import test_threads as tests
torch.set_num_threads(2)
module = sparsekern.dispatch.modules.native_module("cpu")[0]
module.set_nanoseconds_per_thread(1)
calls = tests.work(16, 1024)  # torch itself uses threads from 32768 elements on
def bytes_of(call):  # without torch, whose own threads hang in a forked child
    found = call()
    found = found if isinstance(found, tuple) else (found,)
    return [tensor.numpy().tobytes() for tensor in found if tensor is not None]
right = {{name: bytes_of(call) for name, call in calls.items()}}
assert module.started_teams() > 0
def child():
    started = module.started_teams()
    for name, call in calls.items():
        assert bytes_of(call) == right[name], name
    assert module.started_teams() == started
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as other:  # a thread of the child's own has its own team
        assert other.submit(bytes_of, calls["topk"]).result() == right["topk"]
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(50)
code = process.exitcode
process.kill()
sys.exit("the child hangs" if code is None else code)
"""


def assert_equal(name, given, right):
    given, right = (r if isinstance(r, tuple) else (r,) for r in (given, right))
    for a, b in zip(given, right, strict=True):
        if a is not None:
            testing.assert_same(name, a, b)


def test_a_forked_child_computes_what_its_parent_does():
    native_cpu()
    done = run(FORKED.format(folder=__file__.rpartition("/")[0]))
    assert done.returncode == 0, done.stderr[-2000:]


EXHAUSTED = """
import resource, sys, torch, sparsekern
from sparsekern.ops import threshold_codes, threshold_relu
torch.set_num_threads(2)
module = sparsekern.dispatch.modules.native_module("cpu")[0]
module.set_nanoseconds_per_thread(1)
x = torch.randn(1, 2, 4_000_000)
calls = {
    "channel_threshold": lambda: sparsekern.channel_threshold(x, 0.999),
    "threshold_codes": lambda: threshold_codes(x, torch.full((2,), -10.0)),
}
sparsekern.topk(torch.randn(64, 1000), 8)  # the threads are there before memory is short
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
started = module.started_teams()
for name, call in calls.items():
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), resource.RLIM_INFINITY))
    try:
        call()
    except MemoryError:
        pass
    else:
        sys.exit(f"{name} did not run out of memory")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
for call in calls.values():
    call()
assert module.started_teams() > started
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory: run the test on Linux")
def test_memory_that_runs_out_in_a_thread_is_a_memory_error():
    native_cpu()
    done = run(EXHAUSTED)
    assert done.returncode == 0, done.stderr[-2000:]


# -- denormals -------------------------------------------------------------------------------------


def tiny_numbers(dtype):
    """Denormal, zero and negative numbers, a few of each."""
    smallest = {torch.float64: 5e-324, torch.float16: 6e-8}.get(dtype, 1e-40)
    steps = torch.randint(-3, 4, (6, 5000), generator=torch.Generator().manual_seed(0))
    return (steps.double() * smallest).to(dtype)


def selections(x):
    return {
        "topk": sparsekern.topk(x, 40),
        "relu": sparsekern.topk(x, 3000, relu=True),
        "abs": sparsekern.topk(x, 40, abs=True),
        "one row": sparsekern.topk(x.view(1, -1), 700),
        "strided": sparsekern.topk(x.t(), 2),
        "mask": sparsekern.topk_mask(x, 40, relu=True),
        "batch_topk": sparsekern.batch_topk(x, 40),
        "channel_threshold": sparsekern.channel_threshold(x.view(6, 5, 1000), 0.3),
        "many channels": sparsekern.channel_threshold(x, 0.3),
        "threshold_relu": threshold_relu(x.view(6, 5, 1000), torch.zeros(5)),
        "threshold_codes": threshold_codes(x.view(6, 5, 1000), torch.zeros(5)),
        "count_active": sparsekern.count_active(
            torch.arange(6 * 5000).view(6, 5000) % 7, 7, values=x
        ),
    }


def flushing(call, threads):
    """What it returns on a thread that flushes denormals."""

    def on_thread():
        torch.set_num_threads(threads)
        assert torch.set_flush_denormal(True)
        return call()

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        return other.submit(on_thread).result()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_a_selection_does_not_depend_on_how_a_thread_treats_denormals(instruction_sets, dtype):
    x = tiny_numbers(dtype)
    with sparsekern.backend("reference"):
        right = selections(x)
    for name in instruction_sets:
        for threads in (1, 2):
            for found in (selections(x), flushing(lambda: selections(x), threads)):
                for operation, expected in right.items():
                    what = f"{name}, {threads} threads, {operation}"
                    assert_equal(what, found[operation], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_definitions_do_not_depend_on_it_either(dtype):
    x = tiny_numbers(dtype)
    with sparsekern.backend("reference"):
        right, found = selections(x), flushing(lambda: selections(x), 1)
    for operation in ("topk", "abs", "one row", "strided", "batch_topk", "channel_threshold"):
        assert_equal(operation, found[operation], right[operation])
