"""Rows that are there twice: in training, and in training and validation, exactly and nearly.

Exactly: the digests of the rows as the model sees them are equal. Nearly: of the runs of five tokens (shingles) that
two rows have, four in five are in both (Jaccard similarity of the sets), in what is given and, separately, in what is
learnt. Both must be alike: one question with another answer is no duplicate, nor is one answer to another question.
Shingles that many rows have are a template and do not count, unless a side has no others. One changed token takes five
shingles with it: a side of fewer than 49 tokens is near to its equal alone, whatever is not at its ends.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import numpy as np

from .sample import Sample

NEAR = 0.8  # Jaccard similarity
SHINGLE = 5  # tokens
# A shingle that so many rows have, and such a share of those that differ, is of a template. Templates are looked for
# in at most so many rows, evenly spread.
TEMPLATE_ROWS, TEMPLATE_SHARE, TEMPLATE_SAMPLE = 20, 0.02, 20_000
# A signature is the least hashes of a row under 64 permutations, looked up four at a time (MinHash, banded): two rows
# at the threshold meet in one of the 16 bands with probability 1 - (1 - 0.8^4)^16 = 0.9998. Written out here since
# datasketch takes 5 kB a row in memory.
BANDS, BAND_WIDTH = 16, 4
# Rows whose signatures agree in less than such a share, as one pair in 10,000 does at the threshold, are not compared.
WORTH_COMPARING = 0.6
# Rows that meet are compared with the first that is there and so many before them: all rows may meet in one place.
NEIGHBOURS = 8
CHUNK = 2**18  # tokens, or pairs, in memory at once
MAX_REMEMBERED = 2**20  # pairs that have been compared and are not alike


@dataclass(frozen=True)
class Duplicates:
    """What is there twice. Rows are numbered as they come; those that cannot be scored are in nothing.

    Args:
        n_train, n_validation: rows looked at.
        exact: training rows that are the same, group by group, ascending.
        near: training rows that are nearly the same as another one of their group; of the same rows the first.
        leaked_exact: training rows that are validation rows too, each with the first of those.
        leaked_near: training rows that nearly are and not exactly, each with such a validation row.
        validation: validation rows that are the same or nearly the same, group by group.
    """

    n_train: int
    n_validation: int
    exact: list[list[int]]
    near: list[list[int]]
    leaked_exact: list[tuple[int, int]]
    leaked_near: list[tuple[int, int]]
    validation: list[list[int]]

    @property
    def n_exact(self) -> int:
        """Training rows beside the first of each group of the same."""
        return sum(len(group) - 1 for group in self.exact)

    @property
    def n_near(self) -> int:
        """Training rows beside the first of each group of nearly the same."""
        return sum(len(group) - 1 for group in self.near)

    def counts(self) -> dict[str, int]:
        """How many rows there are of each, by the name of the field."""
        return {
            "n_train": self.n_train,
            "n_validation": self.n_validation,
            "exact": self.n_exact,
            "near": self.n_near,
            "leaked_exact": len(self.leaked_exact),
            "leaked_near": len(self.leaked_near),
            "validation": sum(len(group) - 1 for group in self.validation),
        }

    def first(self, n: int) -> Duplicates:
        """The first n groups of each, and the first n rows of those."""

        def cut(groups: list[list[int]]) -> list[list[int]]:
            return [group[:n] for group in groups[:n]]

        return replace(
            self,
            exact=cut(self.exact),
            near=cut(self.near),
            leaked_exact=self.leaked_exact[:n],
            leaked_near=self.leaked_near[:n],
            validation=cut(self.validation),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        pairs = {name: [list(pair) for pair in getattr(self, name)] for name in ("leaked_exact", "leaked_near")}
        return {**asdict(self), **pairs}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Duplicates:
        pairs = {name: [tuple(pair) for pair in facts[name]] for name in ("leaked_exact", "leaked_near")}
        return cls(**{**facts, **pairs})


def find_duplicates(train: Iterable[Sample], validation: Iterable[Sample] = ()) -> Duplicates:
    """What is there twice in samples that `Reader.samples` makes; each is read once.

    In memory are a signature and a few numbers a row (about 0.5 kB), and the tokens lie in a temporary file: a million
    rows are fine. Rows that a collator made (images) are compared exactly alone.
    """
    with _temporary_file() as file:
        rows = _Rows(file)
        n = rows.add(validation)
        n_train = rows.add(train)
        sides = [_copies(rows, range(n)), _copies(rows, range(n, n + n_train))]
        alike = _Alike(rows, [row for copies in sides for row in copies], n)
        alike.find()
    at_first = {rows.digests[row]: row for row in sides[0]}
    leaked_exact, leaked_near = [], []
    for first, copies in sides[1].items():
        if (at := at_first.get(rows.digests[first])) is not None:
            leaked_exact += [(row - n, at) for row in copies]
        elif first in alike.leaked:
            leaked_near += [(row - n, alike.leaked[first]) for row in copies]
    groups = alike.groups()
    inside = [group for group in groups if group[0] < n]
    grouped = {row for group in inside for row in group}
    inside += [[first] for first, copies in sides[0].items() if len(copies) > 1 and first not in grouped]
    return Duplicates(
        n_train,
        n,
        exact=[[row - n for row in copies] for copies in sides[1].values() if len(copies) > 1],
        near=[[row - n for row in group] for group in groups if group[0] >= n],
        leaked_exact=sorted(leaked_exact),
        leaked_near=sorted(leaked_near),
        validation=sorted(sorted(row for first in group for row in sides[0][first]) for group in inside),
    )


@contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    """Where there is no room for it, the error says in which folder."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        if error.filename is not None or error.errno is None:  # of the rows that are read
            raise
        why = f"{error.strerror} for temporary files (TMPDIR chooses another folder)"
        raise OSError(error.errno, why, tempfile.gettempdir()) from error


