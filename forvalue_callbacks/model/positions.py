"""Positions: what a forward pass over some segments leaves, and the model inputs that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import working_dtype
from ..data.collated import together
from ..data.sample import Sample, Segment

# Numbers of rows by name: (rows,) or (rows, ...); under "reason", text or None.
Columns = dict[str, np.ndarray]


@dataclass
class Positions:
    """The positions of some segments that predict something, after a forward pass."""

    samples: list[Sample]
    segments: list[Segment]
    lengths: list[int]  # positions of each
    hidden_TD: Tensor  # inputs of the head, segment after segment
    target_T: Tensor
    # Where the run was asked for them: the mean state up to the one that predicts first; and of a middle layer the one
    # that predicts first and that mean, side by side (no columns where the layer is not known).
    prompt_RD: Tensor | None = None
    middle_RE: Tensor | None = None
    part: int = 0  # which of the parts that a method reads of a row

    @property
    def index(self) -> list[int]:
        """The rows' places in the data set."""
        return [sample.index for sample in self.samples]

    @property
    def rows_T(self) -> Tensor:
        """Which segment (0, 1, ... of these) each position belongs to."""
        lengths = torch.tensor(self.lengths, device=self.hidden_TD.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths.device), lengths)

    @property
    def samples_T(self) -> Tensor:
        """Which row (0, 1, ... of these, by their first segments) each position belongs to."""
        number: dict[int, int] = {}
        places = [number.setdefault(index, len(number)) for index in self.index]
        return torch.tensor(places, device=self.hidden_TD.device)[self.rows_T]

    def row_by_row(self) -> tuple[Tensor, list[int]]:
        """Places of the positions row by row, in the order of their first segments, and how many each row has."""
        rows_T = self.samples_T
        return rows_T.argsort(stable=True), rows_T.bincount().tolist()

    @property
    def weights(self) -> np.ndarray:
        """That of each segment, float64 (segments,)."""
        return np.array([segment.weight for segment in self.segments], dtype=np.float64)

    @property
    def weights_T(self) -> Tensor | None:
        """Weight of each position, float64 (T,); None where all are 1."""
        weights = self.weights
        if (weights == 1).all():
            return None
        return torch.from_numpy(weights).to(self.hidden_TD.device)[self.rows_T]

    @property
    def first_RD(self) -> Tensor:
        """Hidden state that makes the first prediction of each segment, (segments, D)."""
        starts = np.cumsum([0, *self.lengths[:-1]])
        return self.hidden_TD[torch.as_tensor(starts, device=self.hidden_TD.device)]

    @property
    def not_finite(self) -> set[int]:
        """The rows' places of which a state is not finite."""
        places = self.rows_T[~torch.isfinite(self.hidden_TD).all(1)].tolist()
        for states in (self.prompt_RD, self.middle_RE):
            if states is not None:
                places += (~torch.isfinite(states).all(1)).nonzero()[:, 0].tolist()
        return {self.samples[place].index for place in places}

    def sum(self, values_T: Tensor) -> np.ndarray:
        """Sum of values (T, ...) over the positions of each segment, float64 (segments, ...)."""
        out = torch.zeros(len(self.lengths), *values_T.shape[1:], dtype=torch.float64, device=values_T.device)
        return out.index_add_(0, self.rows_T, values_T.double()).cpu().numpy()

    def halves(self) -> list[Positions]:
        """The same in two."""
        n = len(self.samples) // 2
        cut = sum(self.lengths[:n])
        return [
            replace(
                self,
                samples=self.samples[rows],
                segments=self.segments[rows],
                lengths=self.lengths[rows],
                hidden_TD=self.hidden_TD[places],
                target_T=self.target_T[places],
                prompt_RD=None if self.prompt_RD is None else self.prompt_RD[rows],
                middle_RE=None if self.middle_RE is None else self.middle_RE[rows],
            )
            for rows, places in ((slice(n), slice(cut)), (slice(n, None), slice(cut, None)))
        ]


def collated(segments: Sequence[Segment]) -> dict[str, Any]:
    """Model inputs of some segments, padded on the right.

    Raises:
        NotTogetherError: rows that the model must read one by one.
    """
    if segments[0].tokens is None:
        return together([segment.load() for segment in segments])
    inputs = pad([tokens_of(segment)[: segment.n_read] for segment in segments])
    if "token_type_ids" in segments[0].load():
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def predicted(segment: Segment, ids: Tensor) -> Tensor:
    """The token that each position of a segment alone predicts, -1 where it predicts none, (1, L) as its inputs."""
    out = torch.full_like(ids, -1)
    out[0, torch.from_numpy(segment.at)] = torch.from_numpy(segment.target).to(out)
    return out


