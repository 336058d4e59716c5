"""Names of files, one on a line."""

import os


def to_line(name: str) -> bytes:
    """Encode a file's name as a single line, whatever bytes it contains."""
    return os.fsencode(name).replace(b"\\", rb"\\").replace(b"\n", rb"\n") + b"\n"


def from_line(line: bytes) -> str:
    parts = (part.replace(rb"\n", b"\n") for part in line.split(rb"\\"))
    return os.fsdecode(b"\\".join(parts))
