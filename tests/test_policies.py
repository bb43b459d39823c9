"""Policies: exact counts, within groups too; what they refuse; the text form."""

from types import SimpleNamespace

import numpy as np
import pytest

from forvalue_callbacks import ForValueScorer
from forvalue_callbacks.policies import (
    Chain,
    Drop,
    Keep,
    Policy,
    Relabel,
    Reweight,
    Swap,
    Threshold,
    as_policy,
    describe,
    effective_sample_size,
    keep_in_turn,
    parse_policy,
)
from forvalue_callbacks.scores.judgements import Judgements
from helpers.models import build_model
from helpers.trainers import TRAIN, VALIDATION

N = 203
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=N)
LABELS = RNG.choice(["a", "b", "c"], size=N, p=[0.7, 0.25, 0.05]).tolist()
ALL = [Drop(0.2), Keep(0.3), Keep(40), Threshold(-0.5), Reweight(0.7), Drop(0.1).then(Reweight())]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.5, 0.99])
def test_drop_drops_exactly_the_rounded_fraction_and_the_worst_rows(fraction):
    weights = Drop(fraction)(SCORES)
    n_drop = round(fraction * N)
    assert (weights == 0).sum() == n_drop
    assert set(np.flatnonzero(weights == 0)) == set(np.argsort(SCORES)[:n_drop])
    assert set(weights) <= {0.0, 1.0}


@pytest.mark.parametrize(("amount", "n_keep"), [(0.3, round(0.3 * N)), (1.0, N), (1, 1), (40, 40), (N, N), (10**6, N)])
def test_keep_keeps_a_fraction_or_a_count_of_the_best_rows(amount, n_keep):
    weights = Keep(amount)(SCORES)
    assert set(np.flatnonzero(weights)) == set(np.argsort(-SCORES)[:n_keep])


def test_threshold_drops_only_scores_below_it():
    np.testing.assert_array_equal(Threshold(0.0)(np.array([-1.0, -0.0, 0.0, 1e-9, 2.0])), [0, 1, 1, 1, 1])


def test_reweight_is_the_exponential_of_the_clipped_standard_score():
    scores = np.append(SCORES, 50.0)  # one outlier, to be clipped
    z = np.clip((scores - scores.mean()) / scores.std(), -3, 3)
    expected = np.exp(z / 0.7) / np.exp(z / 0.7).mean()
    np.testing.assert_allclose(Reweight(0.7)(scores), expected, rtol=1e-12)


def test_reweight_keeps_every_row_of_equal_scores_alike_and_does_not_overflow():
    np.testing.assert_array_equal(Reweight()(np.full(7, 0.1)), np.ones(7))
    assert np.isfinite(Reweight(1e-4)(SCORES)).all()


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_a_row_without_a_score_gets_weight_zero_and_does_not_count(policy):
    gaps = np.insert(SCORES, [0, 50, 50, N], [np.nan, np.nan, np.inf, -np.inf])
    scored = np.isfinite(gaps)
    weights = policy(gaps)
    assert not weights[~scored].any()
    np.testing.assert_array_equal(weights[scored], policy(SCORES))


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_weights_follow_the_rows_when_they_are_reordered(policy):
    order = RNG.permutation(N)
    np.testing.assert_allclose(policy(SCORES[order]), policy(SCORES)[order], rtol=1e-12)


def test_of_equal_scores_the_earlier_rows_stay():
    tied = np.zeros(10)
    np.testing.assert_array_equal(Drop(0.3)(tied), [1] * 7 + [0] * 3)
    np.testing.assert_array_equal(Keep(2)(tied), [1] * 2 + [0] * 8)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_drop_with_groups_drops_the_fraction_of_each_group_and_of_the_whole(fraction):
    labels = np.array(LABELS)
    weights = Drop(fraction, group_column="label")(SCORES, LABELS)
    assert (weights == 0).sum() == round(fraction * N)
    for label in "abc":
        dropped, group = weights[labels == label] == 0, SCORES[labels == label]
        assert abs(dropped.sum() - fraction * len(group)) < 1
        assert set(np.flatnonzero(dropped)) == set(np.argsort(group)[: dropped.sum()])


def test_keep_with_groups_shares_out_a_count_in_proportion():
    groups = ["a"] * 100 + ["b"] * 60 + ["c"] * 40
    weights = Keep(20, group_column="g")(RNG.normal(size=200), groups)
    assert [int(weights[np.array(groups) == g].sum()) for g in "abc"] == [10, 6, 4]