class _Rows:
    """Digests in memory, tokens in a file: of each row those that are given, then those that are learnt."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.digests = array("Q")
        self.scored = array("b")
        self.ends = array("q", [0])  # of the sides of the rows, 2 a row

    def add(self, samples: Iterable[Sample]) -> int:
        """Takes in some rows; how many."""
        before = len(self.digests)
        for sample in samples:
            self.digests.append(int(sample.digest, 16))
            self.scored.append(sample.reason is None)
            for tokens in _sides(sample):
                self._file.write(tokens.astype(np.int32).tobytes())
                self.ends.append(self.ends[-1] + len(tokens))
        return len(self.digests) - before

    def tokens(self) -> np.ndarray:
        """All of them, int32, as they lie in the file."""
        self._file.flush()
        return np.memmap(self._file, np.int32, "r") if self.ends[-1] else np.zeros(0, dtype=np.int32)


def _sides(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are given and those that are learnt; none where the row is not tokens alone."""
    given, learnt = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for segment in sample.segments:
        if segment.tokens is None:
            return given[0], learnt[0]
        is_learnt = np.zeros(len(segment.tokens), dtype=bool)
        is_learnt[segment.at + 1] = True
        is_learnt[0] = segment.n_prompt == 0  # nothing predicts it, and it is of the answer all the same
        given.append(segment.tokens[~is_learnt])
        learnt.append(segment.tokens[is_learnt])
    return np.concatenate(given), np.concatenate(learnt)


def _copies(rows: _Rows, side: range) -> dict[int, list[int]]:
    """The first row of each kind, and all that are the same."""
    first: dict[int, int] = {}
    copies: dict[int, list[int]] = {}
    for row in side:
        if rows.scored[row]:
            copies.setdefault(first.setdefault(rows.digests[row], row), []).append(row)
    return copies


