"""What a process has to tell its user once: a fast way that it gave up. Whoever runs its trials passes that on."""

_told: set[str] = set()
_waiting: list[str] = []


def tell(sentence: str) -> None:
    """Have a sentence told, unless this process told it before."""
    if sentence not in _told:
        _told.add(sentence)
        _waiting.append(sentence)


def take() -> list[str]:
    """What was not passed on yet."""
    taken = _waiting[:]
    _waiting.clear()
    return taken
