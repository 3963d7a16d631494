"""Writing a file so that it is there whole, or as it was before, whatever happens in between."""

import os
from pathlib import Path


def publish(path: Path, data: bytes) -> None:
    """Write aside, sync, rename, sync the folder. Raises OSError; the old file is then untouched."""
    # A leading dot: readers of a whole folder pass over what a killed writer left.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
