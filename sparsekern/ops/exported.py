"""Named tuples that models and operations return, known to torch.export.save by their names."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.utils import _pytree

Named = TypeVar("Named", bound=tuple[Any, ...])


def exported(kind: type[Named]) -> type[Named]:
    """A decorator of a NamedTuple that may be in the output of an exported program."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    _pytree._register_namedtuple(kind, serialized_type_name=name)
    return kind
