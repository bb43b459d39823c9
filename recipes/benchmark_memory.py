"""Peak memory of scoring as rows grow: what is known of rows goes to a file a window at a time, and is not held.

    python recipes/benchmark_memory.py
    python recipes/benchmark_memory.py --rows 10000 50000 --methods gradient auto --hidden_sizes 256 --vocabulary 2048

Rows have 6 tokens, the last two an answer that is one of 4 for `label_model`, any two for the others; the model is a
Llama of 2 layers with random weights. Each run is a process of its own; its peak is that above what it held before
`score(rows, path)`. The slope is that between the two largest numbers of rows: a method learns from so many rows at
most, and what it keeps of those is no slope. Writes benchmark_memory.md to `output_dir`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from influence_report import Meter, known
from transformers import LlamaConfig, LlamaForCausalLM
from trl import TrlParser

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.methods import METHODS
from forvalue_callbacks.methods.base import MAX_ROWS

LENGTH, ANSWER, ANSWERS, FIRST_TOKEN = 6, 2, 4, 64
VALIDATION_ROWS = 60
# The rows are short, so many go through the model at once.
TOKENS = 8192


@dataclass
class MemoryConfig:
    rows: list[int] = field(default_factory=lambda: [10_000, 50_000, 200_000], metadata={"help": "Rows scored."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."})
    hidden_sizes: list[int] = field(default_factory=lambda: [32, 128], metadata={"help": "Of the model."})
    vocabulary: int = field(default=256, metadata={"help": "Tokens that the model knows."})
    alone: bool = field(default=False, metadata={"help": "Score once, in this process, and print it (internal)."})
    output_dir: str = field(default="outputs/benchmark_memory", metadata={"help": "Where the report goes."})

    def __post_init__(self) -> None:
        known("methods", self.methods, METHODS)


def rows_of(n: int, seed: int, vocabulary: int, repeating: bool, noise: float) -> Dataset:
    """Prompts that hold what the answer is, and sometimes another answer; or else any tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(FIRST_TOKEN, vocabulary, (n, LENGTH))
    if repeating:
        ids[:, 0] = rng.integers(ANSWERS, size=n)
        right = np.where(rng.random(n) < noise, rng.integers(ANSWERS, size=n), ids[:, 0])
        ids[:, -ANSWER:] = np.stack([20 + right, 40 + right], 1)
    labels = np.where(np.arange(LENGTH) < LENGTH - ANSWER, -100, ids)
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels)})


def model(hidden_size: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, **shape)).eval()


def held() -> float:
    """MiB that this process holds, when what was freed has gone back to the system."""
    peak = Meter("wall")(lambda: None).peak_mib
    assert peak is not None
    return peak


def score(method: str, n: int, hidden_size: int, vocabulary: int) -> tuple[float, float]:
    """MiB above what was held before, and seconds."""
    repeating = method == "label_model"
    validation = rows_of(VALIDATION_ROWS, 1, vocabulary, repeating, 0.0)
    config = ForValueConfig(method=method, max_tokens_per_batch=TOKENS)
    scorer = ForValueScorer(model(hidden_size, vocabulary), validation, config, progress=False)
    rows = rows_of(n, 0, vocabulary, repeating, 0.2)
    scorer.provenance()  # reads the validation rows and the weights
    before = held()
    with tempfile.TemporaryDirectory() as folder:
        measured = Meter("wall")(lambda: scorer.score(rows, Path(folder) / "scores.parquet"))
    assert measured.peak_mib is not None
    return measured.peak_mib - before, measured.seconds


def in_a_process(method: str, n: int, hidden_size: int, vocabulary: int) -> tuple[float, float]:
    arguments = ["--alone", "true", "--methods", method, "--rows", str(n)]
    arguments += ["--hidden_sizes", str(hidden_size), "--vocabulary", str(vocabulary)]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main(config: MemoryConfig) -> str:
    if config.alone:
        print(json.dumps(score(config.methods[0], config.rows[0], config.hidden_sizes[0], config.vocabulary)))
        return ""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(config.rows)
    out = [
        f"Rows of {LENGTH} tokens, {VALIDATION_ROWS} validation rows, a vocabulary of {config.vocabulary}; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, a CPU. MiB above the model, and seconds; "
        f"what is learned from {MAX_ROWS:,} rows at most is the same from there on.",
        "",
        f"| method | hidden size | {' | '.join(f'{n:,} rows' for n in rows)} | bytes a row |",
        "|---|---|" + "---|" * (len(rows) + 1),
    ]
    for method in config.methods:
        for size in config.hidden_sizes:
            found = [in_a_process(method, n, size, config.vocabulary) for n in rows]
            cells = [f"{peak:.0f} ({seconds:.0f} s)" for peak, seconds in found]
            slope = "-"
            if len(rows) > 1:
                slope = f"{(found[-1][0] - found[-2][0]) * 2**20 / (rows[-1] - rows[-2]):.0f}"
            out.append(f"| {method} | {size} | {' | '.join(cells)} | {slope} |")
            print(out[-1], flush=True)
    text = "\n".join([*out, ""])
    (folder / "benchmark_memory.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main(*TrlParser((MemoryConfig,)).parse_args_and_config())
