"""What scoring a data set would take: rows, tokens and passes counted, time from a few batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from . import core
from .core.stream import tile_sizes
from .data.reading import kept
from .data.sample import Sample
from .methods import Method
from .methods.base import ROWS
from .model.backbone import left_as_found
from .model.positions import Positions
from .model.run import Run
from .progress import Pass
from .scorer import ForValueScorer

# Batches that are timed, evenly from those of the first window, the longest and the shortest among them. One before
# them, in which things are set up, is not.
PROBE_BATCHES = 4


@dataclass(frozen=True)
class Estimate:
    """What scoring a data set would take, in one process.

    Args:
        rows, validation_rows: that can be scored.
        unscored: rows that cannot, as far as that is known without the model.
        passes: of the model, in their order, with their rows and the tokens that it reads in one, on average.
        forwards: forward passes over batches of the rows to score, as long as the memory lasts.
        tokens_per_batch: at most, with padding.
        memory: bytes, by name: the model's weights; what the method makes of the validation rows, as far as that has
            a known size (directions of the head); rows, hidden states and logits that are there at once.
        seconds: of all passes, at the pace of the probe. Fits are not in it.
    """

    rows: int
    validation_rows: int
    unscored: int
    passes: list[Pass]
    forwards: int
    tokens_per_batch: int
    seconds: float
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """That the model reads in all passes, without padding."""
        return round(sum((planned.rows or 0) * planned.tokens for planned in self.passes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def estimate(scorer: ForValueScorer, dataset: Iterable[Mapping[str, Any]]) -> Estimate:
    """What `scorer.score(dataset)` would take. Every row is read and tokenised; the model runs over a few batches.

    Raises:
        ValueError: what `score` refuses before the work; no row can be scored.
    """
    run, side = scorer.run, scorer.validation
    dataset = kept(dataset) if side.dataset is None else dataset
    side.look_at(dataset)
    side.check()
    method, validation = side.method, side.samples()
    rows = unscored = tokens = forwards = most = n_run = 0
    pace: float | None = None
    for window in run.reader.windows(dataset):
        good = [sample for sample in window if sample.reason is None]
        rows, unscored = rows + len(good), unscored + len(window) - len(good)
        here = 0
        for part in range(len(method.parts)):
            work, (batches,) = run.planned(good, method, part)
            here += sum(segment.n_read for _, segment in work)
            forwards += sum(batch.n_forwards for batch in batches)
            n_run += len(good)
        if pace is None and good:
            with left_as_found(scorer.backbone.model):
                pace = _pace(run, method, good)
        tokens, most = tokens + here, max(most, here)
    if pace is None:
        raise ValueError(f"none of {unscored:,} rows can be scored: there is nothing to estimate.")
    passes = method.plan(validation or side.first, rows, side.known is not None).passes
    assert passes[-1].name == ROWS
    passes[-1] = Pass(ROWS, n_run, tokens / n_run)
    total = sum((planned.rows or 0) * planned.tokens for planned in passes)
    memory = _memory(scorer, method, most)
    return Estimate(rows, len(validation), unscored, passes, forwards, run.max_tokens, pace * total, memory)


def _pace(run: Run, method: Method, samples: Sequence[Sample]) -> float:
    """Seconds that a token takes, of those that the model reads."""
    work, (batches,) = run.planned(samples, method, 0)
    places = torch.linspace(0, len(batches) - 1, min(PROBE_BATCHES, len(batches))).long().tolist()
    chosen = [[work[i][0] for i in batches[place].rows] for place in places]
    _run(run, method, chosen[0])
    started = time.perf_counter()
    for some in chosen:
        _run(run, method, some)
    return (time.perf_counter() - started) / sum(sample.n_read for some in chosen for sample in some)


def _run(run: Run, method: Method, samples: Sequence[Sample]) -> None:
    """As the rows to score are run: through a head that does not move, or for their likelihood alone."""
    head = run.backbone.head()
    dtype, device = core.working_dtype(head.weight), head.weight.device
    state = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in method.shapes(head).items()}
    score = partial(method.score, state, head) if method.tokenwise else partial(_likelihood, head)
    for positions in run.positions(samples, method, failed={}):
        score(positions)
    run.wait()


def _likelihood(head: core.Head, positions: Positions) -> None:
    core.log_likelihood_tokens(head, positions.hidden_TD, positions.target_T)


def _memory(scorer: ForValueScorer, method: Method, window_tokens: int) -> dict[str, int]:
    """Bytes, by name."""
    head, model = scorer.backbone.head(), scorer.backbone.model
    item = torch.empty(0, dtype=core.working_dtype(head.weight)).element_size()
    tile, block = tile_sizes(head.weight, None, None)
    states = scorer.run.max_tokens * head.weight.shape[1]
    return {
        "weights": sum(tensor.nbytes for tensor in _tensors(model)),
        "state": sum(math.prod(shape) for shape in method.shapes(head).values()) * item,
        "window": 16 * window_tokens + (states + 2 * tile * block) * item,  # ids and labels are int64
    }


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
