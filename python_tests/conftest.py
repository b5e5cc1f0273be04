"""Targets: every backend on every device that it can run on here, and the count of what each went
through.

A target is a backend with a device. On a machine without a GPU the CUDA sources run in the host
emulation and the Triton kernels in Triton's interpreter; with a GPU both run on it as well.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Read when torch is imported: a thread that waits leaves its core to the other workers, whose
# tests take three times as long otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import interpreter
import pytest

import sparsekern
from sparsekern import testing
from sparsekern.dispatch import backends, modules, operations

interpreter.install()
CHECKOUT = pathlib.Path(__file__).parents[1]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Folders whose slow tests are few and take longest.
LONGEST = ("cli", "distributed", "docs", "native", "studies")
_cases: collections.Counter[str] = collections.Counter()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers are the same in every run, whatever ran before in the process."""
    torch.manual_seed(0)


@dataclass(frozen=True)
class Target:
    """A backend on a device; `thorough` where a case takes microseconds and the full sweep is
    affordable."""

    name: str
    backend: str
    device: str = "cpu"
    thorough: bool = False
    emulated: bool = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Everything inside runs on this backend."""
        with contextlib.ExitStack() as stack:
            if self.emulated:
                stack.enter_context(backends.stand_in("cpu", _emulation()))
            stack.enter_context(sparsekern.backend(self.backend))
            yield

    def missing(self) -> str:
        """What keeps this target from running here, with the remedy; empty when it runs."""
        if self.emulated:
            return _emulation_missing()
        return operations.operations["topk"].missing(self.backend, self.device)

    @property
    def checks_indices(self) -> bool:
        """Whether an index out of range is an error: on CUDA the check would synchronise."""
        return self.device == "cpu" and not self.emulated

    @property
    def torch_on_cuda(self) -> bool:
        """Whether torch's own CUDA kernels compute: they assert that indices are in range, and
        index_add, which adds with atomics, rounds differently each time."""
        return self.backend == "reference" and self.device == "cuda"

    def require_any_index(self) -> None:
        """Skips the test where an index out of range ends the process's use of its GPU."""
        if self.torch_on_cuda:
            pytest.skip(
                f"{self.name}: torch's kernels assert that indices are in range, after which no "
                "test of the process can use the GPU; run on another target"
            )

    def require_repeats(self) -> None:
        """Skips the test where the same call may round differently each time."""
        if self.torch_on_cuda:
            pytest.skip(
                f"{self.name}: torch's index_add adds with atomics on CUDA, in any order; run on "
                "another target"
            )

    def assert_repeated(self, what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Raises AssertionError unless both hold the same bits: close numbers are enough where the
        same call may round differently each time."""
        if not self.torch_on_cuda:
            testing.assert_same(what, actual, expected)
        else:
            torch.testing.assert_close(actual, expected, msg=lambda text: f"{what}: {text}")

    @property
    def float64(self) -> bool:
        """Whether it computes in float64, which numerical gradient checks need."""
        return self.backend == "reference" or (self.device == "cpu" and self.thorough)

    def require_float64(self) -> None:
        """Skips the test where this target has none."""
        if not self.float64:
            pytest.skip(
                f"{self.name} has no float64: run the test on a target with it, reference or "
                "native-cpu"
            )


TARGETS = [
    Target("reference", "reference", thorough=True),
    Target("native-cpu", "native", thorough=True),
    Target("cuda-emulation", "native", emulated=True),
]
if torch.cuda.is_available():
    TARGETS += [
        Target("reference-cuda", "reference", "cuda"),
        Target("native-cuda", "native", "cuda"),
        Target("triton-cuda", "triton", "cuda"),
    ]
else:
    TARGETS.append(Target("triton-interpreter", "triton"))


_built: list[object] = []


def _emulation() -> object:
    if not _built:
        import emulation_build

        _built.append(emulation_build.build_module())
    return _built[0]


def _emulation_missing() -> str:
    try:
        _emulation()
    except RuntimeError as error:
        return str(error)
    return ""


def activated(chosen: Target) -> Iterator[Target]:
    """What a fixture yields from: the target, active during the test."""
    if reason := chosen.missing():
        pytest.skip(f"{chosen.name}: {reason}")
    with chosen.active():
        yield chosen


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test once on every target; the target is active during the test."""
    yield from activated(request.param)


@pytest.fixture
def counted(target: Target) -> Callable[[], None]:
    """Call it once per case checked: the totals are printed at the end of the run."""

    def count() -> None:
        _cases[target.name] += 1

    return count


@pytest.fixture
def eager_teams() -> Iterator[None]:
    """The CPU kernels divide among torch's threads whatever can be divided, however little."""
    module, reason = modules.native_module("cpu")
    if module is None:
        pytest.skip(reason)
    before = module.set_nanoseconds_per_thread(1)
    yield
    module.set_nanoseconds_per_thread(before)


@pytest.fixture
def instruction_sets(eager_teams: None) -> Iterator[Iterator[str]]:
    """The names of the CPU kernels' instruction sets, each in use while it is the newest one; after
    the test the first one is again, and torch has the threads that it had before."""
    module, reason = modules.native_module("cpu")
    if module is None:
        pytest.skip(reason)
    threads, names = torch.get_num_threads(), module.instruction_sets()

    def in_turn() -> Iterator[str]:
        for name in names:
            module.use_instruction_set(name)
            yield name

    try:
        yield in_turn()
    finally:
        torch.set_num_threads(threads)
        module.use_instruction_set(names[0])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the library allocates uninitialised with NaN or a large number: a forgotten write
    then shows."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda"):
            if tensor.dtype in (torch.uint8, torch.bool):
                return tensor
            floating = tensor.is_floating_point()
            tensor.fill_(torch.nan if floating else torch.iinfo(tensor.dtype).max // 2 + 7)
        return tensor

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poison(*args: object, _original: Callable = original, **kwargs: object) -> torch.Tensor:
            made = _original(*args, **kwargs)
            return made if torch.compiler.is_compiling() else fill(made)

        monkeypatch.setattr(owner, name, poison)


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist keep the order of files, which it would sort by their number of tests."""
    config.option.loadscopereorder = False


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to test an installed copy of other code than that of this checkout."""
    installed = pathlib.Path(sparsekern.__file__).parent
    here = CHECKOUT / "sparsekern"
    if installed == here or hasattr(session.config, "workerinput"):
        return
    for path in sorted(here.rglob("*.py")):
        copy = installed / path.relative_to(here)
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            raise pytest.UsageError(
                f"sparsekern is imported from {installed}, whose {path.relative_to(here)} is not "
                "that of this checkout: install it again, or once with pip install -e '.[test]'"
            )


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what compiles, and what is slow on its target; files with slow tests come first,
    those of LONGEST before the others, then those with the most tests, so that no long one is what
    a last worker is left with."""
    for item in items:
        if item.get_closest_marker("compiles") or _slow_on_its_target(item):
            item.add_marker(pytest.mark.slow)
    files = {item.path for item in items if item.get_closest_marker("slow")}
    counts = collections.Counter(item.path for item in items)
    items.sort(
        key=lambda item: (
            item.path not in files,
            item.path.parent.name not in LONGEST,
            -counts[item.path],
        )
    )


def _slow_on_its_target(item: pytest.Item) -> bool:
    """Whether a mark slow_on(target's name, dtypes...) applies: with these dtypes, or with any."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    chosen, values = parameters.get("target"), tuple(parameters.values())
    for mark in item.iter_markers("slow_on"):
        name, *dtypes = mark.args
        if chosen and chosen.name == name and (not dtypes or any(v in values for v in dtypes)):
            return True
    return False


def pytest_report_header() -> list[str]:
    source = pathlib.Path(sparsekern.__file__).parent
    lines = [
        f"sparsekern from {source}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    ]
    for name in ("cpu", "cuda"):
        module, reason = modules.native_module(name)
        lines.append(f"native {name}: {module.build_info() if module else reason}")
    return lines


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts of a worker process (pytest-xdist) to the one that prints them."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["cases"] = dict(_cases)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Add up the counts of a worker process that has ended (one that crashed has none)."""
    _cases.update(getattr(node, "workeroutput", {}).get("cases", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tests: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("passed", []):
        for chosen in TARGETS:
            if f"[{chosen.name}" in report.nodeid or f"-{chosen.name}" in report.nodeid:
                tests[chosen.name] += 1
    terminalreporter.section("backends exercised")
    for chosen in TARGETS:
        passed, cases = tests[chosen.name], _cases[chosen.name]
        verdict = "" if passed else "   NOT EXERCISED"
        terminalreporter.line(f"{chosen.name:20} {passed:5} tests {cases:7} cases{verdict}")
