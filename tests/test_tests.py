"""Rules that the tests keep themselves."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent


def imported(source):
    """Modules that a file imports anywhere, and those that scripts in its strings do."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or ".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(re.findall(r"^\s*(?:from|import) ([\w.]+)", node.value, re.MULTILINE))
    return found


def test_no_test_imports_another_test_module_or_conftest():
    """What two of them need is in `helpers`."""
    modules = {path.stem for path in FOLDER.glob("*.py")}
    wrong = {str(path.relative_to(FOLDER)): imported(path.read_text()) & modules for path in FOLDER.rglob("*.py")}
    assert not {name: sorted(names) for name, names in wrong.items() if names}


def test_the_rule_sees_every_form_of_import():
    source = 'import a.b\ndef f():\n    from c import d\nCODE = """\nimport sys\nfrom test_x import y\n"""'
    assert imported(source) == {"a.b", "c", "sys", "test_x"}
