"""Ranks of which one goes wrong: on all others an error that names it within seconds, or the scores of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.broken_ranks import BROKEN, EMPTY

TESTS = Path(__file__).parents[1]
# ATTACK=2 or more: four ranks too, and all that goes wrong in place of every other one.
LONG = int(os.environ.get("ATTACK", "1")) > 1
RANKS, TRIED = (2, 4) if LONG else (2,), list(BROKEN)[:: 1 if LONG else 2]
WITHIN = 10.0  # seconds after the fault
# What memory runs out in goes on in smaller batches, or the rank says so.
SMALLER = re.compile("-(forward|fold)-(out_of_memory|allocator)-")

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module", params=RANKS)
def found(request, tmp_path_factory):
    """What each scenario left on each rank, None where there is nothing."""
    folder, n_ranks = tmp_path_factory.mktemp("broken"), request.param
    run = subprocess.run(
        [sys.executable, "-m", "helpers.broken_ranks", str(folder), str(n_ranks), *EMPTY, *TRIED],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    faults = {name: float((folder / f"{name}.fault").read_text()) for name in TRIED}
    files = {name: [folder / f"{name}-{rank}.json" for rank in range(n_ranks)] for name in (*EMPTY, *TRIED)}
    left = {n: [json.loads(file.read_text()) if file.exists() else None for file in of] for n, of in files.items()}
    return left, faults


@pytest.mark.parametrize("name", EMPTY)
def test_ranks_without_rows_have_the_scores_too(name, found, tmp_path):
    want = EMPTY[name]["way"](tmp_path)
    scale = max(np.abs(want), default=0)
    for rank in found[0][name]:
        assert rank["error"] is None
        # What the label model goes to is where L-BFGS stops.
        np.testing.assert_allclose(rank["value"], want, rtol=0, atol=(1e-2 if "label" in name else 1e-6) * scale)


@pytest.mark.parametrize("name", TRIED)
def test_every_rank_says_which_went_wrong_or_has_the_scores(name, found, tmp_path):
    ranks, fault, settings = found[0][name], found[1][name], BROKEN[name]
    bad = settings["bad"] % len(ranks)
    if SMALLER.search(name) and all(rank["error"] is None for rank in ranks):
        want = settings["way"](tmp_path)
        for rank in ranks:
            alone = np.isnan(rank["value"])  # a batch of one row: it is too large alone, and has a reason
            assert alone.sum() <= 1
            np.testing.assert_allclose(rank["value"], np.where(alone, np.nan, want), 0, 1e-6 * max(np.abs(want)))
        return
    for number, rank in enumerate(ranks):
        if number == bad and settings["fault"] == "killed":
            assert rank is None
            continue
        assert rank is not None, f"rank {number} hangs"
        assert rank["ended"] - fault < WITHIN
        assert rank["error"] is not None, f"rank {number} goes on"
        assert number == bad or re.search(rf"rank {bad}\b", rank["error"]), rank["error"]
