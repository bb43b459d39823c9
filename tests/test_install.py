"""What pyproject.toml promises is what is tested."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _versions(file, sign):
    return dict(re.findall(rf'^\s*"?([\w-]+){sign}([\d.]+)', (ROOT / file).read_text(), re.MULTILINE))


def test_the_lower_bounds_are_the_oldest_versions_that_the_suite_runs_with():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\ndependencies = [") : text.index("\n]", text.index("\ndependencies = ["))]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))
    oldest = _versions("constraints-oldest.txt", "==")
    assert len(bounds) > 8
    assert block.count('"') == 2 * len(bounds), "lower bounds and nothing else: frameworks beside pin what they like"
    del bounds["torch"]  # tested by hand: there is no small build of it for every machine
    for name, bound in bounds.items():
        assert oldest[name] == bound or oldest[name].startswith(f"{bound}."), name


def test_both_files_of_pins_name_the_same_frameworks():
    newest, oldest = _versions("constraints.txt", "=="), _versions("constraints-oldest.txt", "==")
    assert set(newest) <= set(oldest)
    assert newest["torch"] == oldest["torch"]


def test_every_file_of_the_package_that_is_no_module_is_installed_with_it():
    package = ROOT / "forvalue_callbacks"
    (patterns,) = re.findall(r"^forvalue_callbacks = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    installed = {path for pattern in re.findall(r'"([^"]+)"', patterns) for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert installed == files
