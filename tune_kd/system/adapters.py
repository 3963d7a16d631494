"""Pydantic validators for types that are not models. Building one takes 20 ms, so each is built once per process."""

from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")
_built: dict[Any, TypeAdapter[Any]] = {}


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """The validator for a type, such as `Study` or `list[Epoch]`."""
    if kind not in _built:
        _built[kind] = TypeAdapter(kind)
    return _built[kind]
