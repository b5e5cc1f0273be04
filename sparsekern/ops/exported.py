"""Named tuples that models and operations return, known to torch.export.save by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils import _pytree

Named = TypeVar("Named", bound=tuple[Any, ...])


def exported(name: str) -> Callable[[type[Named]], type[Named]]:
    """A decorator of a NamedTuple that may be in the output of an exported program.

    name: of the tuple in saved programs, which must stay when its module moves.
    """

    def register(kind: type[Named]) -> type[Named]:
        _pytree._register_namedtuple(kind, serialized_type_name=name)
        return kind

    return register
