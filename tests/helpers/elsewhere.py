"""Scripts that run in the Python of a framework that is not installed beside the tests."""

import argparse
import importlib.machinery
import os
import subprocess
import sys
import types
from collections.abc import Collection, Mapping


def chosen_here(script: str, what: str, choices: Collection[str], env: Mapping[str, str]) -> str:
    """The one that the command line names, in the Python that `--python` names: there the script is started again.

    Args:
        script: its file.
        what: the name of the argument.
        env: what is set in the environment there.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("chosen", choices=choices, metavar=what)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--inside", action="store_true", help=f"this is the Python of the {what}")
    options = parser.parse_args()
    if not options.inside:
        command = [options.python, script, options.chosen, "--inside"]
        sys.exit(subprocess.run(command, env={**os.environ, **env}, check=False).returncode)
    return options.chosen


def stand_in(*names: str) -> None:
    """Modules that a framework imports for sound or telemetry: not needed for rows of text."""
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
