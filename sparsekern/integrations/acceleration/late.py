"""Dense tensors that are computed only when they are needed as such.

The code of other libraries passes scores and activations of all latents, [..., N], from one of
their functions to the next, and mostly does with them what codes can express: a selection, a
product with a dictionary, counts. A LateTensor is such a tensor, known by its codes, or by the
layer whose scores it holds. The functions of torch that codes can express run on them. Every other
function computes the dense tensor, as a part of the graph, and runs on it. So results and gradients
are always those of the dense expression.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...nn.scores import Scores
from ...ops.checks import autocasting
from ...ops.codes import Transposition
from ...ops.codes_to_dense import codes_to_dense
from ...ops.linear_at import vector_at
from ...ops.sparse_matmul import sparse_matmul
from ...ops.sparse_matmul.operation import sparse_matmul_backward
from .norms import NormedDictionary

# Functions that tell what a tensor is, without its numbers.
_SHAPE = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.Tensor.element_size,
}


@dataclass(frozen=True)
class LateCodes:
    """A tensor [..., n] that is zero but for its codes.

    Attributes:
        values: [..., k], of any dtype.
        indices: int64 [..., k]; codes of value zero may have the index of another code.
        n: the size of the last dimension.
        transposition: of the indices, if it is known.
        unique: no index is repeated within a row.
    """

    values: Tensor
    indices: Tensor
    n: int
    transposition: Transposition | None = None
    unique: bool = True

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor."""
        return torch.Size((*self.values.shape[:-1], self.n))

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and the device."""
        return self.values

    @property
    def requires_grad(self) -> bool:
        """True if the values have a gradient."""
        return self.values.requires_grad

    def dense(self) -> Tensor:
        """Return the dense tensor."""
        if self.unique and self.values.is_floating_point():
            return codes_to_dense(self.values, self.indices, self.n)
        zeros = self.values.new_zeros(self.shape)
        if self.values.dtype == torch.bool:
            rows = zeros.to(torch.uint8).scatter_add(-1, self.indices, self.values.to(torch.uint8))
            return rows > 0
        return zeros.scatter_add(-1, self.indices, self.values)

    def map(self, function: Callable[[Tensor], Tensor]) -> LateCodes:
        """Return the codes of an elementwise function that maps zero to zero."""
        return replace(self, values=function(self.values))

    def scaled(self, factors: Tensor) -> LateCodes:
        """Return the codes of the product with a vector [n]."""
        at = vector_at(factors, self.indices, self.transposition)
        return replace(self, values=self.values * at)

    def columns(self, first: int, last: int) -> LateCodes:
        """Return the codes of columns first..last-1."""
        inside = (self.indices >= first) & (self.indices < last)
        indices = torch.where(inside, self.indices - first, 0)
        values = torch.where(inside, self.values, 0)
        return LateCodes(values, indices, last - first, None, unique=False)

    def product(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product [..., d] with a matrix [n, d], plus a bias [d]."""
        return sparse_matmul(
            self.values, self.indices, weight, bias, transposition=self.transposition
        )

    def column_sums(self) -> Tensor:
        """Return the sums [n] of all rows, without gradients."""
        values = self.values.detach().reshape(-1, self.values.shape[-1])
        ones = values.new_ones(len(values), 1)
        indices = self.indices.reshape(values.shape)
        like = values.new_empty(self.n, 1)
        _, sums = sparse_matmul_backward(
            ones, values, indices, like, False, True, *(self.transposition or (None, None))
        )
        return sums.squeeze(1)


