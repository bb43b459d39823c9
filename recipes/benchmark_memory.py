"""Peak memory of scoring as rows grow: what is known of rows goes to a file a window at a time, and is not held.

    python recipes/benchmark_memory.py
    python recipes/benchmark_memory.py --rows 10000 50000 100000 300000 --methods gradient

Rows are made when they are asked for: 12 tokens, the last two an answer that is one of 20 for `label_model`, any two
tokens for the others. The model has the shape of the tiny one with d=256, 2 layers and random weights. Each run is a
process of its own; its peak is that above what it held before `score(rows, path)`. Writes benchmark_memory.md to
`output_dir`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from influence_report import Meter, known
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import TrlParser

from forvalue_callbacks import ForValueConfig, ForValueScorer

METHODS = ("gradient", "label_model", "auto")
LENGTH, ANSWER, ANSWERS, VOCABULARY = 12, 2, 20, 2048
VALIDATION_ROWS = 60
GIB = 2**30


@dataclass
class MemoryConfig:
    rows: list[int] = field(default_factory=lambda: [10_000, 50_000, 100_000], metadata={"help": "Rows scored."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."})
    alone: bool = field(default=False, metadata={"help": "Score once, in this process, and print it (internal)."})
    output_dir: str = field(default="outputs/benchmark_memory", metadata={"help": "Where the report goes."})

    def __post_init__(self) -> None:
        known("methods", self.methods, METHODS)


class Rows(Dataset):
    """Rows that are made by their place: a prompt that holds what the answer is, and sometimes another answer."""

    def __init__(self, n: int, seed: int, repeating: bool, noise: float):
        self.n, self.seed, self.repeating, self.noise = n, seed, repeating, noise

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = np.random.default_rng((self.seed, index))
        ids = rng.integers(100, VOCABULARY, LENGTH)
        if self.repeating:
            ids[0] = rng.integers(ANSWERS)
            right = ids[0] if rng.random() >= self.noise else rng.integers(ANSWERS)
            ids[-ANSWER:] = 20 + right, 40 + right
        return {"input_ids": ids.tolist(), "labels": [-100] * (LENGTH - ANSWER) + ids[-ANSWER:].tolist()}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).eval()


def score(method: str, n: int) -> tuple[int, float]:
    """Bytes above what was held before, and seconds."""
    repeating = method == "label_model"
    validation = Rows(VALIDATION_ROWS, 1, repeating, 0.0)
    scorer = ForValueScorer(model(), validation, ForValueConfig(method=method), progress=False)
    rows = Rows(n, 0, repeating, 0.2)
    scorer.provenance()  # reads the validation rows and the weights
    before = int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    with tempfile.TemporaryDirectory() as folder:
        measured = Meter("wall")(lambda: scorer.score(rows, Path(folder) / "scores.parquet"))
    assert measured.peak_mib is not None
    return int(measured.peak_mib * 2**20) - before, measured.seconds


def in_a_process(method: str, n: int) -> tuple[int, float]:
    arguments = ["--alone", "true", "--methods", method, "--rows", str(n)]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main(config: MemoryConfig) -> str:
    if config.alone:
        print(json.dumps(score(config.methods[0], config.rows[0])))
        return ""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    out = [f"Rows of {LENGTH} tokens, d=256, {VALIDATION_ROWS} validation rows; {versions}, a CPU.", ""]
    out += ["| method | rows | MiB above the model | seconds |", "|---|---|---|---|"]
    slopes = []
    for method in config.methods:
        peaks = []
        for n in config.rows:
            peak, seconds = in_a_process(method, n)
            peaks.append(peak)
            out.append(f"| {method} | {n:,} | {peak / 2**20:.0f} | {seconds:.0f} |")
            print(out[-1], flush=True)
        if len(config.rows) > 1:
            slope, start = np.polyfit(config.rows, peaks, 1)
            slopes.append(f"| {method} | {slope:.0f} | {(start + slope * 1e6) / GIB:.2f} |")
    if slopes:
        out += ["", "| method | bytes a row | GiB above the model at 1,000,000 rows |", "|---|---|---|", *slopes]
    text = "\n".join([*out, ""])
    (folder / "benchmark_memory.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main(*TrlParser((MemoryConfig,)).parse_args_and_config())
