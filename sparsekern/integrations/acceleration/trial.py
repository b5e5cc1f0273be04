"""What a stranger's module does on random rows, as it is and with our selections.

A copy is tried, so nothing of the module changes: first on the meta device, which has no numbers,
then, where a selection would be ours, with random numbers in the place of its parameters. Its
results and gradients have to be the same in both modes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .classes import standing_in
from .late import LateTensor
from .plain import holds_selection, plain_replacement, selecting_methods
from .replacement import Accelerated, Replacement, class_of
from .selecting import Selecting, all_dense

# Widths of the rows where no parameter has one that works.
_WIDTHS = (512, 65536)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_plain(module: nn.Module) -> tuple[Replacement | None, str]:
    """Return what stands in for a module of no known library, or None with the reason.

    It selects by its own code, or decodes what a child selects. The reason is empty for others.
    """
    own = class_of(module)
    if isinstance(module, Accelerated):
        return plain_replacement(own), ""
    selects = bool(selecting_methods(own))
    if not selects and not holds_selection(module):
        return None, ""
    replacement = plain_replacement(own)
    reason = _refusal(module, replacement, must_decode=not selects)
    if reason is None:
        return replacement, ""
    return None, reason if selects else ""


def _refusal(module: nn.Module, replacement: Replacement, must_decode: bool) -> str | None:
    for name in replacement.replaced:
        if name in vars(module):
            return f"{name} is an attribute of this module alone"
        if not _takes_one_tensor(getattr(type(module), name)):
            return f"{name} takes other arguments than one tensor"
    try:
        tried = _copy(module, _on_meta, _on_meta)
        tried.__class__ = standing_in(class_of(module), replacement, False)
        tried.__class__ = class_of(module)
    except Exception as error:  # a stranger's code may raise anything
        return f"a copy of another class cannot be made: {_first_line(error)}"
    for name in replacement.replaced:
        shape, why_not = _shape_that_works(tried, name)
        reason = why_not if shape is None else _difference(module, name, shape, must_decode)
        if reason is not None:
            return reason
    return None


def _takes_one_tensor(method: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    _, *given = inspect.signature(method).parameters.values()
    required = [one for one in given if one.default is inspect.Parameter.empty]
    return len(required) == 1 and required[0].kind in kinds


def _shape_that_works(tried: nn.Module, name: str) -> tuple[tuple[int, ...] | None, str]:
    """Return a shape of rows with which a selection is ours, or None with the reason.

    tried: a copy on the meta device.
    """
    own = (*tried.parameters(), *tried.buffers())
    widths = [size for tensor in own for size in tuple(tensor.shape)[::-1] if size > 1]
    failure, left = "", ""
    for shape in itertools.chain(*map(_shapes, dict.fromkeys((*widths, *_WIDTHS)))):
        try:
            with torch.no_grad(), torch.device("meta"), Selecting() as selecting:
                getattr(tried, name)(torch.empty(shape, device="meta"))
        except Exception as error:
            failure = failure or f"{name} cannot be followed: {_first_line(error)}{_remedy(error)}"
            continue
        if selecting.taken:
            return shape, ""
        left = left or (selecting.left or [f"{name} calls no topk"])[0]
    return None, left or failure


def _shapes(width: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes of rows, of sequences of rows, and of images with so many channels."""
    yield from ((8, width), (2, 4, width), (2, width, 8, 8))


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0 and not tensor.is_floating_point():
        return tensor.clone()  # a number such as k, which the code reads
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _remedy(error: Exception) -> str:
    reads = isinstance(error, RuntimeError | NotImplementedError) and "meta tensor" in str(error)
    return "; it reads numbers of tensors: call sparsekern.topk in it instead" if reads else ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _copy(
    module: nn.Module,
    of_parameter: Callable[[Tensor], Tensor],
    of_buffer: Callable[[Tensor], Tensor],
) -> Any:
    """Return a deep copy without hooks, with other tensors for its parameters and buffers."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(of_parameter(parameter), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = of_buffer(buffer)
    for part in module.modules():
        memo.update((id(getattr(part, hooks)), OrderedDict()) for hooks in _HOOKS)
    return copy.deepcopy(module, memo)


class _Outcome(NamedTuple):
    """What a run of a method leaves: each part is compared."""

    results: list[Any]
    gradients: list[Any]
    buffers: list[Any]


def _difference(
    module: nn.Module, name: str, shape: tuple[int, ...], must_decode: bool
) -> str | None:
    """Return what is not the same with our selections; None if nothing is, in both modes."""
    failures = []
    selecting = Selecting()
    for training in (True, False):
        try:
            expected = _run(module, name, shape, training, contextlib.nullcontext())
        except Exception as error:
            failures.append(f"{name} fails on random rows: {_first_line(error)}")
            continue
        try:
            found = _run(module, name, shape, training, selecting)
        except Exception as error:
            return f"{name} fails with our selections: {_first_line(error)}"
        for part, ours, theirs in zip(_Outcome._fields, found, expected, strict=True):
            if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
                return f"{name} has other {part} with our selections"
    if must_decode and not selecting.decoded:
        return f"{name} decodes nothing"
    return failures[0] if len(failures) == 2 else None


def _run(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    training: bool,
    selecting: contextlib.AbstractContextManager[Any],
) -> _Outcome:
    """Run a method of a copy, and its backward pass, on random rows."""
    tensors = (*module.parameters(), *module.buffers())
    device = next((one.device for one in tensors if not one.is_meta), torch.device("cpu"))
    draw = torch.Generator(device).manual_seed(0)

    def random_rows(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    def random(parameter: Tensor) -> Tensor:
        return random_rows(parameter.shape).mul_(0.3)

    def own(buffer: Tensor) -> Tensor:
        if buffer.is_meta:
            return torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        return buffer.clone().float() if buffer.is_floating_point() else buffer.clone()

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
        tried = _copy(module, random, own).train(training)
        x = random_rows(shape).requires_grad_()
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed all devices
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        with selecting:
            result = getattr(tried, name)(x)
        results = list(_leaves(all_dense(result)))
        _check_keeps_nothing(tried)
        with_graph = [one for one in results if isinstance(one, Tensor) and one.requires_grad]
        sources = [x, *(one for one in tried.parameters() if one.requires_grad)]
        weights = [random_rows(one.shape).to(one) for one in with_graph]
        gradients = torch.autograd.grad(with_graph, sources, weights, allow_unused=True)
    return _Outcome(results, list(_samples(gradients)), list(tried.buffers()))


def _samples(gradients: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Yield some numbers of each gradient, and its norm: whole ones may take gigabytes."""
    for gradient in gradients:
        if gradient is None:
            yield None
        else:
            numbers = gradient.flatten()
            yield numbers[:: numbers.numel() // 2**16 | 1].clone()  # odd: from all columns
            yield numbers.norm()


def _check_keeps_nothing(tried: nn.Module) -> None:
    for part in tried.modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if isinstance(value, LateTensor):
                raise TypeError(f"activations are kept in the attribute {name}")


def _leaves(result: Any) -> Iterator[Any]:
    """Yield the tensors and numbers of a result in order."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        for part in result:
            yield from _leaves(part)
    elif result is None or isinstance(result, (Tensor, int, float, str)):
        yield result
    else:
        raise TypeError(f"the result holds a {type(result).__name__}")


def _same(ours: Any, theirs: Any) -> bool:
    """Return True if two results are equal but for the rounding of sums in another order."""
    if not isinstance(theirs, Tensor):
        return type(ours) is type(theirs) and bool(ours == theirs)
    if type(ours) is not Tensor or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    precise = ours.double(), theirs.double()
    largest = precise[1].nan_to_num(0, 0, 0).abs().max().item() if theirs.numel() else 0.0
    rounding = 64 * torch.finfo(theirs.dtype).eps * max(largest, 1.0)
    return torch.allclose(*precise, rtol=0, atol=rounding, equal_nan=True)
