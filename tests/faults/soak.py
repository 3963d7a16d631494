def soak() -> None:
    pass
