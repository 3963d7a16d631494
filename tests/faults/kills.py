def kills() -> None:
    pass
