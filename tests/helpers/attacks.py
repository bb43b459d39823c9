"""What befalls a run."""

import mmap
import os
import signal
import sys
import time
import traceback

CHANGES = {"open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate"}  # events of sys.audit


class Child:
    """Work in a fork of this process, which has imported everything.

    Args:
        work: called there.
        folder: changes of files below it are counted.
        dies_at: the number of the change before which it kills itself, from 1 on. A kill from outside hardly ever
            falls between two changes that follow each other.
    """

    def __init__(self, work, folder, dies_at=None):
        self._n, self._status = mmap.mmap(-1, 8), None
        self._pid = os.fork()
        if self._pid == 0:
            try:
                sys.addaudithook(self._hook(f"{folder}{os.sep}", dies_at))
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def _hook(self, folder, dies_at):
        def note(event, args):
            reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES and not reads and os.path.abspath(str(args[0])).startswith(folder):
                n = self.n_changes + 1
                if n == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                self._n[:] = n.to_bytes(8, "little")

        return note

    @property
    def n_changes(self):
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


def contents(folder):
    """The bytes of all files below a folder, None for folders, by their names there."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
