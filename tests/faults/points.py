def points() -> None:
    pass
