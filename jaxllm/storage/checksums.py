"""Checksums of what this library stores: a file that was cut, lost or changed is named before it is believed.

A directory's `checksums.xxh3` has a line for each file that they cover: its XXH3 of 64 bits, its bytes, its
path. They find what disks, copies and edits do, not what an attacker who can write them does.

    write(out, ["manifest.json", "weights"])  # the last thing written: these files, and no more
    verify("load", path, ["manifest.json", "weights"], required=True)  # or ValueError

Where files come one by one, `add` enters each before it gets its name, and `verify_file` checks it when it is
read. Of 0.9 GB on two cores, `verify` takes 0.2 s of a load of 4 s, `write` 0.2 s of a save of 11 s.
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

CHECKSUMS = "checksums.xxh3"
CHUNK = 1 << 22  # bytes that are read at once
LINE = re.compile(r"([0-9a-f]{16})  (0|[1-9][0-9]*)  (.+)")


def write(directory: Path, covered: Iterable[str]) -> None:
    """Covers files of `directory`, and all files in folders of it."""
    names = sorted(_files(directory, covered))
    with ThreadPoolExecutor() as threads:
        entries = dict(zip(names, threads.map(_entry, [directory / name for name in names]), strict=True))
    _write(directory, entries)


def add(directory: Path, file: Path, name: str) -> None:
    """Covers one more file, or another content of one; `file` is to be renamed to `name` afterwards."""
    entries = _read("checksums", directory) if is_covered(directory) else {}
    _write(directory, entries | {name: _entry(file)})


def is_covered(directory: Path) -> bool:
    """Whether a directory has checksums: those of earlier versions have none."""
    return (directory / CHECKSUMS).is_file()


def verify(who: str, directory: Path, covered: Iterable[str], *, required: bool) -> None:
    """Raises ValueError unless just these files, those in folders included, are as they were written.

    who: whose errors these are. required: whether a directory without checksums is damaged too; those of
      earlier versions have none.
    """
    if not (required or is_covered(directory)):
        return
    entries = _read(who, directory)
    for name in sorted(entries.keys() ^ set(_files(directory, covered))):
        what = "is missing" if name in entries else "has no checksum"
        raise ValueError(f"{who}: files must be as they were written, but {str(directory / name)!r} {what}")
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(lambda name: _verify(who, directory / name, entries[name]), sorted(entries)):
            pass


def verify_file(who: str, directory: Path, name: str) -> None:
    """Raises ValueError unless one file is as it was written."""
    entries = _read(who, directory)
    if name not in entries:
        raise ValueError(f"{who}: {CHECKSUMS} must have a line for {name!r}, got none in {str(directory)!r}")
    _verify(who, directory / name, entries[name])


def names(who: str, directory: Path) -> set[str]:
    """The files that a directory's checksums cover."""
    return set(_read(who, directory))


def _files(directory: Path, covered: Iterable[str]) -> Iterator[str]:
    """The files among `covered`, and those below the folders among them, as paths in `directory`."""
    for name in covered:
        path = directory / name
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                yield file.relative_to(directory).as_posix()


def _entry(file: Path) -> tuple[str, int]:
    """The checksum of a file, and its bytes."""
    digest, size = xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return digest.hexdigest(), size


def _verify(who: str, file: Path, entry: tuple[str, int]) -> None:
    """Raises ValueError unless a file is what its line says; by its size, if that is other, unread."""
    digest, size = entry
    if not file.is_file():
        raise ValueError(f"{who}: files must be as they were written, but {str(file)!r} is missing")
    if file.stat().st_size != size:
        raise ValueError(f"{who}: {str(file)!r} must have {size} bytes, got {file.stat().st_size}")
    if (found := _entry(file)[0]) != digest:
        raise ValueError(f"{who}: {str(file)!r} must have the checksum {digest}, got {found}: it is damaged")


def _write(directory: Path, entries: dict[str, tuple[str, int]]) -> None:
    """Writes all lines, so that they appear at once."""
    part = directory / f"{CHECKSUMS}.part"
    lines = [f"{digest}  {size}  {name}\n" for name, (digest, size) in sorted(entries.items())]
    try:
        part.write_text("".join(lines), "utf-8")
        os.replace(part, directory / CHECKSUMS)
    finally:
        part.unlink(missing_ok=True)


def _read(who: str, directory: Path) -> dict[str, tuple[str, int]]:
    """Checksum and bytes of each file by its path in the directory."""
    path = directory / CHECKSUMS
    if not path.is_file():
        raise ValueError(f"{who}: {CHECKSUMS} must be in the directory, got {str(directory)!r}")
    entries: dict[str, tuple[str, int]] = {}
    for line in path.read_text("utf-8", errors="replace").removesuffix("\n").split("\n"):
        match = LINE.fullmatch(line)
        if match is None or match[3] in entries:
            raise ValueError(f"{who}: {str(path)!r} must have lines of hash, bytes, path, got {line[:80]!r}")
        entries[match[3]] = (match[1], int(match[2]))
    return entries
