"""Can this package be installed beside the frameworks that people fine-tune with? Resolves, installs nothing.

    make beside

One table: for each framework the versions that `pip install forvalue-callbacks NAME` would choose, or why it cannot.
uv reads metadata alone; pip would download every wheel, torch's gigabytes among them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ["llamafactory==0.9.5", "ms-swift==4.6.0", "axolotl==0.19.0", "unsloth==2026.10.9", "oumi==0.9"]
SHOWN = ["trl", "transformers", "accelerate", "datasets", "peft", "torch"]


def resolve(framework: str) -> tuple[dict[str, str], str]:
    """Versions by package that satisfy both, none where nothing does; and what uv says of that."""
    command = "-m uv pip compile --python-version 3.11 --no-header pyproject.toml -"
    run = subprocess.run(
        [sys.executable, *command.split()], input=framework, capture_output=True, text=True, cwd=ROOT, check=False
    )
    return dict(re.findall(r"^([\w.-]+)==(\S+)", run.stdout, re.MULTILINE)), run.stderr.strip()


def main() -> int:
    print(f"| beside | {' | '.join(SHOWN)} |\n{'|---' * (len(SHOWN) + 1)}|")
    failed = 0
    for framework in FRAMEWORKS:
        versions, why = resolve(framework)
        failed += not versions
        cells = [versions.get(name, "-") for name in SHOWN] if versions else [f"cannot be resolved: {why}"]
        print(f"| {framework} | " + " | ".join(cells) + " |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