def pad(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Token ids padded on the right: `input_ids`, `attention_mask`, (rows, longest) each."""
    shape = (len(rows), max(len(ids) for ids in rows))
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = torch.from_numpy(ids)
        attention_mask[i, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def joined(batches: Iterable[Positions], positions: int) -> Iterator[Positions]:
    """Batches put together until they have so many positions.

    The head is read once for all of them: a batch of prompts with short answers has too few positions to be worth it.
    """
    parts: list[Positions] = []
    for batch in batches:
        parts.append(batch)
        if sum(len(part.target_T) for part in parts) >= positions:
            yield concatenate(parts)
            parts = []
    if parts:
        yield concatenate(parts)


def concatenate(batches: Iterable[Positions]) -> Positions:
    """The positions of all batches as one."""
    parts = list(batches)
    return replace(
        parts[0],
        samples=[sample for part in parts for sample in part.samples],
        segments=[segment for part in parts for segment in part.segments],
        lengths=[n for part in parts for n in part.lengths],
        hidden_TD=torch.cat([part.hidden_TD for part in parts]),
        target_T=torch.cat([part.target_T for part in parts]),
        prompt_RD=_together([part.prompt_RD for part in parts]),
        middle_RE=_together([part.middle_RE for part in parts]),
    )


def picked(rows: Sequence[tuple[Sample, Segment]], hidden_BLD: Tensor, at: Sequence[np.ndarray]) -> Positions:
    """The states at the places that predict something, segment after segment."""
    length = hidden_BLD.shape[1]
    places = np.concatenate([row * length + places for row, places in enumerate(at)])
    target = np.concatenate([segment.target for _, segment in rows])
    device = hidden_BLD.device
    return Positions(
        [sample for sample, _ in rows],
        [segment for _, segment in rows],
        [len(places) for places in at],
        hidden_BLD.flatten(0, 1)[torch.from_numpy(places).to(device)],
        torch.from_numpy(target).to(device),
    )


def prompt_means(hidden_BLD: Tensor, segments: Sequence[Segment], mask: Any) -> Tensor:
    """Mean hidden state up to the position that predicts first, (segments, D), float32 or float64."""
    first = torch.tensor([int(segment.at[0]) for segment in segments])[:, None]
    prompt_BL = torch.arange(hidden_BLD.shape[1]) <= first
    if isinstance(mask, Tensor) and mask.shape == prompt_BL.shape:
        prompt_BL = prompt_BL & mask.cpu().bool()
    states_BLD = hidden_BLD.to(working_dtype(hidden_BLD))
    weight_BL = prompt_BL.to(states_BLD)
    return torch.einsum("bl,bld->bd", weight_BL / weight_BL.sum(1, keepdim=True), states_BLD)


def summed(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Sum of the hidden states in a mask, (B, D), float32 or float64."""
    states_BLD = hidden_BLD.to(working_dtype(hidden_BLD))
    return torch.einsum("bl,bld->bd", mask_BL.to(states_BLD), states_BLD)


def prompt_means_after(
    sums_RD: Tensor, hidden_RLD: Tensor, segments: Sequence[Segment], shared: Sequence[int]
) -> Tensor:
    """`prompt_means` of segments of which the hidden states of the first tokens, as many as are `shared`, have these
    sums, and what follows those has `hidden_RLD`."""
    first = torch.tensor([int(segment.at[0]) for segment in segments])[:, None]
    rest_RL = torch.arange(hidden_RLD.shape[1]) <= first - torch.tensor(list(shared))[:, None]
    return (sums_RD + summed(hidden_RLD, rest_RL)) / (first + 1).to(sums_RD)


def middle_states(states: Sequence[Tensor], segments: Sequence[Segment], mask: Any) -> Tensor:
    """Of a layer's states (B, L, D), as many as there are: the one that predicts first and the mean of the prompt,
    (segments, 2 D), float32 or float64."""
    if not states:
        return torch.zeros(len(segments), 0)
    hidden = states[-1]
    first = hidden[torch.arange(len(segments)), [int(segment.at[0]) for segment in segments]]
    means = prompt_means(hidden, segments, mask)
    return torch.cat([first.to(means), means], 1)


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def tokens_of(segment: Segment) -> np.ndarray:
    assert segment.tokens is not None
    return segment.tokens
