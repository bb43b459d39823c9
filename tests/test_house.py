"""Where things may stand: who imports whom, how long a module and a function may be, and what only one place knows.

Each rule reads the sources and says what breaks it. `NOT_YET` holds what breaks one today; an entry that is no longer
needed fails too, so it only shrinks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import forvalue_callbacks
from forvalue_callbacks.methods import METHODS

PACKAGE = Path(forvalue_callbacks.__file__).parent
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 400, 60

BELOW_THE_SCORER = {"core", "data", "progress", "model", "scores", "methods"}
BELOW_THE_WAYS_IN = BELOW_THE_SCORER | {"config", "scorer", "policies", "report"}
# What each folder, or module beside the folders, may import of ours. Nobody may import baselines.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),  # all of it by name, when it is first asked for
    "core": set(),
    "data": set(),
    "progress": set(),
    "scores": set(),
    "policies": set(),
    "tiny": set(),
    "model": {"core", "data", "progress"},
    "methods": {"core", "data", "model", "scores", "progress"},
    "config": {"methods"},
    "validation": BELOW_THE_SCORER | {"config"},
    "scorer": BELOW_THE_SCORER | {"config", "validation"},
    "probe": BELOW_THE_SCORER | {"scorer"},
    "streaming": {"policies", "progress"},
    "report": {"scores", "policies", "core", "progress", "data"},
    "trainer": BELOW_THE_WAYS_IN,
    "transform": BELOW_THE_WAYS_IN,
    "cli": BELOW_THE_WAYS_IN | {"__init__", "validation", "probe", "tiny", "trainer"},
    "integrations": BELOW_THE_WAYS_IN | {"trainer"},
    "baselines": {"core", "data", "model", "methods"},
}
# Imports against an arrow that stay, inside of a function, each with its reason.
EXCEPTIONS: dict[str, str] = {
    "scores/scores -> report/words": "the words for scores are made there; reading a file of scores needs no torch",
    "scores/__init__ -> core/stats": "forvalue_callbacks.scores.auc, for those who know which rows are noisy",
    "scores/scores -> report/plots": "drawn there; matplotlib is an extra",
    "scores/scores -> report/html": "made there",
    "scores/scores -> report/worst": "made there",
}
# Folders and modules after data/, where a position is one that predicts something: no mask, no shift.
AFTER_DATA = ("model", "methods", "validation", "scorer", "probe", "trainer", "transform")
# In policies "auto" is an amount.
BLIND_TO_METHODS = tuple(sorted(MAY_IMPORT.keys() - {"methods", "policies"}))

NOT_YET: dict[str, set[str]] = {
    "long_modules": {"data/sft"},
    "long_functions": {"baselines/perturbation forward_only_inference"},
    "masks_and_shifts": set(),
}

Trees = dict[str, ast.Module]


def package() -> Trees:
    """Trees by name: "core/stream", "core/__init__", "scorer"."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in paths}


def of(*sources: tuple[str, str]) -> Trees:
    return {name: ast.parse(source) for name, source in sources}


def folder(name: str) -> str:
    return name.split("/")[0]


