"""The sampler: exact draws, the wrapped order, and the same rows on every rank and after a resume."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import trainer_pt_utils
from transformers.trainer_pt_utils import LengthGroupedSampler

from forvalue_callbacks.trainer.sampler import OFFSET_GRID, ResamplingSampler, find_sampler, install_sampler

N = 97
RNG = np.random.default_rng(0)
DROP = (RNG.random(N) > 0.2).astype(float)
REWEIGHT = np.exp(RNG.normal(size=N)) * DROP
ROWS = list(range(N))


def random_sampler(n=N, seed=5):
    return SeedableRandomSampler(range(n), data_seed=seed)


def prepared(weights=None, rank=0, ranks=1, batch_size=4, sampler=None, **kwargs):
    """A loader as the Trainer gets it from accelerate, resampling where there are weights."""
    loader = DataLoader(ROWS, batch_size=batch_size, sampler=sampler or RandomSampler(ROWS), collate_fn=list)
    settings = {"put_on_device": False, "use_seedable_sampler": True, "data_seed": 5} | kwargs
    loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, **settings)
    if weights is not None:
        install_sampler(loader, weights, seed=3)
    return loader


@pytest.mark.parametrize(
    "weights", [DROP, REWEIGHT, np.eye(N)[3], np.eye(N)[3] + 1e-3, DROP * 1e-200, np.where(DROP > 0, 1e6, 1)]
)
def test_each_row_is_drawn_floor_or_ceil_of_its_share_and_the_epoch_keeps_its_length(weights):
    sampler = ResamplingSampler(random_sampler(), weights, seed=0)
    expected = weights * N / weights.sum()
    for _ in range(20):
        rows = list(sampler)
        draws = np.bincount(rows, minlength=N)
        assert len(rows) == len(sampler) == N
        assert (draws >= np.floor(expected - 1e-6)).all()
        assert (draws <= np.ceil(expected + 1e-6)).all()
        assert not draws[weights == 0].any()


def test_over_many_epochs_each_row_is_drawn_in_proportion_to_its_weight():
    sampler = ResamplingSampler(SequentialSampler(ROWS), REWEIGHT, seed=0)  # no luck of the order helps
    epochs = 2000
    draws = np.bincount([row for _ in range(epochs) for row in sampler], minlength=N) / epochs
    # A draw above the floor is a coin with a standard deviation of at most 1/2 per epoch.
    np.testing.assert_allclose(draws, REWEIGHT * N / REWEIGHT.sum(), atol=5 * 0.5 / np.sqrt(epochs))


@pytest.mark.parametrize("n", [1, 7, 97, 20_001])
@pytest.mark.parametrize("weight", [1.0, 0.1, 1e-9])
def test_with_equal_weights_the_epoch_is_that_of_the_wrapped_sampler(n, weight):
    sampler, alone = ResamplingSampler(random_sampler(n), np.full(n, weight), seed=1), random_sampler(n)
    for _ in range(3):
        assert list(sampler) == list(alone)


@pytest.mark.parametrize("offset", [0, OFFSET_GRID - 1])
def test_rounding_moves_no_draw_in_a_million_rows(monkeypatch, offset):
    class Extreme:
        def integers(self, high):
            return offset

    n = 1_000_000
    sampler = ResamplingSampler(SequentialSampler(range(n)), np.full(n, 0.1), seed=0)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Extreme())
    assert list(sampler) == list(range(n))


def test_every_drawn_row_keeps_its_own_place_in_the_wrapped_order():
    for epoch in range(5):
        sampler, alone = ResamplingSampler(random_sampler(), REWEIGHT, seed=0), random_sampler()
        sampler.set_epoch(epoch)
        alone.set_epoch(epoch)
        rows, order = np.array(list(sampler)), np.array(list(alone))
        drawn = np.isin(order, rows)
        assert drawn.any()
        assert not drawn.all()
        np.testing.assert_array_equal(rows[drawn], order[drawn])


@pytest.mark.parametrize("hot", [1.0, 8.0])
def test_copies_of_a_row_never_share_a_batch_in_random_order(hot):
    n = 2000
    weights = (RNG.random(n) > 0.2).astype(float)
    weights[:50] *= hot
    sampler = ResamplingSampler(random_sampler(n), weights, seed=0)
    for _ in range(5):
        rows = list(sampler)
        assert len(set(rows)) < n
        assert all(len(set(rows[i : i + 16])) == 16 for i in range(0, n, 16))


@pytest.mark.parametrize("dropped", ["any", "short", "long"])
def test_length_grouping_keeps_padding_about_as_low(dropped):
    n, batch = 4000, 8
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(4, 0.8, n).astype(int) + 1
    by = {"any": rng.random(n), "short": lengths, "long": -lengths}[dropped]
    weights = (by > np.quantile(by, 0.2)).astype(float)

    def padding(rows):
        batches = lengths[np.array(list(rows))].reshape(-1, batch)
        return (batches.max(1, keepdims=True) - batches).sum() / batches.sum()

    def grouped():
        generator = torch.Generator().manual_seed(0)
        return LengthGroupedSampler(batch, lengths=lengths.tolist(), generator=generator)

    before, after = padding(grouped()), padding(ResamplingSampler(grouped(), weights, seed=0))
    shuffled = padding(ResamplingSampler(random_sampler(n), weights, seed=0))
    assert after < before + 0.05 < shuffled / 2


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(ResamplingSampler(random_sampler(), REWEIGHT, seed=0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert list(ResamplingSampler(random_sampler(), REWEIGHT, seed=0)) == first


def test_seed_and_epoch_together_choose_the_rows():
    weights = np.random.default_rng(1).random(3000)  # so many that no two offsets come to the same rows

    def draws(seed, epoch):
        sampler = ResamplingSampler(SequentialSampler(weights), weights, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draws(0, 1) == draws(0, 1)
    assert len({tuple(draws(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_epochs_advance_on_their_own_as_accelerates_sampler_does():
    sampler = ResamplingSampler(random_sampler(), REWEIGHT, seed=0)
    free_running = [list(sampler) for _ in range(3)]
    again = ResamplingSampler(random_sampler(), REWEIGHT, seed=0)
    for epoch in (2, 0, 1):
        again.set_epoch(epoch)
        assert list(again) == free_running[epoch]


def test_an_epoch_broken_off_starts_again_from_its_beginning():
    sampler = ResamplingSampler(random_sampler(), REWEIGHT, seed=0)
    iterator = iter(sampler)
    started = [next(iterator) for _ in range(5)]
    assert list(sampler)[:5] == started


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("seedable", [False, True])
def test_two_ranks_together_draw_what_one_rank_draws(split_batches, seedable):
    def loader(**kwargs):
        sampler = RandomSampler(ROWS, generator=torch.Generator().manual_seed(9))
        return prepared(REWEIGHT, sampler=sampler, use_seedable_sampler=seedable, **kwargs)

    alone, *ranks = [loader()] + [loader(ranks=2, rank=rank, split_batches=split_batches) for rank in (0, 1)]
    for _ in range(3):
        batches = [list(loader) for loader in ranks]
        together = [row for pair in zip(*batches, strict=True) for batch in pair for row in batch]
        assert together[:N] == [row for batch in alone for row in batch]  # beyond N the shards fill the last batch


@pytest.mark.newest  # accelerate hands on the epoch to loaders that skip batches
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_run_resumed_inside_an_epoch_sees_the_rows_that_were_left(ranks, epoch):
    full, fresh = prepared(REWEIGHT, ranks=ranks), prepared(REWEIGHT, ranks=ranks)
    batches = [list(full) for _ in range(epoch + 1)][epoch]
    resumed = skip_first_batches(fresh, 5)
    resumed.set_epoch(epoch)  # as Trainer._run_epoch does
    assert list(resumed) == batches[5:]


@pytest.mark.newest  # accelerate hands on the epoch to loaders that skip batches
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_knows_its_epoch_where_the_wrapped_sampler_knows_none(ranks):
    def loader():
        return prepared(REWEIGHT, ranks=ranks, sampler=SequentialSampler(ROWS))

    full = loader()
    epochs = [list(full) for _ in range(4)]
    epoch = max(e for e in range(4) if epochs[e] != epochs[0])
    resumed = skip_first_batches(loader(), 5)
    resumed.set_epoch(epoch)
    assert list(resumed) == epochs[epoch][5:]


def test_the_length_of_the_loader_does_not_change():
    for ranks in (1, 2):
        for drop_last in (False, True):
            loader = DataLoader(ROWS, batch_size=4, sampler=RandomSampler(ROWS), drop_last=drop_last)
            loader = prepare_data_loader(loader, num_processes=ranks, process_index=0, put_on_device=False)
            before = len(loader)
            install_sampler(loader, DROP, seed=0)
            assert len(loader) == before == len(list(loader))


def test_workers_are_fed_by_the_installed_sampler():
    loader = DataLoader(ROWS, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=list)
    sampler = install_sampler(loader, DROP, seed=0)
    for epoch in range(2):
        rows = [row for batch in loader for row in batch]
        sampler.set_epoch(epoch)
        assert rows == list(sampler)
        assert not set(rows) & set(np.flatnonzero(DROP == 0))


def test_a_second_installation_replaces_the_weights_of_the_first():
    loader = prepared(DROP, ranks=2)
    sampler = install_sampler(loader, 1 - DROP, seed=3)
    assert not isinstance(sampler.sampler, ResamplingSampler)
    assert set(sampler) == set(np.flatnonzero(DROP == 0))


def test_batch_samplers_nested_to_any_depth_are_followed():
    inner = BatchSampler(SequentialSampler(ROWS), 4, drop_last=False)
    shards = BatchSamplerShard(BatchSamplerShard(inner, 2, 0), 2, 1)
    sampler = install_sampler(DataLoader(ROWS, batch_sampler=shards), DROP, seed=0)
    assert inner.sampler is sampler


class OneBatchAtATime(Sampler):
    def __len__(self):
        return N

    def __iter__(self):
        return iter([ROWS])


class HalfSampler(SequentialSampler):
    def __len__(self):
        return N // 2


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(datasets.Dataset.from_dict({"x": ROWS}).to_iterable_dataset()), "streaming data"),
        (DataLoader(ROWS, batch_size=None), "has no batch_sampler"),
        (DataLoader(ROWS, batch_sampler=OneBatchAtATime()), "OneBatchAtATime makes whole batches"),
        (
            DataLoader(ROWS, sampler=HalfSampler(ROWS)),
            "HalfSampler draws 48 rows per epoch and there are 97 to weight",
        ),
        (DataLoader(ROWS[:-1]), "SequentialSampler draws 96 rows per epoch and there are 97 to weight"),
    ],
)
def test_a_loader_that_cannot_be_resampled_is_refused_with_the_way_out(loader, reason):
    with pytest.raises(ValueError, match=rf"{reason}.*prefilter\(trainer\), or dataset\.map\(ForValueTransform"):
        install_sampler(loader, DROP, seed=0)


@pytest.mark.newest
def test_a_sampler_of_balanced_batches_is_refused_with_the_way_out():
    loader = DataLoader(ROWS, batch_sampler=trainer_pt_utils.BatchRebalanceSampler(ROWS, 8, 2, 2))
    with pytest.raises(ValueError, match="BatchRebalanceSampler makes whole"):
        install_sampler(loader, DROP, seed=0)


class Unsized(Sampler):
    def __iter__(self):
        return iter(ROWS)


def test_a_loader_is_looked_at_before_anything_is_changed():
    loader = prepared(ranks=2)
    before = loader.batch_sampler.batch_sampler.sampler
    sampler, chain = find_sampler(loader, N)
    assert sampler is before is loader.batch_sampler.batch_sampler.sampler
    assert len(chain) == 2
    loader = DataLoader(ROWS, batch_sampler=BatchSampler(Unsized(), 4, drop_last=False))
    with pytest.raises(ValueError, match=r"Unsized draws nobody knows how many rows.*prefilter\(trainer\)"):
        find_sampler(loader, N)


class EasyFirst(Sampler):
    """A curriculum of the user's own."""

    def __len__(self):
        return N

    def __iter__(self):
        return iter(np.argsort(REWEIGHT).tolist())


@pytest.mark.parametrize("sampler", [SequentialSampler(ROWS), EasyFirst()], ids=["sequential", "own"])
@pytest.mark.parametrize("weights", [DROP, REWEIGHT])
def test_an_order_with_a_meaning_is_kept_with_copies_beside_their_row(sampler, weights):
    place = np.argsort(list(sampler))
    for _ in range(3):
        drawn = place[list(ResamplingSampler(sampler, weights, seed=0))]
        assert (np.diff(drawn) >= 0).all()
        assert len(set(drawn)) < N


@pytest.mark.parametrize("weights", [np.zeros(N), -DROP, DROP * np.nan, DROP + np.inf, DROP[:-1], DROP[:, None]])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        ResamplingSampler(random_sampler(), weights, seed=0)