@dataclass(frozen=True)
class LateScores:
    """Scores [..., n] of a layer, or those of some neighbouring latents, after ReLU or not.

    Attributes:
        scores: of all latents.
        relu: negative scores are zero.
        first, last: the latents first..last-1.
        mask: bool [last - first], False for scores that are -inf; None for none.
    """

    scores: Scores
    relu: bool
    first: int
    last: int
    mask: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor."""
        return torch.Size((*self.scores.x.shape[:-1], self.last - self.first))

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and the device."""
        x = self.scores.x
        if autocasting(x) and x.dtype != torch.float64:
            return torch.empty(0, dtype=torch.get_autocast_dtype(x.device.type), device=x.device)
        return x

    @property
    def requires_grad(self) -> bool:
        """True if any of the layer's tensors has a gradient."""
        return any(tensor.requires_grad for tensor in self.scores.tensors())

    def _layer(self) -> Scores:
        if (self.first, self.last) == (0, self.scores.latents):
            return self.scores
        part = slice(self.first, self.last)
        scale = None if self.scores.scale is None else self.scores.scale[part]
        return replace(
            self.scores, weight=self.scores.weight[part], bias=self.scores.bias[part], scale=scale
        )

    def dense(self) -> Tensor:
        """Return the dense tensor."""
        z = self._layer().all()
        z = z.relu() if self.relu else z
        return z if self.mask is None else torch.where(self.mask, z, -torch.inf)

    def columns(self, first: int, last: int) -> LateScores:
        """Return the scores of columns first..last-1."""
        mask = None if self.mask is None else self.mask[first:last]
        return LateScores(self.scores, self.relu, self.first + first, self.first + last, mask)

    def topk(self, k: int) -> tuple[Tensor, Tensor] | None:
        """Return values and indices of the k largest of each row; None if there are no k."""
        if self.mask is None:
            if not 0 < k <= self.last - self.first:
                return None
            return self._layer().topk(k, relu=self.relu)[:2]
        latents = self.mask.nonzero().squeeze(1)  # the host waits for their number
        if not 0 < k <= len(latents):
            return None
        return self._layer().topk(k, latents=latents, relu=self.relu)[:2]


class _Graph:
    """The state of autograd and autocast in which something was recorded."""

    def __init__(self, device: torch.device) -> None:
        self.grad = torch.is_grad_enabled()
        self.device_type = device.type
        self.autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)

    @contextmanager
    def again(self, grad: bool = True) -> Iterator[None]:
        """Enter that state; grad: False if there is no need of gradients now."""
        cast = torch.autocast(self.device_type, dtype=self.dtype, enabled=self.autocast)
        with torch.set_grad_enabled(self.grad and grad), cast:
            yield


@dataclass
class _State:
    """What is behind a late tensor.

    Attributes:
        content: None if nothing but the dense tensor is known, or, without that, for zeros.
        device: of the tensor.
        graph: in which the content was made.
        dense: the dense tensor, once it was computed, and its version then.
        sources: what scores are computed from, with the versions at the time.
    """

    content: LateCodes | LateScores | None
    device: torch.device
    graph: _Graph
    sources: tuple[tuple[Tensor, int], ...] = ()
    dense: Tensor | None = None
    dense_version: int = 0

    def check_sources(self) -> None:
        """Check that what scores are computed from has not changed."""
        for tensor, version in self.sources:
            if _version(tensor) != version:
                raise RuntimeError(
                    "LateTensor: scores must be used before the tensors that they are computed "
                    f"from change, got version {_version(tensor)} of {version}; use them before "
                    "the optimizer's step, or call sparsekern.restore(model)"
                )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class LateTensor(torch.Tensor):
    """A dense tensor that is computed when a function needs it; see the head of the file.

    Made by `late_tensor` and by functions of other late tensors. Its memory as a tensor is that of
    a meta tensor: code that looks past the functions of torch finds no numbers.

    decoder: the dictionary that activations belong to, with its norms, where both are known.
    """

    decoder: NormedDictionary | None = None

    _state: _State

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch on what is known, or on the dense tensors."""
        kwargs = kwargs or {}
        if func in _SHAPE:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*_dense_all(args), **_dense_all(kwargs))
        if func in _LOOKS_AT_GRADIENTS:
            for tensor in _late_in((args, kwargs)):
                tensor._state.content = None  # what follows runs on the tensor that is looked at
        return result


def _make(content: LateCodes | LateScores | None, shape: torch.Size, like: Tensor) -> LateTensor:
    tensor = torch.empty(shape, dtype=like.dtype, device="meta").as_subclass(LateTensor)
    sources = content.scores.tensors() if isinstance(content, LateScores) else []
    versions = tuple((source, _version(source)) for source in sources)
    tensor._state = _State(content, like.device, _Graph(like.device), versions)
    return tensor


def late_tensor(content: LateCodes | LateScores) -> LateTensor:
    """Return the tensor of codes, or of scores."""
    return _make(content, content.shape, content.like)


def late_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> LateTensor:
    """Return zeros, of which a scatter of values makes the tensor of codes."""
    return _make(None, shape, torch.empty(0, dtype=dtype, device=device))


def content_of(tensor: Any) -> LateCodes | LateScores | None:
    """Return what is known of a late tensor; None for other tensors, and if nothing is known."""
    if not isinstance(tensor, LateTensor):
        return None
    state = tensor._state
    if state.dense is not None and _version(state.dense) != state.dense_version:
        state.content = None  # it was changed in place
    return state.content


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor as a plain one: a late one is computed, once.

    Raises:
        RuntimeError: a tensor that scores are computed from has changed since, or a transform of
            torch.func hides the graph.
    """
    if not isinstance(tensor, LateTensor):
        return tensor
    state = tensor._state
    if state.dense is None:
        state.check_sources()
        with state.graph.again():
            if state.content is None:
                zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=state.device)
                state.dense = zeros
            else:
                state.dense = state.content.dense()
                if state.content.requires_grad and state.graph.grad != state.dense.requires_grad:
                    state.dense = None
                    raise RuntimeError(
                        "LateTensor: a transform of torch.func must be given a dense tensor, got a "
                        "late one; pass tensor.clone()"
                    )
        state.dense_version = _version(state.dense)
    return state.dense


