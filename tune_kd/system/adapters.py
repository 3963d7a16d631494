"""Pydantic's validators of types that are no models. To build one takes 20 ms; each is built once in a process."""

from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")
_built: dict[Any, TypeAdapter[Any]] = {}


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """The validator of a type, such as `Study` or `list[Epoch]`."""
    if kind not in _built:
        _built[kind] = TypeAdapter(kind)
    return _built[kind]
