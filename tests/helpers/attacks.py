"""What befalls a run: kill -9 at any moment, disks that are full, folders that nobody may write to."""

import contextlib
import ctypes
import functools
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
from tqdm import tqdm

CHANGES = {"open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate"}  # events of sys.audit
_watched = []


@contextlib.contextmanager
def befalling(folder, at, what):
    """Calls `what(event, path)` before the change number `at` (from 1 on) of files below a folder; None: never.

    Yields a list of the changes. What befalls from outside, at some time, hardly ever falls between two changes that
    follow each other.
    """
    changes = []

    def note(event, path):
        if path.startswith(f"{folder}{os.sep}"):
            changes.append((event, path))
            if len(changes) == at:
                what(event, path)

    _watch()
    _watched.append(note)
    try:
        yield changes
    finally:
        _watched.remove(note)


@functools.cache
def _watch():
    """Once in a process: there is no way to take a hook away."""

    def hook(event, args):
        reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES and not reads:
            for note in list(_watched):
                note(event, os.path.abspath(str(args[0])))

    sys.addaudithook(hook)


class Child:
    """Work in a fork of this process, which has imported everything.

    Args:
        work: called there; gives the exit code, or None.
        folder, dies_at: it kills itself before the change number `dies_at` of files below the folder.
    """

    def __init__(self, work, folder, dies_at=None):
        self._n, self._status, pid = mmap.mmap(-1, 8), None, os.getpid
        self._pid = os.fork()
        if self._pid == 0:
            try:
                # That of bars is one of all forks: a child that is killed while it holds it would stop all others.
                tqdm.set_lock(threading.RLock())
                with befalling(folder, dies_at, lambda *_: os.kill(pid(), signal.SIGKILL)) as changes:
                    code = work()
                self._n[:] = len(changes).to_bytes(8, "little")
                os._exit(code or 0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    @property
    def n_changes(self):
        """When it has ended by itself."""
        return int.from_bytes(self._n[:], "little")

    def wait(self, seconds=None):
        """How it ended, as `waitpid` says; it is killed after some seconds."""
        if seconds is not None:
            until = time.monotonic() + seconds
            while time.monotonic() < until and self._status is None:
                time.sleep(0.001)
                ended, status = os.waitpid(self._pid, os.WNOHANG)
                self._status = status if ended else None
            if self._status is None:
                os.kill(self._pid, signal.SIGKILL)
        if self._status is None:
            self._status = os.waitpid(self._pid, 0)[1]
        return self._status


@contextlib.contextmanager
def disk(folder, n_bytes):
    """A disk of its own, of this size, in the place of a folder; None where only root may have one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, n_free):
    """Takes all room on a disk but so many bytes; gives the file that takes it."""
    ballast = folder / "ballast"
    found = os.statvfs(folder)
    ballast.write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - n_free)))
    return ballast


@contextlib.contextmanager
def read_only(*folders):
    """Folders that nobody may write to, root neither: it lays down its right to do so for a while."""
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0 and (not sys.platform.startswith("linux") or libc.capget(header, rights)):
        pytest.skip("root may write everywhere here")
    modes = {folder: folder.stat().st_mode for folder in folders}
    before = rights[0]
    rights[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for folder in folders:
        folder.chmod(0o555)
    libc.capset(header, rights)
    try:
        yield
    finally:
        rights[0] = before
        libc.capset(header, rights)
        for folder, mode in modes.items():
            folder.chmod(mode)


def contents(folder):
    """The bytes of all files below a folder, None for folders, by their names there."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
