"""Two processes: the scores of one, and where one of them fails or is given something else, both say so."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.ranks import SCENARIOS, outcome, sharded_and_out_of_memory

pytestmark = pytest.mark.xdist_group("ranks")  # the processes are launched once


def launched(folder, *names):
    """Two processes that go through the scenarios, which leave what they found in the folder."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    return subprocess.run(
        [*launch, "helpers.ranks", str(folder), *names],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """What some scenarios gave on each of four ranks: two nodes, which `accelerate launch` starts two processes on."""
    folder = tmp_path_factory.mktemp("nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--multi_gpu", "--num_machines", "2", "--num_processes", "4"]  # of CPUs, where there are no GPUs
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    runs = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(node), "--module", "helpers.ranks", str(folder), *ON_NODES],
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each scenario gave on each of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    run = launched(folder)
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


# What is fitted on all rows goes to where L-BFGS stops, in float32: further apart than the sums it rests on.
FITTED = ("scores_by_the_label_model", "scores_by_auto")
ON_NODES = ["scores-whitened", "scores_by_the_label_model", "a_callback-1"]


def same(got, want, tolerance):
    """Numbers to a share of the largest of their list, all else alike."""
    if isinstance(want, list) and any(isinstance(x, float) for x in want):
        scale = np.nanmax(np.abs(want), initial=0)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            same(one, other, tolerance)
    else:
        assert got == want


@pytest.mark.parametrize("name", [name for name, (_, errors) in SCENARIOS.items() if not errors])
def test_two_ranks_find_what_one_process_does(name, two, tmp_path):
    one = outcome(name, tmp_path)
    first, second = (found[name] for found in two)
    assert [found["error"] for found in (one, first, second)] == [None] * 3
    same(second["value"], first["value"], 0)  # ranks that differ would draw different rows
    same(first["value"], one["value"], 1e-2 if name in FITTED else 1e-6)


@pytest.mark.parametrize("name", ON_NODES)
def test_two_nodes_of_two_processes_find_what_one_process_does(name, nodes, tmp_path):
    one, first, *others = outcome(name, tmp_path), *(found[name] for found in nodes)
    assert [found["error"] for found in (one, first, *others)] == [None] * 5
    for other in others:
        same(other["value"], first["value"], 0)
    same(first["value"], one["value"], 1e-2 if name in FITTED else 1e-6)


# An older accelerate reads a stream in shards as it reads any other: the processes take turns.
OF_NEWEST = {"a_callback_on_a_stream_in_shards": pytest.mark.newest}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=OF_NEWEST.get(n, ())) for n, (_, errors) in SCENARIOS.items() if errors]
)
def test_both_ranks_say_what_is_wrong(name, two):
    for rank, expected in enumerate(SCENARIOS[name][1]):
        said = two[rank][name]["error"]
        assert said is not None, f"rank {rank} goes on"
        assert re.search(expected, said), f"rank {rank}: {said}"


def test_out_of_memory_with_sharded_weights_ends_both_ranks_and_says_the_way_out(tmp_path):
    run = launched(tmp_path, sharded_and_out_of_memory.__name__)
    assert run.returncode != 0
    assert "MemoryError: rank 1 is out of memory with" in run.stderr
    assert re.search(r"set max_tokens_per_batch to \d+ or less", run.stderr)
