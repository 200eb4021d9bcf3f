"""Files that commands read and write: checked before any work, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = "running.lock"


# -- before the work ------------------------------------------------------------------------------
def check_target(name: str, path: Path | None) -> None:
    """Check that a file can be written, and make its folder. None passes.

    Raises:
        ValueError: a folder, or a place where nothing can be written.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise ValueError(f"{name} must be a file, got the folder {path}")
        there = path.exists()
        if there and not path.is_file():
            return  # a device or a pipe: it cannot be tested without writing to it
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not there:
            path.resolve().unlink()
    except OSError as error:
        raise ValueError(f"{name} must be a file to be written, got {path}: {why(error)}") from None


def check_folder(name: str, path: Path) -> None:
    """Check that files can be made in a folder, and make the folder if there is none.

    Raises:
        ValueError: a file, or a place where nothing can be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder to be written to, got {path}: {why(error)}"
        ) from None


def check_apart(name: str, path: Path | None, **others: Path | None) -> None:
    """Check that a file or folder to be written is none of the others, which would be lost.

    Raises:
        ValueError: naming the other.
    """
    for other, its in others.items():
        if path is not None and its is not None and path.resolve() == its.resolve():
            raise ValueError(f"{name} must be another place than {other}, got {path} for both")


# -- reading --------------------------------------------------------------------------------------
def read_bytes(name: str, path: Path, most: int) -> bytes:
    """Read a whole file of at most so many bytes; a device may never end.

    Raises:
        ValueError: a file that cannot be read, or that is larger.
    """
    try:
        with path.open("rb") as file:
            found = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{name} must be a readable file, got {path}: {why(error)}") from None
    if len(found) > most:
        raise ValueError(f"{name} must have at most {most:,} bytes, got more in {path}")
    return found


def read_json(name: str, path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: a file that cannot be read, or that is no JSON.
    """
    if not path.is_file():
        raise ValueError(f"{name} must be a file, got {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name} must be a readable file, got {path}: {why(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a JSON file, got {path}: {error}") from None


def why(error: OSError) -> str:
    """The operating system's reason.

    >>> why(FileExistsError(17, "File exists"))
    'Not a directory'
    >>> why(PermissionError(13, "Permission denied")), why(OSError("no route"))
    ('Permission denied', 'no route')
    """
    if isinstance(error, FileExistsError):  # what mkdir says of a file in its way
        return "Not a directory"
    return error.strerror or str(error)


# -- writing --------------------------------------------------------------------------------------
def write(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it.

    The file is complete or as it was before, also if the disk is full, the process is killed or the
    power fails. A device or a pipe is written to directly.

    Raises:
        OSError: with the name of the file.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / "a", b"whole")
    ...     [(path.name, path.read_bytes()) for path in Path(folder).iterdir()]
    [('a', b'whole')]
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        whole = path.resolve()  # what a link points to is replaced, and not the link
        part = whole.with_name(f"{whole.name}.part")
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, whole)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        _sync(whole.parent)
    except OSError as error:
        raise OSError(error.errno, why(error), str(path)) from None


def _sync(folder: Path) -> None:
    """Write the names in a folder to disk, where the system lets a folder be opened."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that write to it; a dead process's lock is dropped.

    Without fcntl, as on Windows, a second run is not refused.

    Raises:
        ValueError: another process is at work there; with its id.

    >>> with tempfile.TemporaryDirectory() as folder, locked("out", Path(folder)):
    ...     [path.name for path in Path(folder).iterdir()]
    ['running.lock']
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    path = folder / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                who = file.read() or "unknown"
            raise ValueError(
                f"{name} must be a folder that no other run writes to, got {folder}, "
                f"where process {who} is at work"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner has just deleted it, so make another one
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
