"""Are scores the same where other engines run the model? Against one process, with the engine itself.

    python tests/engines.py deepspeed|ray [--python PATH]

with a Python in which the engine is installed (`pip install --no-deps` and what it imports). One line a case: how far
the scores lie apart. Exits with the number of failures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from helpers.elsewhere import chosen_here

HERE = Path(__file__).parent
TOLERANCE = 1e-6


def apart(got: object, want: object) -> float:
    """The largest difference of numbers, as a share of the largest of their list; infinite where all else differs."""
    if isinstance(want, list) and isinstance(got, list) and len(got) == len(want):
        if any(isinstance(x, float) for x in want):
            numbers = (np.array(x, dtype=np.float64) for x in (got, want))
            one, other = (x[~np.isnan(np.array(want, dtype=np.float64))] for x in numbers)
            return float(np.abs(one - other).max(initial=0) / max(np.abs(other).max(initial=0), 1e-300))
        return max((apart(*both) for both in zip(got, want, strict=True)), default=0.0)
    return 0.0 if got == want else np.inf


def deepspeed(folder: Path) -> Iterator[tuple[str, float]]:
    """ZeRO-2 and ZeRO-3 on two processes: the scenarios of `helpers/ranks.py` that have their names."""
    from helpers.ranks import SCENARIOS, outcome

    names = [name for name in SCENARIOS if name.endswith(("-zero2", "-zero3"))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([*launch, "helpers.ranks", str(folder), *names], cwd=HERE, env=env, check=True, capture_output=True)
    for name in names:
        one = outcome(name, folder / "one")
        for rank in (0, 1):
            two = json.loads((folder / f"{rank}.json").read_text())[name]
            right = two["error"] is None and one["error"] is None
            yield f"{name}, rank {rank}", apart(two["value"], one["value"]) if right else np.inf


def ray(folder: Path) -> Iterator[tuple[str, float]]:
    """Two workers, each with a model of its own, that write Parquet parts."""
    import ray
    from datasets import load_dataset

    from forvalue_callbacks import ForValueConfig, ForValueScorer, ForValueTransform
    from helpers.models import build_model, build_rows

    model, rows, validation = build_model(), build_rows(48, seed=1), build_rows(6, seed=2)
    rows[5] = {"input_ids": [5], "labels": [5]}
    model.save_pretrained(folder / "model")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for method in ("gradient", "whitened"):
        config = ForValueConfig(method)
        scored = ray.data.from_items([{**row, "place": place} for place, row in enumerate(rows)]).map_batches(
            ForValueTransform,
            fn_constructor_args=(str(folder / "model"), validation, config),
            batch_format="pyarrow",
            batch_size=8,
            concurrency=2,
        )
        scored.write_parquet(str(folder / method))
        found = load_dataset(str(folder / method), split="train", cache_dir=str(folder / "cache")).sort("place")
        want = ForValueScorer(model, validation, config, progress=False).score(rows)
        same = found["input_ids"][:] == [row["input_ids"] for row in rows]
        same = same and found["forvalue_reason"][:] == want.reasons
        n_parts = len(list((folder / method).glob("*.parquet")))
        here = [np.nan if value is None else value for value in found["forvalue_score"]]
        yield f"{method}, {n_parts} parts", apart(here, want.values.tolist()) if same else np.inf


INSIDE = {"deepspeed": deepspeed, "ray": ray}


def main() -> int:
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    engine = chosen_here(__file__, "engine", INSIDE, env)
    with tempfile.TemporaryDirectory() as folder:
        results = list(INSIDE[engine](Path(folder)))
    print(", ".join(f"{name} {version(name)}" for name in (engine, "torch", "transformers", "datasets")))
    for name, distance in results:
        print(f"{name:60s} {distance:.1e} apart" if np.isfinite(distance) else f"{name:60s} failed", flush=True)
    return sum(not distance <= TOLERANCE for _, distance in results)


if __name__ == "__main__":
    sys.exit(main())
