"""Clean rows stay: of what is right hardly anything is dropped, whatever its kind, its order and the validation rows.

ATTACK=3 python -m pytest tests/attack/test_safety.py -s    # the table, with three samples of validation rows
"""

import os
from functools import cache

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks import TINY_MODEL, Drop, ForValueConfig, ForValueScorer
from forvalue_callbacks.core.stats import auc
from helpers.clean import FEW, FREE, rows_of, wrong

# ATTACK=3 takes three samples of validation rows of three sizes, of all kinds of rows; else those that cost least.
ATTACK = int(os.environ.get("ATTACK", "1"))
LONG = ATTACK > 1
SAMPLES = range(min(ATTACK, 3)) if LONG else range(1)
SIZES = (50, 150, 300) if LONG else (50,)
ROWS = 200 if LONG else 70
KINDS = [*FREE, *FEW] if LONG else ["all sorts", "moods, minority class", "moods, minority language"]
DROPPED = 0.03


@cache
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval(), AutoTokenizer.from_pretrained(TINY_MODEL)


def score(validation, train):
    model, tokenizer = tiny()
    config = ForValueConfig(method="auto")
    return ForValueScorer(model, validation, config, processing_class=tokenizer, progress=False).score(train)


def dropped(scores):
    return Drop("auto")(scores.values) == 0


@cache
def of_clean(kind, size, sample):
    return score(rows_of(kind, size, sample, validation=True), rows_of(kind, ROWS, 0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_of_clean_rows_hardly_any_is_dropped_and_no_group_goes(kind, size):
    found = [of_clean(kind, size, sample) for sample in SAMPLES]
    assert {scores.noise.n_answers is None for scores in found} == {kind in FREE}  # the method that is meant
    groups = np.array([row["group"] for row in rows_of(kind, ROWS, 0)])
    shares = [float(dropped(scores).mean()) for scores in found]
    counts = {group: (groups == group).sum() for group in dict.fromkeys(groups)}
    rarest = min(counts, key=counts.get)
    claims = [f"{s.noise.share:.3f} +- {s.noise.share_error:.3f}" for s in found]
    lost = max(int(dropped(scores)[groups == rarest].sum()) for scores in found)
    unjudged = max(scores.noise.n_unjudged for scores in found)
    print(
        f"\n| {kind} | {size} | {min(shares):.1%} to {max(shares):.1%} | {', '.join(claims)} | "
        f"{lost} of {counts[rarest]} ({rarest}) | {unjudged} |"
    )
    for scores in found:
        assert dropped(scores).mean() <= DROPPED
        for group in counts:
            assert not dropped(scores)[groups == group].all(), group
        assert scores.noise.share - 1.96 * scores.noise.share_error <= DROPPED


@pytest.mark.parametrize("kind", KINDS if LONG else ["moods, minority class"])
def test_no_decision_follows_the_order_of_either_side(kind):
    """Of rows of which a third are wrong, so that there are decisions."""
    (train, bad), validation = wrong(rows_of(kind, ROWS, 0), 0.3, 0, kind in FEW), rows_of(kind, 50, 0, True)
    rng = np.random.default_rng(1)
    turn = rng.permutation(len(train))
    one = score(validation, train)
    two = score([validation[i] for i in rng.permutation(50)], [train[i] for i in turn])
    print(f"\n| {kind} | dropped {dropped(one).mean():.1%} | {(dropped(two) != dropped(one)[turn]).sum()} flipped |")
    assert dropped(one)[bad].any()
    np.testing.assert_array_equal(dropped(two), dropped(one)[turn])
    np.testing.assert_allclose(two.values, one.values[turn], rtol=0.05, atol=0.05)  # nor was it luck


@pytest.mark.skipif(not LONG, reason="three data sets, each scored twice: ATTACK=3")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["all sorts", "long answers", "moods, minority class"])
def test_what_is_wrong_is_found_beside_them(kind, size):
    for seed in range(3):
        train, bad = wrong(rows_of(kind, ROWS, seed), 0.3, seed, kind in FEW)
        scores, bad = score(rows_of(kind, size, seed, True), train), np.array(bad)
        told, recall = auc(scores.values[~bad], scores.values[bad]), dropped(scores)[bad].mean()
        print(f"\n| {kind} | {size} | {seed} | AUC {told:.3f} | recall {recall:.2f} |")
        assert told > 0.6
