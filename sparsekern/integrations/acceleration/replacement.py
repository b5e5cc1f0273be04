"""What stands in for a class of another library, and the mark of the classes that stand in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:

    class Methods(Any):  # type: ignore[misc]
        """Methods that stand in for those of a library's class, from which all else comes."""

else:

    class Methods:
        """Methods that stand in for those of a library's class, from which all else comes."""

        __slots__ = ()  # the memory of modules stays as it is


class Replacement(NamedTuple):
    """What stands in for a class of a library.

    Attributes:
        module: where the class is defined.
        name: of the class.
        methods: class with the methods that stand in.
        replaced: names of the class's methods that a subclass must not override.
        parts: what becomes faster, in words.
        own: the class itself, where it is of no library and need not be found by its name.
    """

    module: str
    name: str
    methods: type
    replaced: tuple[str, ...]
    parts: str
    own: type[nn.Module] | None = None

    def upstream(self) -> type[nn.Module] | None:
        """Return the library's class; None if the program has not imported it."""
        if self.own is not None:
            return self.own
        found: type | None = getattr(sys.modules.get(self.module), self.name, None)
        return found


class Accelerated:
    """Mark of the classes that stand in.

    Attributes:
        match_upstream: what the library gets wrong stays as it is.
        stands_for: the class of the module as it was.
    """

    __slots__ = ()
    match_upstream: bool
    stands_for: type[nn.Module]


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it was before it was accelerated."""
    return module.stands_for if isinstance(module, Accelerated) else type(module)
