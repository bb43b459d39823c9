"""`forvalue recipes`: the scripts beside the package."""

from __future__ import annotations

import ast
import runpy
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ..data.files import DataError
from . import COMMANDS

# In a checkout; where an installation has put them.
FOLDERS = (
    Path(__file__).parents[2] / "recipes",
    Path(sysconfig.get_path("data")) / "share" / "forvalue_callbacks" / "recipes",
)


def recipes(argv: Sequence[str]) -> None:
    """The command: without a name, what there is; with one, that recipe with the flags that follow."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    found = {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.py")) if _is_script(path)}
    if argv and argv[0] not in ("-h", "--help"):
        name = argv[0]
        if name not in found:
            raise DataError(f"there is no recipe {name!r}: {', '.join(found) or 'none is installed'}.")
        sys.argv = [str(found[name]), *argv[1:]]
        sys.path.insert(0, str(folder))
        try:
            runpy.run_path(str(found[name]), run_name="__main__")
        finally:
            sys.path.remove(str(folder))
        return
    print(f"usage: {COMMANDS['recipes'][2]}\n\nRecipes in {folder} (NAME --help says more; copy and edit them):")
    for name, path in found.items():
        what = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        print(f"  {name:24s} {what[0] if what else ''}")


def _is_script(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")
