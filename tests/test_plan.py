"""Beginnings in common: found on token ids, packed under the budget, and the same scores with fewer tokens run."""

from itertools import product

import numpy as np
import peft
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.methods.gradient import Gradient
from forvalue_callbacks.model.plan import COLLATED_ROWS, PASS_COST, pack, padded, padded_tokens, plan, shared_prefixes
from helpers.models import ARCHITECTURES, VOCAB, build_model, build_rows
from helpers.oracles import relative

SLIDING = {"mistral", "gemma2-softcap", "gemma3-softcap", "gemma3"}


def shared(*rows):
    return shared_prefixes([np.array(row) for row in rows]).tolist()


def test_what_all_rows_begin_with_is_shared():
    assert shared([1, 2, 3, 4], [1, 2, 3, 9, 9], [1, 2, 3]) == [3, 3, 3]


def test_several_answers_to_a_prompt_share_all_of_it_rather_than_what_all_prompts_have_in_common():
    a, b = [1, 5, 6, 7, 8], [1, 9, 9, 9]
    assert shared(a, b, a, b, a) == [5, 4, 5, 4, 5]


def test_the_depth_is_the_one_that_saves_most():
    """Eight rows agree in 4 tokens, two of them in 6: 7 * 4 tokens saved, not 6."""
    rows = [[1, 2, 3, 4, k] for k in range(10, 16)] + [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    assert shared(*rows) == [4] * 8


def test_rows_that_share_nothing_are_left_alone():
    assert shared() == []
    assert shared([1, 2]) == [0]
    assert shared([1, 2], [], [3, 4]) == [0, 0, 0]
    assert shared([1, 2, 3], [4], [1, 2, 5]) == [2, 0, 2]


def test_the_best_depth_equals_an_exhaustive_search():
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = [tuple(rng.integers(0, 2, rng.integers(0, 7))) for _ in range(9)]
        got = sum(n for row, n in zip(rows, shared(*rows), strict=True))
        groups = {row[:n] for row, n in zip(rows, shared(*rows), strict=True) if n}
        saved = got - sum(map(len, groups))
        best = 0
        for depth in range(1, 7):
            parts = {}
            for row in rows:
                if len(row) >= depth:
                    parts.setdefault(row[:depth], []).append(row)
            total = 0
            for part in parts.values():
                common = next(
                    k for k in range(6, -1, -1) if min(map(len, part)) >= k and len({r[:k] for r in part}) == 1
                )
                total += (len(part) - 1) * common
            best = max(best, total)
        assert saved == best


@pytest.mark.parametrize("budget", [1, 20, 60, 1000])
def test_batches_hold_every_row_once_within_the_budget(budget):
    rng = np.random.default_rng(1)
    prefixes = [bytes([k]) for k in rng.integers(0, 5, 40)]
    lengths, rest = [3 + prefix[0] for prefix in prefixes], rng.integers(1, 9, 40).tolist()
    batches = pack(prefixes, lengths, rest, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    for batch in batches:
        tokens = padded_tokens(*([side[i] for i in batch] for side in (prefixes, lengths, rest)))
        assert tokens <= budget or len(batch) == 1
    if budget == 1000:  # 5 prefixes of at most 7 tokens, and 40 rests of at most 8
        assert len(batches) == 1


@pytest.mark.parametrize(("n_prefixes", "budget"), list(product([0, 1, 3], [1, 30, 64, 1000])))
def test_batches_cost_as_little_as_any_cut_of_their_order(n_prefixes, budget):
    def splits(n):
        return [[]] if n == 0 else [[k, *rest] for k in range(1, n + 1) for rest in splits(n - k)]

    for seed in range(10):
        rng = np.random.default_rng(seed)
        prefixes = [bytes([10 + 9 * k]) if n_prefixes else b"" for k in rng.integers(0, max(1, n_prefixes), 9)]
        lengths, rest = [sum(prefix) for prefix in prefixes], rng.integers(1, 40, 9).tolist()

        def cost(order, sizes, sides=(prefixes, lengths, rest)):
            total, lo = 0.0, 0
            for n in sizes:
                tokens = padded_tokens(*([side[i] for i in order[lo : lo + n]] for side in sides))
                total += tokens + PASS_COST * budget if n == 1 or tokens <= budget else np.inf
                lo += n
            return total

        batches = pack(prefixes, lengths, rest, budget)
        order = [i for batch in batches for i in batch]
        best = min(cost(order, sizes) for sizes in splits(9))
        assert cost(order, [len(batch) for batch in batches]) == pytest.approx(best)
    assert pack([], [], [], budget) == []


def drawn(seed):
    """Lengths, some of which nobody knows, and beginnings, some of them in common, of 0 to 60 rows; a budget."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 61))
    common = [rng.integers(3, 9, k) for k in (0, 4, 30)]
    prompts = [np.append(common[k], rng.integers(3, 9, rng.integers(0, 4))) for k in rng.integers(0, 3, n)]
    lengths = [len(prompt) + int(rng.integers(1, 20)) for prompt in prompts]
    unknown = rng.random(n) < rng.choice([0.0, 0.3])
    lengths = [None if hidden else length for hidden, length in zip(unknown, lengths, strict=True)]
    return lengths, int(rng.choice([1, 17, 64, 300, 5000])), prompts if rng.random() < 0.7 else None


SEEDS = range(40)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8, 100])
def test_every_row_is_in_one_batch_of_one_rank(n_ranks):
    for seed in SEEDS:
        lengths, budget, prompts = drawn(seed)
        ranks = plan(lengths, budget, n_ranks, prompts)
        assert len(ranks) == n_ranks
        assert sorted(i for rank in ranks for batch in rank for i in batch.rows) == list(range(len(lengths))), seed
        assert all(len(batch.rows) == len(batch.shared) > 0 for rank in ranks for batch in rank), seed


@pytest.mark.parametrize("n_ranks", [2, 3, 8])
def test_the_batches_of_ranks_are_those_of_one_dealt_out(n_ranks):
    for seed in SEEDS:
        lengths, budget, prompts = drawn(seed)
        (one,) = plan(lengths, budget, 1, prompts)
        ranks = plan(lengths, budget, n_ranks, prompts)
        assert [ranks[k % n_ranks][k // n_ranks] for k in range(len(one))] == one, seed
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1, seed


def test_a_batch_holds_no_more_than_the_budget_or_one_row():
    for seed in SEEDS:
        lengths, budget, prompts = drawn(seed)
        known = {i: length for i, length in enumerate(lengths) if length is not None}
        for batch in plan(lengths, budget, 1, prompts)[0]:
            if lengths[batch.rows[0]] is None:
                assert {lengths[i] for i in batch.rows} == {None}, seed
                assert len(batch.rows) <= COLLATED_ROWS, seed
                assert not any(batch.shared), seed
            else:
                assert len(batch.rows) == 1 or padded(batch, known, prompts) <= budget, seed


def test_beginnings_are_shared_where_that_saves_tokens_alone():
    n_sharing = 0
    for seed in SEEDS:
        lengths, budget, prompts = drawn(seed)
        if prompts is None:
            continue
        known = {i: length for i, length in enumerate(lengths) if length is not None}

        def tokens(batches, known=known, prompts=prompts):
            return sum(padded(batch, known, prompts) for batch in batches if batch.rows[0] in known)

        (bare,), (batches,) = plan(lengths, budget), plan(lengths, budget, 1, prompts)
        if any(any(batch.shared) for batch in batches):
            n_sharing += 1
            assert tokens(batches) < 0.8 * tokens(bare), seed
            for batch in batches:
                assert all(n <= len(prompts[i]) for i, n in zip(batch.rows, batch.shared, strict=True)), seed
        else:
            assert batches == bare, seed
    assert 5 < n_sharing < len(SEEDS)


def test_equal_rows_have_an_equal_plan():
    """Ranks make it each for themselves."""
    for seed in SEEDS:
        lengths, budget, prompts = drawn(seed)
        again = None if prompts is None else [prompt.copy() for prompt in prompts]
        assert plan(lengths, budget, 3, prompts) == plan(list(lengths), budget, 3, again), seed


def test_rows_that_none_can_put_together_are_alone_where_all_ranks_must_run_equally_often():
    ranks = plan([None] * 9, 100, 2, collated_rows=1)
    assert [[batch.rows for batch in batches] for batches in ranks] == [
        [(0,), (2,), (4,), (6,), (8,)],
        [(1,), (3,), (5,), (7,)],
    ]


def test_no_rows_are_no_batches_on_any_rank():
    assert plan([], 100, 3, []) == [[], [], []]
    assert [len(batches) for batches in plan([5], 100, 3)] == [1, 0, 0]


def rows_with_a_system_prompt(n, seed=0):
    """20 tokens that all begin with, then one of three questions, then an answer."""
    generator = torch.Generator().manual_seed(seed)
    system = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(9)).tolist()
    questions = [torch.randint(3, VOCAB, (k,), generator=generator).tolist() for k in (5, 6, 9)]
    rows = []
    for i in range(n):
        prompt = system + questions[i % 3]
        answer = torch.randint(3, VOCAB, (2 + i % 5,), generator=generator).tolist()
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def tokens_run(model, call):
    counted = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: counted.append(args[0].numel()))
    out = call()
    handle.remove()
    return out, sum(counted)


@pytest.mark.parametrize(("architecture", "budget"), list(product(ARCHITECTURES, [100, 4096])))
def test_scores_after_common_beginnings_are_those_of_the_bare_rows(architecture, budget, monkeypatch):
    model = build_model(architecture, torch.float64)
    rows, validation = rows_with_a_system_prompt(12), build_rows(3, seed=1)
    rows[4] = build_rows(1, seed=3)[0]  # and one that begins otherwise

    def score():
        config = ForValueConfig(max_tokens_per_batch=budget)
        scorer = ForValueScorer(model, validation, config, progress=False)
        scorer.direction()
        return tokens_run(model, lambda: scorer.score(rows).values)

    got, fewer = score()
    monkeypatch.setattr("forvalue_callbacks.model.plan.WORTH_SHARING", 0.0)
    want, all_of_them = score()
    if architecture in SLIDING:  # what a window leaves out is not known from the beginning alone
        assert fewer == all_of_them
    else:
        assert fewer < 0.6 * all_of_them
    tolerance = 1e-6 if architecture.startswith("gemma") else 1e-10
    assert relative(got, want) < tolerance


def test_padding_does_not_count_positions_that_the_model_has_not(monkeypatch):
    """Long prompts with short answers and the other way round in one batch; the model has learned 64 positions."""
    monkeypatch.setattr("forvalue_callbacks.model.plan.PASS_COST", 1.0)  # or they would be two batches
    monkeypatch.setattr("forvalue_callbacks.model.plan.WORTH_SHARING", 1.0)
    model = build_model("gpt2", torch.float64)
    long, short = list(range(3, 55)), list(range(10, 20))
    rows = [{"input_ids": [*long, k, k + 1], "labels": [-100] * 52 + [k, k + 1]} for k in range(5)]
    rows += [{"input_ids": [*short, *[k] * 30], "labels": [-100] * 10 + [k] * 30} for k in range(20, 25)]
    scorer = ForValueScorer(model, build_rows(3), progress=False)
    scorer.direction()
    values, fewer = tokens_run(model, lambda: scorer.score(rows).values)
    assert fewer == 2 * 51 + 10 * 30, "two beginnings, and what follows on ten rows, padded"
    alone = [scorer.score([row]).values[0] for row in rows]
    assert relative(values, alone) < 1e-10


def test_adapters_and_every_way_to_score_go_through_it():
    model = build_model("qwen2", torch.float64)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    rows, validation = rows_with_a_system_prompt(12), rows_with_a_system_prompt(6, seed=1)
    scorer = ForValueScorer(model, validation, progress=False)
    values, fewer = tokens_run(model, lambda: scorer.score(rows).values)
    assert fewer < 0.6 * sum(len(row["input_ids"]) for row in [*rows, *validation])
    alone = [ForValueScorer(model, validation, progress=False).score([row]).values[0] for row in rows]
    assert relative(values, alone) < 1e-10
    assert relative(scorer.pairwise(rows).mean(1), alone) < 1e-10
    sums = [float(tokens.sum()) for tokens in scorer.token_scores(rows)]
    assert relative(sums, alone) < 1e-10


def test_a_label_right_after_the_common_beginning_is_predicted_by_a_state_that_is_run():
    """All of the prompt in common: its last position predicts the first label and is run for each row."""
    model = build_model("llama", torch.float64)
    rows = [{"input_ids": [*range(3, 23), k], "labels": [-100] * 20 + [k]} for k in range(30, 40)]
    scorer = ForValueScorer(model, build_rows(3), progress=False)
    scores = scorer.score(rows)
    assert scores.n_labelled.tolist() == [1] * 10
    alone = [scorer.score([row]).values[0] for row in rows]
    assert relative(scores.values, alone) < 1e-10


def test_memory_that_runs_out_halves_batches_that_share(monkeypatch):
    model = build_model("llama", torch.float64)
    rows, validation = rows_with_a_system_prompt(12), build_rows(3)
    want = ForValueScorer(model, validation, progress=False).score(rows).values
    scorer = ForValueScorer(model, validation, progress=False)
    scorer.direction()
    run, sizes = scorer.backbone.hidden_states_after, []

    def short_of_memory(prefixes, batch, prefix):
        sizes.append(len(prefix))
        if len(prefix) > 3:
            raise RuntimeError("CUDA out of memory.")
        return run(prefixes, batch, prefix)

    monkeypatch.setattr(scorer.backbone, "hidden_states_after", short_of_memory)
    assert relative(scorer.score(rows).values, want) < 1e-10
    assert max(sizes) > 3 >= min(sizes)


@pytest.mark.parametrize("budget", [60, 100, 4096])
def test_every_rank_runs_the_model_equally_often(budget, monkeypatch):
    """Sharded models gather their weights in every pass: a rank that runs one less would leave the others waiting."""
    model = build_model("llama", torch.float64)
    rows = [*rows_with_a_system_prompt(10), *build_rows(3, seed=5)]
    scorer = ForValueScorer(model, rows[:1], ForValueConfig(max_tokens_per_batch=budget), progress=False)
    samples = list(scorer.run.reader.samples(rows))
    passes, found = [], []
    for rank in range(3):
        monkeypatch.setattr("forvalue_callbacks.model.run.world", lambda rank=rank: (rank, 3))
        run = []
        handle = model.base_model.register_forward_pre_hook(lambda *_, run=run: run.append(1))
        with torch.no_grad():
            found += [i for batch in scorer.run.positions(samples, Gradient()) for i in batch.index]
        handle.remove()
        passes.append(len(run))
    assert sorted(found) == list(range(13))
    assert len(set(passes)) == 1