def running(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes but those that are for type checkers only, and whether each stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield child, inside
        yield from ((below, inside or deeper) for below, deeper in running(child))


def imports(trees: Trees, name: str) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a module imports, and whether it does so in a function."""
    for node, in_function in running(trees[name]):
        if isinstance(node, ast.Import):
            wanted = [alias.name.split(".") for alias in node.names]
            wanted = [parts[1:] for parts in wanted if parts[0] == PACKAGE.name]
        elif isinstance(node, ast.ImportFrom):
            above = name.split("/")[: -node.level] if node.level else []
            parts = [*above, *(node.module.split(".") if node.module else [])]
            if not node.level:
                if parts[0] != PACKAGE.name:
                    continue
                parts = parts[1:]
            wanted = [[*parts, alias.name] for alias in node.names]
        else:
            continue
        for parts in wanted:
            while parts and not {"/".join(parts), "/".join([*parts, "__init__"])} & trees.keys():
                parts = parts[:-1]  # a name in the module, not a module
            found = "/".join(parts)
            yield (found if found in trees else "/".join([*parts, "__init__"])), in_function


# ---- the rules: each gives what breaks it ----


def arrows(trees: Trees) -> set[str]:
    """Imports of other folders that `MAY_IMPORT` does not name; `EXCEPTIONS` are fair in a function."""
    found = set()
    for name in trees:
        for target, in_function in imports(trees, name):
            here, there, arrow = folder(name), folder(target), f"{name} -> {target}"
            allowed = there == here or there in MAY_IMPORT.get(here, set())
            if not allowed and not (in_function and arrow in EXCEPTIONS):
                found.add(arrow)
    return found


def circles(trees: Trees) -> set[str]:
    """Modules that import themselves by way of others; `EXCEPTIONS` are no way."""
    reached = {
        name: {target for target, _ in imports(trees, name) if f"{name} -> {target}" not in EXCEPTIONS} - {name}
        for name in trees
    }
    changed = True
    while changed:
        changed = False
        for targets in reached.values():
            more = set().union(*(reached.get(target, set()) for target in targets)) - targets
            changed |= bool(more)
            targets |= more
    return {name for name, targets in reached.items() if name in targets}


def long_modules(trees: Trees) -> set[str]:
    return {name for name, tree in trees.items() if max(_ends(tree), default=0) > LINES_OF_A_MODULE}


def _ends(tree: ast.Module) -> list[int]:
    return [node.end_lineno or 0 for node in tree.body]


def long_functions(trees: Trees) -> set[str]:
    return {
        f"{name} {node.name}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > LINES_OF_A_FUNCTION
    }


def masks_and_shifts(trees: Trees) -> set[str]:
    """Modules after data/ that know of -100, of `IGNORED`, or of labels one place on: `labels[..., 1:]`."""

    def is_shift(part: ast.AST) -> bool:
        return isinstance(part, ast.Slice) and "1" in (_text(part.lower), _text(part.upper).lstrip("-"))

    def knows(node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):
            return "labels" in _text(node.value) and any(is_shift(part) for part in ast.walk(node.slice))
        if isinstance(node, ast.UnaryOp):
            return _text(node) == "-100"
        names = (getattr(node, key, None) for key in ("id", "attr", "name"))
        return "IGNORED" in names

    trees = {name: tree for name, tree in trees.items() if folder(name) in AFTER_DATA}
    return {name for name, tree in trees.items() if any(knows(node) for node in ast.walk(tree))}


def _text(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def branches_on_methods(trees: Trees) -> set[str]:
    """Modules outside methods/ that compare something with the name of a method, or with how it starts."""

    def strings(*nodes: ast.AST) -> set[str]:
        below = (part for node in nodes for part in ast.walk(node))
        return {part.value for part in below if isinstance(part, ast.Constant) and isinstance(part.value, str)}

    def branches(node: ast.AST) -> bool:
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            return bool(strings(node) & set(METHODS))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            return any(start and name.startswith(start) for start in strings(*node.args) for name in METHODS)
        return False

    trees = {name: tree for name, tree in trees.items() if folder(name) in BLIND_TO_METHODS}
    return {name for name, tree in trees.items() if any(branches(node) for node in ast.walk(tree))}


RULES = [arrows, circles, long_modules, long_functions, masks_and_shifts, branches_on_methods]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    found, known = rule(package()), NOT_YET.get(rule.__name__, set())
    assert not found - known, f"against the rule: {rule.__name__}"
    assert not known - found, "no longer against the rule: take it out of NOT_YET"


def test_every_folder_has_its_arrows_and_every_exception_is_needed():
    trees = package()
    assert {folder(name) for name in trees} == set(MAY_IMPORT)
    assert set(AFTER_DATA) < set(MAY_IMPORT)
    inside = {f"{name} -> {target}" for name in trees for target, in_function in imports(trees, name) if in_function}
    assert set(EXCEPTIONS) <= inside
    assert not any("baselines" in may for may in MAY_IMPORT.values())


LONG = "def f():\n" + "    pass\n" * LINES_OF_A_FUNCTION
FAULTS = [
    (arrows, [("scorer", ""), ("core/x", "from ..scorer import y")]),
    (arrows, [("scorer", ""), ("core/x", "def f():\n    from .. import scorer")]),
    (arrows, [("core/y", ""), ("scores/x", "from forvalue_callbacks.core.y import z")]),
    (arrows, [("report/words", ""), ("scores/scores", "from ..report.words import summary")]),
    (arrows, [("baselines/__init__", ""), ("methods/x", "import forvalue_callbacks.baselines")]),
    (arrows, [("transform", ""), ("trainer/x", "from ..transform import y")]),
    (arrows, [("scorer", ""), ("__init__", "from .scorer import y")]),
    (circles, [("core/x", "from .y import f"), ("core/y", "from .z import f"), ("core/z", "from . import x")]),
    (circles, [("core/x", "from .y import f"), ("core/y", "def f():\n    from . import x")]),
    (long_modules, [("core/x", "\n" * LINES_OF_A_MODULE + "x = 1")]),
    (long_functions, [("core/x", LONG)]),
    (long_functions, [("core/x", "class C:\n    async " + LONG.replace("\n", "\n    ").rstrip())]),
    (masks_and_shifts, [("model/x", "keep = labels != -100")]),
    (masks_and_shifts, [("methods/x", "from ..data.sft import IGNORED")]),
    (masks_and_shifts, [("scorer", "from .data import sft\nkeep = labels != sft.IGNORED")]),
    (masks_and_shifts, [("trainer/x", "target = labels[..., 1:]")]),
    (masks_and_shifts, [("transform", "target = batch['labels'][:, :-1]")]),
    (branches_on_methods, [("scorer", "if config.method == 'gradient': pass")]),
    (branches_on_methods, [("model/x", "if config.method in ('fitted', other): pass")]),
    (branches_on_methods, [("trainer/x", "if method.startswith('fitted'): pass")]),
    (branches_on_methods, [("report/x", "match method:\n    case 'auto': pass")]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "sources"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found(rule, sources):
    assert rule(of(*sources))


FAIR = [
    (arrows, [("core/x", ""), ("methods/y", "from ..core.x import z\nfrom . import w"), ("methods/w", "")]),
    (arrows, [("scorer", ""), ("__init__", "if TYPE_CHECKING:\n    from .scorer import y")]),
    (arrows, [("report/words", ""), ("scores/scores", "def summary():\n    from ..report.words import summary")]),
    (circles, [("core/__init__", "from .x import f"), ("core/x", "from .y import f"), ("core/y", "")]),
    (long_functions, [("core/x", LONG.removesuffix("    pass\n"))]),
    (masks_and_shifts, [("data/x", "target = labels[1:]; keep = target != -100")]),
    (masks_and_shifts, [("model/x", "part = labels[10:1000]; x = hidden[1:]; y = 100")]),
    (branches_on_methods, [("methods/x", "if method == 'gradient': pass")]),
    (branches_on_methods, [("policies", "if amount == 'auto': pass")]),
    (branches_on_methods, [("scorer", "default = 'gradient'; name.startswith('_')")]),
]


@pytest.mark.parametrize(("rule", "sources"), FAIR, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_fair_is_let_be(rule, sources):
    assert not rule(of(*sources))


STACK = {"torch", "numpy", "transformers", "datasets", "accelerate", "peft", "pyarrow", "tqdm", "xxhash"}


@pytest.mark.parametrize(("asked_for", "imported"), [("__version__", []), ("Drop", ["numpy"])])
def test_the_package_alone_imports_nothing_of_the_stack(asked_for, imported):
    code = f"import sys, forvalue_callbacks as f; f.{asked_for}; dir(f); print(sorted({STACK} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(imported)
