"""Named tuples that models and operations return, known to torch.export.save by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    from torch.utils._pytree import _register_namedtuple as register_name
except ImportError:  # then torch.export.save refuses models that return them

    def register_name(cls: type[Any], *, serialized_type_name: str) -> None:
        """Do nothing."""


Named = TypeVar("Named", bound=tuple[Any, ...])


def exported(name: str) -> Callable[[type[Named]], type[Named]]:
    """Register the decorated NamedTuple with torch.export, whose programs may then return it.

    name: of the tuple in saved programs, which must stay when its module moves.
    """

    def register(cls: type[Named]) -> type[Named]:
        register_name(cls, serialized_type_name=name)
        return cls

    return register