class _Alike:
    """Which of some rows are nearly the same.

    Args:
        rows: all of them.
        distinct: those to compare, ascending, each digest once a side.
        n_validation: so many of all rows come first and are the other side.
    """

    def __init__(self, rows: _Rows, distinct: Sequence[int], n_validation: int):
        ends = np.frombuffer(rows.ends, dtype=np.int64)
        chosen = np.array(distinct, dtype=np.int64)
        self.rows = chosen[ends[2 * chosen + 2] > ends[2 * chosen]]  # those of tokens
        self.is_train = self.rows >= n_validation
        self.leaked: dict[int, int] = {}  # training row: validation row
        self._tokens, self._ends = rows.tokens(), ends
        self._parent = np.arange(len(self.rows))
        self._failed: set[tuple[int, int]] = set()
        self._template = np.zeros(0, dtype=np.uint64)

    def find(self) -> None:
        """Compares the rows that meet in some band."""
        self._template = self._shared_shingles()
        signatures = self._signatures()
        for band in range(BANDS):
            part = signatures[:, band * BAND_WIDTH : (band + 1) * BAND_WIDTH]
            key = _folded(part)
            order = np.argsort(key, kind="stable")
            place = np.arange(len(order))
            start = np.maximum.accumulate(np.where(np.diff(key[order], prepend=key[order][:1] + 1) != 0, place, 0))
            for back in range(NEIGHBOURS + 1):
                other = place - back if back else start
                meets = (other >= start) & (other < place)
                pairs = np.stack([order[other[meets]], order[meets]], 1)
                for lo in range(0, len(pairs), CHUNK // BANDS):
                    some = pairs[lo : lo + CHUNK // BANDS]
                    agreed = (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(1) >= WORTH_COMPARING
                    for one, another in some[agreed].tolist():
                        self._compare(one, another)

    def groups(self) -> list[list[int]]:
        """Rows that are alike, on one side, group by group."""
        found: dict[int, list[int]] = {}
        for place in range(len(self.rows)):
            if self._root(place) != place:
                root = self._root(place)
                found.setdefault(root, [int(self.rows[root])]).append(int(self.rows[place]))
        return sorted(sorted(group) for group in found.values())

    def _compare(self, one: int, another: int) -> None:
        """Notes whether two rows, by their places, are alike; the first may be a validation row and the other not."""
        crossing = self.is_train[one] != self.is_train[another]
        roots = self._root(one), self._root(another)
        known = int(self.rows[another]) in self.leaked
        if (known if crossing else roots[0] == roots[1]) or (one, another) in self._failed:
            return
        mine, others = self._sets(one), self._sets(another)
        if all(jaccard(a, b) >= NEAR for a, b in zip(mine, others, strict=True)):
            if crossing:
                self.leaked[int(self.rows[another])] = int(self.rows[one])
            else:
                self._parent[max(roots)] = min(roots)
        elif len(self._failed) < MAX_REMEMBERED:
            self._failed.add((one, another))

    def _root(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = place = self._parent[self._parent[place]]
        return int(place)

    def _sets(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Sets of the shingles of both sides."""
        hashes, side = self._shingles(np.array([place]))
        return np.unique(hashes[side == 0]), np.unique(hashes[side == 1])

    def _chunks(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Places of rows, so many together as have `CHUNK` tokens."""
        rows = self.rows[places]
        total = np.cumsum(self._ends[2 * rows + 2] - self._ends[2 * rows])
        if len(places):
            yield from np.split(places, np.flatnonzero(np.diff(total // CHUNK)) + 1)

    def _shingles(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the shingles of some rows, uint64, ascending by row, and the side of each, 2 * row + side; without
        the template's."""
        rows = self.rows[places]
        sides = np.stack([2 * rows, 2 * rows + 1], 1).ravel()
        begin, n = self._ends[sides], self._ends[sides + 1] - self._ends[sides]
        end = np.cumsum(n)
        at = np.repeat(begin - (end - n), n) + np.arange(n.sum())
        tokens, side = self._tokens[at].astype(np.uint64), np.repeat(np.arange(len(sides)), n)
        left = np.repeat(end, n) - np.arange(len(tokens))  # tokens from here to the end of the side
        hashes = _mixed(side.astype(np.uint64) % 2 + np.uint64(1))
        for k in range(SHINGLE):
            there = left > k
            hashes[there] = _mixed(hashes[there] ^ tokens[np.flatnonzero(there) + k])
        keep = (left >= SHINGLE) | (left == n[side])  # a shorter side is one shingle
        hashes, side = hashes[keep], side[keep]
        counts = ~np.isin(hashes, self._template)
        counts |= (np.bincount(side, counts, len(sides)) == 0)[side]
        return hashes[counts], side[counts]

    def _shared_shingles(self) -> np.ndarray:
        """Those of a template, ascending."""
        places = np.arange(0, len(self.rows), max(1, len(self.rows) // TEMPLATE_SAMPLE))
        found = []
        for some in self._chunks(places):
            hashes, side = self._shingles(some)
            _, first = np.unique(hashes ^ _mixed(side.astype(np.uint64) // 2), return_index=True)  # once a row
            found.append(hashes[first])
        hashes, n = np.unique(np.concatenate(found) if found else self._template, return_counts=True)
        return hashes[n >= max(TEMPLATE_ROWS, TEMPLATE_SHARE * len(places))]

    def _signatures(self) -> np.ndarray:
        """uint32 (rows, permutations)."""
        rng = np.random.default_rng(0)
        factors = rng.integers(0, 2**32, (BANDS * BAND_WIDTH, 2), dtype=np.uint32) | np.uint32(1)
        out = np.zeros((len(self.rows), len(factors)), dtype=np.uint32)
        for some in self._chunks(np.arange(len(self.rows))):
            hashes, side = self._shingles(some)
            low, high = hashes.astype(np.uint32), (hashes >> np.uint64(32)).astype(np.uint32)
            starts = np.flatnonzero(np.diff(side // 2, prepend=-1))
            for k, (a, b) in enumerate(factors):
                out[some, k] = np.minimum.reduceat(low * a + high * b, starts)
        return out


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets, as ascending arrays; of two empty ones 1."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else 1.0


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hashes of uint64 (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _folded(parts: np.ndarray) -> np.ndarray:
    """One uint64 of each row of uint32."""
    key = np.zeros(len(parts), dtype=np.uint64)
    for column in parts.T:
        key = _mixed(key ^ column)
    return key
