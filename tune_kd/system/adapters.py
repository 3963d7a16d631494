"""Pydantic's validators of types that are no models. To build one takes 20 ms; each is built once in a process."""

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """The validator of a type, such as `Study` or `list[Epoch]`."""
    found: TypeAdapter[T] = _built(kind)
    return found


@cache
def _built(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