@pytest.mark.parametrize("policy", [Drop(0.9), Keep(1), Keep(0.05), Threshold(100.0)], ids=str)
def test_no_group_with_a_scored_row_is_emptied_and_its_best_row_stays(policy):
    grouped = type(policy)(*[v for k, v in vars(policy).items() if k != "group_column"], group_column="g")
    scores = np.array([3.0, 1.0, 2.0, -5.0, -4.0, np.nan, 9.0])
    weights = grouped(scores, ["a", "a", "a", "b", "b", "unscored", None])
    assert weights[[0, 4, 6]].all()
    assert not weights[5]


def test_reweight_with_groups_is_reweight_within_each_group():
    labels = np.array(LABELS)
    weights = Reweight(group_column="label")(SCORES * np.where(labels == "a", 1, 1000), LABELS)
    for label in "abc":
        np.testing.assert_allclose(weights[labels == label], Reweight()(SCORES[labels == label]), rtol=1e-9)


def test_a_chain_shows_each_policy_only_the_rows_still_kept():
    kept = Drop(0.5)(SCORES) > 0
    expected = np.zeros(N)
    expected[kept] = Reweight()(SCORES[kept])
    np.testing.assert_allclose(Drop(0.5).then(Reweight())(SCORES), expected, rtol=1e-12)
    assert (Drop(0.5).then(Drop(0.5))(SCORES) > 0).sum() == (N - round(N / 2)) - round((N - round(N / 2)) / 2)


def test_weights_of_a_chain_multiply():
    np.testing.assert_allclose(Reweight(2.0).then(Reweight(2.0))(SCORES), Reweight(2.0)(SCORES) ** 2, rtol=1e-12)


def test_a_chain_groups_only_the_policies_that_ask_for_it():
    chain = Drop(0.2, group_column="label").then(Reweight())
    assert chain.group_column == "label"
    dropped = Drop(0.2, group_column="label")(SCORES, LABELS)
    expected = Reweight()(np.where(dropped > 0, SCORES, np.nan))
    np.testing.assert_allclose(chain(SCORES, LABELS), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"one group column, not \['label', 'source'\]"):
        Drop(0.2, group_column="label").then(Keep(3, group_column="source"))


def test_chains_are_flat_so_that_bracketing_makes_no_difference():
    a, b, c = Drop(0.1), Threshold(), Reweight()
    assert a.then(b).then(c) == a.then(b.then(c)) == Chain((a, b, c))


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("drop:0.2", Drop(0.2)),
        ("keep:500", Keep(500)),
        ("keep:0.5", Keep(0.5)),
        ("threshold:0.0", Threshold(0.0)),
        ("threshold:-1.5", Threshold(-1.5)),
        ("threshold:1e+20", Threshold(1e20)),
        ("threshold", Threshold()),
        ("reweight:0.7", Reweight(0.7)),
        ("drop:0.2@label", Drop(0.2, group_column="label")),
        ("reweight@source name", Reweight(group_column="source name")),
        ("drop:0.2+reweight:1.0", Drop(0.2).then(Reweight(1.0))),
        ("drop:0.2@label + keep:9@label", Drop(0.2, group_column="label").then(Keep(9, group_column="label"))),
    ],
)
def test_the_text_form_names_the_policy_and_str_gives_it_back(text, policy):
    assert parse_policy(text) == policy
    assert type(vars(parse_policy(text)).get("amount")) is type(vars(policy).get("amount"))  # 500 is a count
    assert parse_policy(str(policy)) == policy
    assert eval(repr(policy)) == policy


