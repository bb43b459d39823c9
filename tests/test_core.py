import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forvalue_callbacks import core
from helpers.oracles import HEADS, T2, D, T, V, make, naive_log_p, relative

BLOCKS = [(4, 5), (11, 37), (1, 1), (1000, 1000)]


def gradient(head, hidden, labels):
    weight = head.weight.double().clone().requires_grad_(True)
    return torch.autograd.grad(naive_log_p(head, weight, hidden.double(), labels).sum(), weight)[0]


@pytest.mark.parametrize("tiles", BLOCKS)
@pytest.mark.parametrize("kind", HEADS)
def test_gradient_and_scores_equal_autograd_for_every_block_size(kind, tiles):
    head, (hidden, other), (labels, other_labels) = make(kind)
    sizes = {"token_tile": tiles[0], "vocab_block": tiles[1]}
    direction = core.add_gradient(torch.zeros(V, D, dtype=torch.float64), head, other, other_labels, **sizes)
    assert relative(direction, gradient(head, other, other_labels)) < 1e-12
    scores, log_p = core.score_tokens(head, direction, hidden, labels, **sizes)
    want = [(gradient(head, hidden[t : t + 1], labels[t : t + 1]) * direction).sum() for t in range(T)]
    assert relative(scores, torch.stack(want)) < 1e-10
    assert relative(log_p, naive_log_p(head, head.weight, hidden, labels)) < 1e-12


@pytest.mark.parametrize("tiles", BLOCKS)
@pytest.mark.parametrize("kind", HEADS)
def test_pairs_and_norms_equal_inner_products_of_gradients(kind, tiles):
    head, (hidden, other), (labels, other_labels) = make(kind)
    sizes = {"token_tile": tiles[0], "vocab_block": tiles[1]}
    lengths, other_lengths = [4, 0, 1, 6], [5, 8]
    split = [gradient(head, h, y) for h, y in zip(hidden.split(lengths), labels.split(lengths), strict=True)]
    other_split = [
        gradient(head, h, y)
        for h, y in zip(other.split(other_lengths), other_labels.split(other_lengths), strict=True)
    ]
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    other_rows = torch.repeat_interleave(torch.arange(2), torch.tensor(other_lengths))
    pairs = core.score_pairs(head, hidden, labels, rows, 4, other, other_labels, other_rows, 2, **sizes)
    want = torch.tensor([[(a * b).sum() for b in other_split] for a in split])
    assert relative(pairs, want) < 1e-10
    norms = core.squared_norms(head, hidden, labels, lengths, **sizes)
    assert relative(norms, torch.stack([(g * g).sum() for g in split])) < 1e-10