def _dense_all(value: Any) -> Any:
    if isinstance(value, LateTensor):
        return dense(value)
    if isinstance(value, dict):
        return {key: _dense_all(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_dense_all(item) for item in value)
    return value


def _late_in(value: Any) -> Iterator[LateTensor]:
    if isinstance(value, LateTensor):
        yield value
    elif isinstance(value, dict):
        yield from _late_in(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _late_in(item)


# -- functions of torch that codes and layers can express ------------------------------------------


def _device(tensor: LateTensor) -> torch.device:
    return tensor._state.device


def _is_of(kind: str) -> Callable[[LateTensor], bool]:
    return lambda tensor: _device(tensor).type == kind


def _requires_grad(tensor: LateTensor) -> Any:
    content = content_of(tensor)
    if content is None or tensor._state.dense is not None:
        return NotImplemented
    return content.requires_grad and tensor._state.graph.grad


def _detach(tensor: LateTensor) -> Any:
    content = content_of(tensor)
    if not isinstance(content, LateCodes):
        return NotImplemented
    return late_tensor(content.map(torch.Tensor.detach))


def _mapped(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Make the handler of an elementwise function that maps zero to zero."""

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        content = content_of(tensor)
        if not isinstance(content, LateCodes) or any(_late_in((args, kwargs))):
            return NotImplemented
        return late_tensor(content.map(lambda values: function(values, *args, **kwargs)))

    return handler


def _relu(values: Tensor, inplace: bool = False) -> Tensor:
    """ReLU of values that nobody else may see changed."""
    return values.relu()


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    content = content_of(tensor)
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if not isinstance(content, LateCodes) or len(dtypes) != 1 or len(args) + len(kwargs) != 1:
        return NotImplemented
    return late_tensor(content.map(lambda values: values.to(dtypes[0])))


def _compared_with_zero(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Make the handler of a comparison that is False for zero and zero."""

    def handler(tensor: Any, other: Any, **kwargs: Any) -> Any:
        content = content_of(tensor)
        if not isinstance(content, LateCodes) or isinstance(other, Tensor) or other != 0 or kwargs:
            return NotImplemented
        return late_tensor(content.map(lambda values: function(values, other)))

    return handler


def _multiply(tensor: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if not isinstance(tensor, LateTensor):
        tensor, other = other, tensor
    return _scale(tensor, other, lambda factor: factor)


def _divide(tensor: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    return _scale(tensor, other, lambda divisor: 1 / divisor)


def _scale(tensor: Any, other: Any, factor_of: Callable[[Any], Any]) -> Any:
    """Multiply codes with a vector [n]; factors that are not finite would also change zeros."""
    content = content_of(tensor)
    if (
        not isinstance(content, LateCodes)
        or not isinstance(other, Tensor)
        or isinstance(other, LateTensor)
        or other.shape != (content.n,)
    ):
        return NotImplemented
    return late_tensor(content.scaled(factor_of(other)))


def _matmul(tensor: Any, other: Any, **kwargs: Any) -> Any:
    content = content_of(tensor)
    if kwargs or not _has_product(content, other):
        return NotImplemented
    return content.product(other)  # type: ignore[union-attr]


def _linear(tensor: Any, weight: Any, bias: Any = None) -> Any:
    content = content_of(tensor)
    if not isinstance(weight, Tensor) or not _has_product(content, weight.t()):
        return NotImplemented
    return content.product(weight.t(), bias)  # type: ignore[union-attr]


def _has_product(content: Any, weight: Any) -> bool:
    return (
        isinstance(content, LateCodes)
        and isinstance(weight, Tensor)
        and not isinstance(weight, LateTensor)
        and weight.dim() == 2
        and content.values.is_floating_point()
        and (content.values.dtype == weight.dtype or autocasting(content.values))
    )


def _sum(tensor: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    content = content_of(tensor)
    if (
        not isinstance(content, LateCodes)
        or keepdim
        or kwargs
        or not isinstance(dim, int)
        or not content.values.is_floating_point()
    ):
        return NotImplemented
    axis = dim % len(content.shape)
    if axis == len(content.shape) - 1:
        return content.values.sum(-1)
    if axis == 0 and len(content.shape) == 2 and not content.requires_grad:
        return content.column_sums()
    return NotImplemented


def _select(tensor: Any, key: Any) -> Any:
    """tensor[..., first:last], and tensor[mask] with a mask that has the same codes."""
    content = content_of(tensor)
    if isinstance(key, LateTensor):
        mask = content_of(key)
        if (
            isinstance(content, LateCodes)
            and isinstance(mask, LateCodes)
            and content.unique
            and mask.indices is content.indices
            and mask.values.dtype == torch.bool
        ):
            order = content.indices.argsort(-1)  # the dense tensor's
            return content.values.gather(-1, order)[mask.values.gather(-1, order)]
        return NotImplemented
    if content is None or not isinstance(key, tuple) or len(key) not in (2, len(content.shape)):
        return NotImplemented
    *leading, columns = key
    everything = all(part == slice(None) for part in leading if part is not Ellipsis)
    if not everything or not isinstance(columns, slice) or not _is_whole(leading, content):
        return NotImplemented
    first, last, step = columns.indices(content.shape[-1])
    if step != 1 or last <= first:
        return NotImplemented
    return late_tensor(content.columns(first, last))


def _is_whole(leading: Sequence[Any], content: LateCodes | LateScores) -> bool:
    return Ellipsis in leading or len(leading) == len(content.shape) - 1


def _split(tensor: Any, split_size: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    content = content_of(tensor)
    if content is None or kwargs or not isinstance(split_size, (list, tuple)):
        return NotImplemented
    if dim % len(content.shape) != len(content.shape) - 1 or sum(split_size) != content.shape[-1]:
        return NotImplemented
    ends = list(itertools.accumulate(split_size, initial=0))
    return tuple(late_tensor(content.columns(*bounds)) for bounds in itertools.pairwise(ends))


def _where(condition: Any, tensor: Any = None, other: Any = None) -> Any:
    """torch.where(mask, scores, -inf) with a mask of latents."""
    content = content_of(tensor)
    if (
        not isinstance(content, LateScores)
        or content.mask is not None
        or isinstance(other, Tensor)
        or other != -torch.inf
        or not isinstance(condition, Tensor)
        or condition.dtype != torch.bool
        or condition.numel() != content.shape[-1]
        or condition.shape[-1] != content.shape[-1]
    ):
        return NotImplemented
    return late_tensor(replace(content, mask=condition.reshape(-1)))


def _topk(tensor: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    content = content_of(tensor)
    if (
        not isinstance(content, LateScores)
        or not largest
        or dim not in (-1, len(content.shape) - 1)
        or tensor._state.dense is not None
    ):
        return NotImplemented
    tensor._state.check_sources()
    with tensor._state.graph.again(grad=torch.is_grad_enabled()):
        codes = content.topk(int(k))
    if codes is None:
        return NotImplemented
    values, indices = codes
    if sorted:
        order = values.detach().argsort(dim=-1, descending=True, stable=True)
        values, indices = values.gather(-1, order), indices.gather(-1, order)
    return torch.return_types.topk((values, indices))


def _zeros_like(tensor: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(tensor, LateTensor):
        return NotImplemented
    return late_zeros(tensor.shape, tensor.dtype, tensor.device)


def _scatter_in_place(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    codes = _scattered(tensor, *args, **kwargs)
    if codes is None:
        return NotImplemented
    tensor._state.content, tensor._state.graph = codes, _Graph(tensor.device)
    return tensor


def _scatter(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    codes = _scattered(tensor, *args, **kwargs)
    return NotImplemented if codes is None else late_tensor(codes)


def _scattered(
    tensor: Any, dim: Any = None, index: Any = None, src: Any = None, **other: Any
) -> LateCodes | None:
    """Return the codes of zeros.scatter(-1, index, src), or None for other calls."""
    if (
        other
        or not isinstance(tensor, LateTensor)
        or tensor._state.content is not None
        or tensor._state.dense is not None
        or not isinstance(src, Tensor)
        or not isinstance(index, Tensor)
        or dim not in (-1, tensor.dim() - 1)
        or src.dtype != tensor.dtype
        or src.shape != index.shape
        or src.shape[:-1] != tensor.shape[:-1]
    ):
        return None
    return LateCodes(src, index, tensor.shape[-1])


def _any(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    content = content_of(tensor)
    if not isinstance(content, LateCodes) or args or kwargs:
        return NotImplemented
    return content.values.any()


_T = torch.Tensor
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _T.device.__get__: _device,
    _T.is_cuda.__get__: _is_of("cuda"),  # type: ignore[attr-defined]
    _T.is_cpu.__get__: _is_of("cpu"),  # type: ignore[attr-defined]
    _T.is_meta.__get__: _is_of("meta"),  # type: ignore[attr-defined]
    _T.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
    _T.detach: _detach,
    _T.bool: _mapped(_T.bool),
    _T.float: _mapped(_T.float),
    _T.double: _mapped(_T.double),
    _T.relu: _mapped(_T.relu),
    torch.relu: _mapped(torch.relu),
    torch.nn.functional.relu: _mapped(_relu),
    _T.to: _to,
    _T.type_as: _mapped(_T.type_as),
    _T.gt: _compared_with_zero(_T.gt),
    _T.__gt__: _compared_with_zero(_T.gt),
    _T.ne: _compared_with_zero(_T.ne),
    _T.__ne__: _compared_with_zero(_T.ne),
    torch.mul: _multiply,
    _T.mul: _multiply,
    _T.__mul__: _multiply,
    _T.__rmul__: _multiply,
    torch.div: _divide,
    _T.div: _divide,
    _T.__truediv__: _divide,
    torch.matmul: _matmul,
    _T.matmul: _matmul,
    _T.__matmul__: _matmul,
    torch.nn.functional.linear: _linear,
    torch.sum: _sum,
    _T.sum: _sum,
    _T.__getitem__: _select,
    torch.split: _split,
    _T.split: _split,
    torch.where: _where,
    torch.topk: _topk,
    _T.topk: _topk,
    torch.zeros_like: _zeros_like,
    _T.scatter_: _scatter_in_place,
    _T.scatter: _scatter,
    torch.scatter: _scatter,
    _T.any: _any,
}
# What these return or change is of the dense tensor, which later functions must then come from.
_LOOKS_AT_GRADIENTS = {
    _T.retain_grad,
    _T.register_hook,
    _T.requires_grad_,
    _T.register_post_accumulate_grad_hook,
    _T.requires_grad.__set__,  # type: ignore[attr-defined]
    _T.grad_fn.__get__,  # type: ignore[union-attr]
}
