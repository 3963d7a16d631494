"""What a SQLite file has to be before SQLite opens it: nobody's journal, a header as ours, a path that it takes."""

import os
from pathlib import Path

from tune_kd.records.schema import MOST_LEDGER_BYTES
from tune_kd.system.errors import CorruptFile
from tune_kd.system.files import opened

SQLITE_BYTES = 504  # of the path of a file that SQLite opens: 512, less what it adds for its journal
VERSIONS = b"\x02\x02"  # what a file with a write-ahead log has there, from its making on
SUPER = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # with which a journal ends that names another file (fileformat.html)


def versions(path: Path) -> bytes:
    """The versions of SQLite's format for writing and reading: bytes 18 and 19 (https://sqlite.org/fileformat.html)."""
    with opened(path, MOST_LEDGER_BYTES) as file:
        return file.read(20)[18:]


def check_journal(path: Path) -> None:
    """Raise `CorruptFile` for a journal of SQLite's that names another file, which it would remove: only a transaction
    over several databases has one, and nobody here makes such."""
    if os.path.isfile(path):
        with opened(path, MOST_LEDGER_BYTES) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(SUPER)))
            if file.read() == SUPER:
                raise CorruptFile(f"{path} names another file, as no run's does; remove it")


def too_long(path: Path) -> str | None:
    """Why SQLite does not open a file at a path, however it is named: it follows links. Null where it does."""
    length = max(len(os.fsencode(each)) for each in (path.absolute(), os.path.realpath(path)))
    if length <= SQLITE_BYTES:
        return None
    return f"the path of its ledger has {length} bytes, and SQLite opens those of at most {SQLITE_BYTES}"