def test_a_metric_stands_between_the_hidden_states():
    head, (hidden, other), (labels, other_labels) = make("all")
    metric = torch.randn(D, D, dtype=torch.float64)
    metric = metric @ metric.T
    left, right = gradient(head, hidden, labels), gradient(head, other, other_labels)
    rows, other_rows = torch.zeros(T, dtype=torch.long), torch.zeros(T2, dtype=torch.long)
    pairs = core.score_pairs(
        head, hidden, labels, rows, 1, other, other_labels, other_rows, 1, other_metric_TD=other @ metric
    )
    assert relative(pairs, (left @ metric * right).sum()[None, None]) < 1e-10
    norm = core.squared_norms(head, hidden, labels, [T], metric_TD=hidden @ metric)
    assert relative(norm, (left @ metric * left).sum()[None]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_low_precision_is_no_worse_than_the_naive_code(kind, dtype):
    """Error budget: at most twice the naive float32 code on the same rounded inputs, plus four ulps."""
    head, (hidden, other), (labels, other_labels) = make(kind, dtype)
    exact_direction = gradient(head, other, other_labels)
    exact = torch.stack(
        [(gradient(head, hidden[t : t + 1], labels[t : t + 1]) * exact_direction).sum() for t in range(T)]
    )
    naive_head = core.Head(
        head.weight.float(), None if head.bias is None else head.bias.float(), head.scale, head.softcap
    )

    def naive_gradient(h, y):
        weight = naive_head.weight.clone().requires_grad_(True)
        return torch.autograd.grad(naive_log_p(naive_head, weight, h.float(), y).sum(), weight)[0]

    naive_direction = naive_gradient(other, other_labels)
    naive = torch.stack(
        [(naive_gradient(hidden[t : t + 1], labels[t : t + 1]) * naive_direction).sum() for t in range(T)]
    )
    direction = core.add_gradient(torch.zeros(V, D), head, other, other_labels, token_tile=4, vocab_block=5)
    scores, _ = core.score_tokens(head, direction, hidden, labels, token_tile=4, vocab_block=5)
    assert scores.dtype == torch.float32
    assert relative(scores, exact) <= 2 * relative(naive, exact) + 4 * torch.finfo(torch.float32).eps


def test_the_ridge_of_an_inverse_is_a_share_of_the_mean_diagonal():
    moment = torch.cov(torch.randn(D, 3 * D, dtype=torch.float64))
    want = torch.linalg.inv(moment + 0.3 * moment.trace() / D * torch.eye(D, dtype=torch.float64))
    assert relative(core.inverse_with_ridge(moment, 0.3), want) < 1e-12


def test_extreme_logits_stay_finite():
    head, (hidden, other), (labels, other_labels) = make("plain", torch.float32)
    direction = core.add_gradient(torch.zeros(V, D), head, other * 1e3, other_labels, vocab_block=5)
    scores, log_p = core.score_tokens(head, direction, hidden * 1e3, labels, vocab_block=5)
    assert torch.isfinite(scores).all()
    assert torch.isfinite(log_p).all()


def test_no_labelled_positions_give_empty_results():
    head, (hidden, _), (labels, _) = make()
    scores, log_p = core.score_tokens(head, head.weight, hidden[:0], labels[:0])
    assert scores.shape == log_p.shape == (0,)
    assert core.squared_norms(head, hidden[:0], labels[:0], [0, 0]).tolist() == [0, 0]


def test_nothing_of_tokens_by_vocabulary_is_allocated():
    """The largest tensor that any operation makes is one tile of logits or one block of the head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() not in given:
                    self.n = max(self.n, tensor.numel())
            return out

    vocab, dim, tokens, tile, block = 1001, 4, 300, 16, 32
    head = core.Head(torch.randn(vocab, dim))
    hidden, labels, out = torch.randn(tokens, dim), torch.randint(vocab, (tokens,)), torch.zeros(vocab, dim)
    given = {t.untyped_storage().nbytes() for t in (head.weight, hidden, labels, out)}
    with Largest() as largest:
        core.add_gradient(out, head, hidden, labels, token_tile=tile, vocab_block=block)
        core.score_tokens(head, out, hidden, labels, token_tile=tile, vocab_block=block)
    assert tile * block <= largest.n <= max(tile * block, tokens)


# One after the other, each with what it is the first to import; what torch itself imports does not count.
IMPORTS = """
import importlib, sys, torch
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    for module in sorted(set(sys.modules) - before):
        top = module.partition(".")[0]
        if top not in sys.stdlib_module_names and not top.startswith("_") and top not in ("torch", "numpy", "triton"):
            print(name, module)
"""


def imported_by(*modules):
    """Lines "module import", of what comes from neither Python nor torch nor numpy nor the core; Triton is torch's."""
    out = subprocess.check_output([sys.executable, "-c", IMPORTS, *modules], text=True)
    ours = re.compile(r"forvalue_callbacks(\.core(\.\w+)?)?")
    return [line for line in out.splitlines() if not ours.fullmatch(line.split()[1])]


def test_no_module_of_the_core_imports_more_than_torch_and_numpy():
    modules = [f"forvalue_callbacks.core.{path.stem}" for path in Path(core.__file__).parent.glob("[!_]*.py")]
    assert len(modules) > 5
    if importlib.util.find_spec("triton") is None:  # the kernel's module alone needs it
        modules.remove("forvalue_callbacks.core.triton_fold")
    assert imported_by(*modules) == []


def test_an_import_in_the_core_would_be_seen():
    assert "forvalue_callbacks.scores forvalue_callbacks.scores.scores" in imported_by("forvalue_callbacks.scores")
    assert "pyarrow pyarrow" in imported_by("forvalue_callbacks.core", "pyarrow")


KERNEL = """
import torch
from forvalue_callbacks.core import stream, triton_fold

torch.manual_seed(0)
for n_columns, n_more in ((5, 3), (3000, 2048)):
    logits, values = 5 * torch.randn(7, n_columns + n_more), torch.randn(7, n_columns + n_more)
    labels = torch.tensor([0, 1, n_columns - 1, n_columns, n_columns + n_more - 1, 2, 3])
    for given in (None, values):
        ours, plain = (stream.OnlineSoftmax(logits, torch.float32, labels) for _ in range(2))
        for block in (slice(0, n_columns), slice(n_columns, n_columns + n_more)):
            value = None if given is None else given[:, block].clone()
            triton_fold.fold(ours, block, logits[:, block].clone(), value)
            plain.fold(block, logits[:, block].clone(), value)
        torch.testing.assert_close(ours.log_normalizer(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.log_likelihood(), plain.log_likelihood(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.surplus(), plain.surplus(), rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs there")
def test_a_kernel_that_cannot_be_built_leaves_the_fold_to_torch(caplog):
    core.fold_kernel.cache_clear()
    assert core.fold_kernel() is None
    assert "the fold runs in torch" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not made for this platform")
def test_the_triton_kernel_folds_as_torch_does():
    """Run by Triton's interpreter, on a CPU."""
    out = subprocess.run(
        [sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert out.stdout.strip() == "equal", out.stderr


def test_half_precision_hidden_states_meet_a_float32_matrix_almost_exactly(monkeypatch):
    """Of the 24 bits of the matrix 16 count; a CPU has no product with another dtype, so one is stood in for it."""
    torch.manual_seed(0)
    hidden, matrix = torch.randn(50, 64).bfloat16(), torch.randn(30, 64)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    exact = hidden.double() @ matrix.double().T
    assert relative(core.product(hidden, matrix).double(), exact) < 2e-5
    assert relative((hidden.float() @ matrix.bfloat16().float().T).double(), exact) > 1e-3, "what plain bf16 costs"
    assert (
        relative(core.product(hidden, matrix.bfloat16()).double(), hidden.double() @ matrix.bfloat16().double().T)
        < 1e-6
    )
