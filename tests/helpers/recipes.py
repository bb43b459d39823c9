"""The recipes as modules."""

import importlib.util
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name):
    sys.path.insert(0, str(RECIPES))  # as `python recipes/...` does
    try:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RECIPES))
    return module
