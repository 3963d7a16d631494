"""Messages that a process shows its user once, e.g. that it gave up a fast path. The driver collects them."""

_told: set[str] = set()
_waiting: list[str] = []


def tell(sentence: str) -> None:
    """Queue a message, unless this process has already queued it."""
    if sentence not in _told:
        _told.add(sentence)
        _waiting.append(sentence)


def take() -> list[str]:
    """Remove and return the queued messages."""
    taken = _waiting[:]
    _waiting.clear()
    return taken