@pytest.mark.parametrize(
    "text", ["", "drop", "drop:", "drop:much", "drop:1.5", "keep:0", "best:3", "drop:0.2+", "drop=0.2"]
)
def test_a_text_that_names_no_policy_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"cannot read the policy .* write for example drop:0\.2"):
        parse_policy(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Drop(1.0),
        lambda: Drop(-0.1),
        lambda: Drop(float("nan")),
        lambda: Keep(0),
        lambda: Keep(0.0),
        lambda: Keep(1.5),
        lambda: Keep(True),
        lambda: Threshold(float("nan")),
        lambda: Reweight(0.0),
        lambda: Reweight(-1.0),
    ],
)
def test_arguments_out_of_range_are_refused_when_the_policy_is_made(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_dropping_everything_is_refused_and_the_range_of_scores_told():
    with pytest.raises(ValueError, match=r"threshold:5.0 drops all 3 scored rows \(scores from -2 to 4\): lower"):
        Threshold(5.0)(np.array([-2.0, np.nan, 4.0, 1.0]))
    with pytest.raises(ValueError, match="drops all 3 scored rows"):
        Drop(0.9)(np.array([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_scores_that_are_all_missing_are_refused(policy):
    with pytest.raises(ValueError, match="none of the 4 rows has a score"):
        policy(np.full(4, np.nan))


def test_groups_are_needed_exactly_where_there_is_a_group_column():
    with pytest.raises(ValueError, match="needs groups: the values of the column 'label'"):
        Drop(0.2, group_column="label")(SCORES)
    with pytest.raises(ValueError, match="2 groups for 203 scores"):
        Drop(0.2, group_column="label")(SCORES, ["a", "b"])
    np.testing.assert_array_equal(Drop(0.2)(SCORES, LABELS), Drop(0.2)(SCORES))


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(N,\), not \(3, 2\)"):
        Drop(0.2)(np.zeros((3, 2)))


def test_policies_are_values():
    assert Drop(0.2) == Drop(0.2) != Drop(0.3)
    assert len({Drop(0.2), Drop(0.2), Drop(0.2, group_column="label")}) == 2
    assert all(isinstance(policy, Policy) for policy in ALL)


def test_describe_tells_how_often_a_kept_row_is_drawn():
    assert describe(np.array([1.0, 1.0, 2.0, 0.0])) == {
        "kept": 3,
        "dropped": 1,
        "draws_per_kept_row_mean": pytest.approx(4 / 3),
        "draws_per_kept_row_max": 2.0,
        "effective_sample_size": pytest.approx(16 / 6),
    }
    assert effective_sample_size(np.array([3.0, 3.0, 0.0])) == 2.0


def test_drop_auto_drops_what_is_more_likely_noisy_than_clean():
    scores = np.array([-2.0, -0.1, 0.0, 3.0, np.nan])
    assert Drop("auto")(scores).tolist() == [0, 0, 1, 1, 0]
    assert Drop("auto", group_column="label")(scores, ["a", "a", "b", "b", "b"]).tolist() == [0, 1, 1, 1, 0]
    assert parse_policy("drop:auto@label") == Drop("auto", group_column="label")
    assert str(Drop("auto").then(Reweight(0.5))) == "drop:auto+reweight:0.5"
    assert Drop("auto").then(Reweight()).needs_log_odds
    assert not Drop(0.2).then(Reweight()).needs_log_odds
    with pytest.raises(ValueError, match="'auto'"):
        Drop("all")


def test_a_policy_is_taken_as_it_is_or_as_text_and_anything_else_is_refused_with_what_to_write():
    assert as_policy(Keep(3)) == Keep(3)
    assert as_policy("drop:auto@label") == Drop("auto", group_column="label")
    assert as_policy(None) == Drop(0.2)
    for wrong, named in ((0.2, "of type float"), (Drop, "the class Drop"), ([Drop(0.2)], "of type list")):
        with pytest.raises(TypeError, match=rf"{named}.*Drop\(0.2\)"):
            as_policy(wrong)
    with pytest.raises(ValueError, match="cannot read the policy"):
        as_policy("keep the best")


def test_reweight_warns_where_the_effective_sample_is_below_a_fifth_of_the_rows(caplog):
    Reweight(1.0)(SCORES)
    Drop(0.9)(SCORES)
    assert not caplog.records
    sharp = Reweight(0.3)
    size = effective_sample_size(sharp(SCORES))
    assert size < N / 5
    assert f"reweight:0.3 draws so few of {N} rows so often that they are worth {size:.0f}" in caplog.text


def test_policies_say_what_they_ask_for():
    assert not Drop(0.2).then(Threshold()).reweights
    assert Drop(0.2).then(Reweight()).reweights
    assert Reweight().reweights
    assert Drop(0.1).then(Drop("auto")).needs_log_odds
    assert not Drop(0.1).then(Reweight()).needs_log_odds


# ---- Relabel ----


def judged(n, suggestions):
    """Judgements that suggest other answers: {row: (other row, probability)}."""
    said = Judgements.none(n)
    for row, (other, probability) in suggestions.items():
        said.suggested_row[row], said.suggested_probability[row] = other, probability
    return said


def test_relabel_gives_other_answers_to_rows_that_are_dropped_and_sure():
    scores = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, np.nan])
    policy = Relabel(0.9)
    weights = policy(scores)
    np.testing.assert_array_equal(weights, Drop("auto")(scores))
    said = judged(6, {0: (4, 0.9), 1: (3, 0.89), 3: (4, 1.0), 5: (3, 0.95)})
    known = SimpleNamespace(judgements=said)
    assert policy.other_answers(weights, known) == {0: 4, 5: 3}
    assert Relabel(0.5, policy=Drop(0.2)).other_answers(Drop(0.2)(scores), known) == {0: 4, 5: 3}
    assert Drop(0.2).other_answers(Drop(0.2)(scores), known) == {}
    with pytest.raises(ValueError, match="needs to know whose answer is right"):
        policy.other_answers(weights, SimpleNamespace(judgements=None))


def test_swap_turns_round_what_is_dropped_with_a_score_below():
    scores = np.array([-3.0, -0.5, 0.0, 0.2, 2.0, np.nan])
    known = SimpleNamespace(values=scores)
    assert Swap().other_answers(Swap()(scores), known) == {0: 0, 1: 1}
    assert Swap(0.5).other_answers(Swap()(scores), known) == {0: 0}
    policy = Swap(policy=Drop(0.6))
    np.testing.assert_array_equal(policy(scores), Drop(0.6)(scores))
    assert policy.other_answers(policy(scores), known) == {0: 0, 1: 1}  # not the one that is dropped above 0
    assert (policy.needs_log_odds, policy.reweights, policy.relabels) == (False, False, True)


def test_swap_in_text_and_what_it_refuses():
    for text, policy in (
        ("threshold:0.0+swap:0.0", Swap()),
        ("drop:0.2@label+swap:1.5", Swap(1.5, policy=Drop(0.2, group_column="label"))),
    ):
        assert parse_policy(text) == policy
        assert str(policy) == text
    assert parse_policy("threshold:0.0+swap") == Swap()
    for margin in (-0.1, np.inf, True):
        with pytest.raises(ValueError, match="margin must be 0 or more"):
            Swap(margin)
    with pytest.raises(ValueError, match="Swap takes a policy that drops rows"):
        Swap(policy=Relabel())
    with pytest.raises(ValueError, match="no part of a chain"):
        Swap().then(Drop(0.1))


def test_relabel_is_what_its_policy_is():
    assert Relabel(0.95) == Relabel()
    assert (Relabel().needs_log_odds, Relabel().reweights, Relabel().relabels) == (True, False, True)
    inner = Drop(0.2, group_column="source").then(Reweight())
    policy = Relabel(0.9, policy=inner)
    assert (policy.needs_log_odds, policy.reweights, policy.group_column) == (False, True, "source")
    groups = ["a", "b"] * 100
    np.testing.assert_array_equal(policy(SCORES[:200], groups), inner(SCORES[:200], groups))


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("drop:auto+relabel:0.95", Relabel(0.95)),
        ("drop:0.2@label+relabel:0.9", Relabel(0.9, policy=Drop(0.2, group_column="label"))),
        ("drop:0.2+keep:5+relabel:1.0", Relabel(1.0, policy=Drop(0.2).then(Keep(5)))),
    ],
)
def test_relabel_in_text(text, policy):
    assert parse_policy(text) == policy
    assert str(policy) == text
    assert parse_policy("relabel") == parse_policy("relabel:0.95") == Relabel()


