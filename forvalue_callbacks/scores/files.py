"""Files that appear whole or not at all, and what killed runs have left beside them.

A file that is written is locked (`flock`) until it is whole: a temporary file that can be locked is nobody's any more.
Where there are no such locks, as on Windows, age decides, and nobody is kept from writing where another does.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY, TEMPORARY_FOLDER = re.compile(r"\.forvalue-[0-9a-f]{32}"), re.compile(r"forvalue-[0-9a-f]{32}")
DAY = 86400.0  # seconds
# So often a folder is made that another process removes meanwhile.
TRIES = 10
# A link in the place of a file that is to be opened is an error and not another file.
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file in the folder of `path` to write to, which gets that name when all went well.

    Its bytes are on the disk before it is renamed. A symbolic link at `path` is replaced, what it leads to stays. When
    anything goes wrong, the temporary file goes and what was at `path` stays. What killed runs have left in the folder
    goes first.

    Raises:
        OSError: the folder cannot be written to, or a folder is in the file's place; the message names `path`.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named(path))
        remove_leftovers(path.parent)
        temporary, held = _temporary(path.parent)
        stack.callback(temporary.unlink, missing_ok=True)
        closing = stack.enter_context(contextlib.ExitStack())
        closing.callback(os.close, held)
        yield temporary
        sync(temporary)
        if fcntl is None:  # Windows renames no file that is open
            closing.close()
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder, which is empty at first. What was at `path`, file, link or folder, goes when all went
    well.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named(path))
        remove_leftovers(path.parent)
        temporary, held = _locked_folder(path.parent)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        if held is not None:
            stack.callback(os.close, held)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        if path.is_dir() and not path.is_symlink():  # no system call replaces a folder that is not empty
            old = path.with_name(_temporary_name())
            path.rename(old)
            stack.callback(shutil.rmtree, old, ignore_errors=True)
        else:
            old = None
            path.unlink(missing_ok=True)
        try:
            temporary.rename(path)
        except BaseException:
            if old is not None:
                old.rename(path)
            raise
    sync_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what `whole_file` and `whole_folder` of a killed run have left in a folder."""
    for left in Path(folder).iterdir():
        if TEMPORARY.fullmatch(left.name):
            with contextlib.suppress(OSError):  # gone since, or another user's
                is_folder = left.is_dir()
                held = os.open(left, (os.O_RDONLY if is_folder else os.O_RDWR) | _NO_LINKS)
                try:
                    locked = lock(held)
                    if locked is True or (locked is None and time.time() - os.fstat(held).st_mtime > DAY):
                        shutil.rmtree(left) if is_folder else left.unlink()
                finally:
                    os.close(held)


def temporary_folder(lock_name: str) -> tuple[Path, int]:
    """A new folder among the system's temporary files, and the file in it that is locked while it is in use.

    Those that killed runs of the same user have left are removed first.
    """
    parent = Path(tempfile.gettempdir())
    for folder in parent.iterdir() if fcntl else ():
        if TEMPORARY_FOLDER.fullmatch(folder.name):
            with contextlib.suppress(OSError):  # gone since
                if folder.lstat().st_uid == os.getuid() and (held := open_locked(folder / lock_name)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(held)
    while True:
        new = parent / f"forvalue-{secrets.token_hex(16)}"
        new.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover in the moment before it was locked
            if (held := open_locked(new / lock_name)) is not None:
                return new, held


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder that can be written to, made where there is none.

    Raises:
        ValueError: it cannot be, as a file tried out there shows.
    """
    folder = Path(folder)
    for _ in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            failed = error
            if os.path.lexists(folder):  # else another process may have removed it since
                break
    raise ValueError(f"nothing can be written to the folder {folder} ({failed.strerror}): choose another.") from failed


def hold_folder(folder: str | os.PathLike[str], lock_name: str) -> tuple[Path, int | None]:
    """A folder that can be written to, made where there is none, and the file in it that is locked while it is in use.

    The file is None where another process has it locked.

    Raises:
        ValueError: see `make_folder`.
    """
    while True:
        folder = make_folder(folder)
        with contextlib.suppress(FileNotFoundError):  # another process was done with it and has removed it since
            return folder, open_locked(folder / lock_name)


def open_locked(path: str | os.PathLike[str], flags: int = 0) -> int | None:
    """A file opened to read and write, made where there is none, that nobody else holds; None where another does.

    Where there are no locks, it is opened all the same. Release it with `release`.

    Raises:
        OSError: it cannot be opened; a symbolic link is one that cannot.
    """
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS | flags, 0o666)
        if lock(held) is False:
            os.close(held)
            return None
        with contextlib.suppress(FileNotFoundError):  # it went, or was replaced, before it was locked: once more
            if fcntl is None or os.path.samestat(os.fstat(held), os.lstat(path)):
                return held
        os.close(held)


def lock(file: int) -> bool | None:
    """Locks an open file until it is closed: True, False where another holds it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True


def release(file: int) -> None:
    """Unlocks and closes a file, also where a forked process still has it open."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def sync(file: str | os.PathLike[str]) -> None:
    """Waits until a file's bytes are on the disk."""
    opened = os.open(file, os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Waits until the names in a folder are on the disk, where the system and the file system know how."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error names the file that was to be written: a full disk does not, nor does one of a temporary file."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, why, str(path)) from error


def _temporary(folder: Path) -> tuple[Path, int]:
    """A new file that is locked, with the permissions of any new file."""
    while True:
        path = folder / _temporary_name()
        held = open_locked(path, os.O_EXCL)
        if held is not None:  # None: taken for a leftover in the moment before it was locked
            return path, held


def _locked_folder(folder: Path) -> tuple[Path, int | None]:
    """The same for a folder; None on Windows, which opens none."""
    while True:
        path = folder / _temporary_name()
        path.mkdir()
        if fcntl is None:
            return path, None
        with contextlib.suppress(FileNotFoundError):
            held = os.open(path, os.O_RDONLY)
            if lock(held) is not False and path.is_dir():
                return path, held
            os.close(held)


def _temporary_name() -> str:
    """One that nobody can guess."""
    return f".forvalue-{secrets.token_hex(16)}"