def test_what_relabel_refuses():
    for probability in (0.0, 1.1, True):
        with pytest.raises(ValueError, match="probability must be in"):
            Relabel(probability)
    with pytest.raises(ValueError, match="Relabel takes a policy that drops rows"):
        Relabel(0.9, policy=Relabel())
    for make in (lambda: Relabel().then(Drop(0.1)), lambda: Drop(0.1).then(Relabel())):
        with pytest.raises(ValueError, match="no part of a chain"):
            make()


# ---- several aims ----


def test_columns_choose_in_turn_and_none_of_them_twice():
    scores = np.array([[9.0, 8.0], [8.0, 9.0], [7.0, 7.0], [1.0, 6.0], [np.nan, 5.0], [np.nan, np.nan]])
    chosen = [np.flatnonzero(keep_in_turn(scores, n)).tolist() for n in (1, 2, 3, 4, 5, 50)]
    assert chosen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    small_aim = np.column_stack([np.linspace(100, 1, 20), np.linspace(0, 1, 20)])
    assert keep_in_turn(small_aim, 0.2).nonzero()[0].tolist() == [0, 1, 18, 19]  # the mean over columns: 0 to 3


def test_of_rows_alike_one_is_kept():
    scores = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]])
    assert keep_in_turn(scores, 3, alike=[[3, 4], [0, 1], [1, 3]]).nonzero()[0].tolist() == [0, 2]
    assert keep_in_turn(scores, 4, alike=[range(5)]).sum() == 1


def test_turns_by_pairs_of_a_scorer():
    scorer = ForValueScorer(build_model(), VALIDATION, progress=False)
    pairs = scorer.pairwise(TRAIN).numpy()
    weights = keep_in_turn(pairs, len(VALIDATION))
    assert weights.sum() == len(VALIDATION)
    assert weights[np.argmax(pairs[:, 0])] == 1


@pytest.mark.parametrize(
    ("scores", "amount", "message"),
    [
        (np.zeros(3), 1, "a column for each validation row"),
        (np.full((3, 2), np.nan), 1, "none of the 3 rows"),
        (np.zeros((3, 1)), 0, "at least 1"),
    ],
)
def test_what_cannot_take_turns_is_refused(scores, amount, message):
    with pytest.raises(ValueError, match=message):
        keep_in_turn(scores, amount)
