"""Baselines of models against loops of forward and backward passes, in float64."""

import subprocess
import sys
from math import exp

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks import TINY_MODEL, baselines
from helpers.models import build_model, build_rows
from helpers.oracles import relative

# ---- per-sample gradients ----


def lora_model(architecture="llama", dtype=torch.float64, targets=("q_proj", "v_proj"), **settings):
    base = build_model(architecture, dtype)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=12, target_modules=list(targets), **settings)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return model.eval()


def gradients_by_backward(model, rows):
    """One backward pass of the model's own logits per row."""
    named = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if "lora_" in n}
    out = {name: [] for name in named}
    for row in rows:
        model.zero_grad()
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        sum(log_p[t, labels[t + 1]] for t in range(len(ids) - 1) if labels[t + 1] != -100).backward()
        for name, parameter in named.items():
            out[name].append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(values) for name, values in out.items()}


@pytest.mark.parametrize("max_tokens", [1, 30, 8192])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2-softcap", "granite-scaling"])
def test_per_sample_gradients_are_those_of_a_loop_of_backward_passes(architecture, max_tokens):
    model, rows = lora_model(architecture), build_rows(7)
    want = gradients_by_backward(model, rows)
    got = baselines.gradients(model, rows, max_tokens_per_batch=max_tokens)
    assert set(got) == set(want)
    for name in want:
        if "gemma" in architecture:  # its own RMSNorm rounds to float32 in a float64 model too
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)
        else:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10, msg=name)


def test_per_sample_gradients_of_a_fused_projection_are_those_of_a_loop_of_backward_passes():
    model, rows = lora_model("gpt2", targets=["c_attn"], fan_in_fan_out=True), build_rows(5)
    want, got = gradients_by_backward(model, rows), baselines.gradients(model, rows)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10, msg=name)


def test_gradients_leave_the_model_as_found():
    model = lora_model(lora_dropout=0.5).train()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    first = baselines.gradients(model, build_rows(3))
    assert model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    again = baselines.gradients(model, build_rows(3))
    assert all(torch.equal(first[name], again[name]) for name in first)  # no dropout


def test_gradients_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="no active LoRA"):
        baselines.gradients(build_model(), build_rows(2))
    with pytest.raises(ValueError, match="DoRA"):
        baselines.gradients(lora_model(use_dora=True), build_rows(2))
    with pytest.raises(ValueError, match="row 1 cannot be scored: no labelled"):
        baselines.gradients(lora_model(), [*build_rows(1), {"input_ids": [3, 4], "labels": [-100, -100]}])


# ---- forward passes ----


@pytest.fixture
def model64():
    return build_model(dtype=torch.float64)


def hidden(model, row):
    with torch.no_grad():
        return model.base_model(input_ids=torch.tensor(row["input_ids"])[None]).last_hidden_state[0]


def log_p(model, ids, first):
    """Sum of log p of ids[first:], by the model's own logits."""
    with torch.no_grad():
        table = model(input_ids=torch.tensor(ids)[None]).logits[0].log_softmax(-1)
    return sum(float(table[t - 1, ids[t]]) for t in range(first, len(ids)))


def answers(rows):
    return [next(t for t, label in enumerate(row["labels"]) if label != -100) for row in rows]


def test_emb_is_the_inner_product_of_summed_hidden_states_and_its_cosine(model64):
    rows, validation = build_rows(6), build_rows(3, seed=1)

    def pooled(side):
        return torch.stack([hidden(model64, r)[s - 1 : -1].sum(0) for r, s in zip(side, answers(side), strict=True)])

    products = pooled(rows) @ pooled(validation).T
    norms = pooled(rows).norm(dim=1)[:, None] * pooled(validation).norm(dim=1)
    torch.testing.assert_close(baselines.emb(model64, rows, validation), products)
    torch.testing.assert_close(baselines.emb(model64, rows, validation, cosine=True), products / norms)


def test_rds_plus_is_the_cosine_of_position_weighted_means(model64):
    rows, validation = build_rows(6), build_rows(3, seed=1)

    def pooled(row):
        h = hidden(model64, row)
        weight = torch.arange(1, len(h) + 1, dtype=h.dtype)
        return (weight[:, None] * h).sum(0) / weight.sum()

    want = [[torch.cosine_similarity(pooled(r), pooled(v), dim=0) for v in validation] for r in rows]
    torch.testing.assert_close(baselines.rds_plus(model64, rows, validation), torch.tensor(want, dtype=torch.float64))


def test_loss_is_the_mean_log_likelihood_of_the_labelled_tokens(model64):
    rows = build_rows(6)
    want = [
        log_p(model64, r["input_ids"], s) / (len(r["input_ids"]) - s) for r, s in zip(rows, answers(rows), strict=True)
    ]
    torch.testing.assert_close(baselines.loss(model64, rows), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("bos", [1, None])
def test_pmi_and_ifd_compare_the_answer_with_and_without_its_prompt(model64, bos):
    rows, want = build_rows(8), []
    model64.config.bos_token_id = bos
    for row, start in zip(rows, answers(rows), strict=True):
        ids = row["input_ids"]
        skip = 0 if bos is not None else 1  # without BOS the answer's first token has nothing before it
        alone = ([bos] if bos is not None else []) + ids[start:]
        n = len(ids) - start - skip
        want.append((log_p(model64, ids, start + skip) - log_p(model64, alone, 1)) / n if n else 0.0)
    torch.testing.assert_close(baselines.pmi(model64, rows), torch.tensor(want, dtype=torch.float64))
    ratios = [exp(-x) for x in want]  # ppl(answer | prompt) / ppl(answer)
    published = torch.tensor([r if r < 1 else -r for r in ratios], dtype=torch.float64)
    torch.testing.assert_close(baselines.ifd(model64, rows), published)


def test_log_likelihoods_are_summed_over_the_labelled_tokens(model64):
    rows = build_rows(6)
    want = [log_p(model64, r["input_ids"], s) for r, s in zip(rows, answers(rows), strict=True)]
    torch.testing.assert_close(baselines.log_likelihoods(model64, rows), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("name", ["emb", "rds_plus", "loss", "pmi", "ifd", "in_context"])
def test_a_row_has_the_same_baseline_score_alone_and_among_others(model64, name):
    rows, validation = build_rows(6), build_rows(3, seed=1)
    method = getattr(baselines, name)
    sides = (validation,) if name in ("emb", "rds_plus", "in_context") else ()
    whole = method(model64, rows, *sides)
    torch.testing.assert_close(whole, torch.cat([method(model64, [row], *sides) for row in rows]))


# ---- the loss before and after the validation rows are known ----


def mean_log_p(model, row):
    start = answers([row])[0]
    return log_p(model, row["input_ids"], start) / (len(row["input_ids"]) - start)


def test_rho_loss_is_what_a_fitted_model_takes_off_the_loss(model64):
    rows, fitted = build_rows(6), build_model(dtype=torch.float64, seed=1)
    want = [-mean_log_p(model64, row) + mean_log_p(fitted, row) for row in rows]
    torch.testing.assert_close(baselines.rho_loss(model64, fitted, rows), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3])
def test_in_context_is_what_the_nearest_validation_rows_before_it_take_off_the_loss(model64, k):
    rows, validation = build_rows(8), build_rows(5, seed=1)

    def prompt(row):
        return hidden(model64, {"input_ids": row["input_ids"][: answers([row])[0]]}).mean(0)

    want, chosen = [], set()
    for row in rows:
        similar = [float(torch.cosine_similarity(prompt(row), prompt(v), dim=0)) for v in validation]
        nearest = sorted(range(5), key=similar.__getitem__)[-k:]  # the nearest last
        chosen.add(tuple(nearest))
        before = [token for j in nearest for token in validation[j]["input_ids"]]
        start, ids = answers([row])[0], row["input_ids"]
        with_context = log_p(model64, before + ids, len(before) + start) / (len(ids) - start)
        want.append(-mean_log_p(model64, row) + with_context)
    assert len(chosen) > 1
    got = baselines.in_context(model64, rows, validation, k=k)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_in_context_takes_a_row_without_a_prompt(model64):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    want = (log_p(model64, [9, 8, 5, 6, 7], 3) - log_p(model64, [5, 6, 7], 1)) / 2
    got = baselines.in_context(model64, rows, [{"input_ids": [9, 8], "labels": [-100, 8]}], k=1)
    assert got.tolist() == pytest.approx([want])


def test_in_context_refuses_what_has_no_place_in_a_context(model64):
    rows = build_rows(4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} of 4 validation rows"):
            baselines.in_context(model64, rows, rows, k=k)
    long = [{"input_ids": [5] * 30, "labels": [-100] + [5] * 29}] * 3
    with pytest.raises(ValueError, match="119 tokens, and the model takes 64: lower k=3"):
        baselines.in_context(model64, long, long)
    image = {**rows[0], "pixel_values": torch.zeros(3, 8, 8)}
    with pytest.raises(ValueError, match="rows with images"):
        baselines.in_context(model64, [image], rows, k=1)


# ---- moved models ----


def test_mirrored_influence_is_the_mean_of_tracin_for_a_small_step():
    model = lora_model("gpt2", targets=["c_attn"], fan_in_fan_out=True)  # Llama's norms are float32 whatever the model
    rows, validation = build_rows(6), build_rows(3, seed=1)
    want = baselines.tracin(baselines.gradients(model, rows), baselines.gradients(model, validation)).mean(1)
    got = baselines.mirrored(model, rows, validation, step=1e-8)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_mirrored_influence_gives_the_weights_back_bit_for_bit():
    model = lora_model(dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    baselines.mirrored(model, build_rows(4), build_rows(2, seed=1), step=0.1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_forward_only_inference_converges_to_the_damped_inverse_of_the_true_hessian():
    model = lora_model("gpt2", targets=["c_attn"], fan_in_fan_out=True, layers_to_transform=[1])
    model.set_attn_implementation("eager")  # the fused one has no second derivative
    rows, queries = build_rows(3), build_rows(4, seed=1)
    parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    shapes = {n: p.shape for n, p in parameters.items()}

    def log_likelihood(flat, row):
        parts = flat.split([s.numel() for s in shapes.values()])
        named = {n: x.view(s) for (n, s), x in zip(shapes.items(), parts, strict=True)}
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = torch.func.functional_call(model, named, kwargs={"input_ids": ids[None], "use_cache": False}).logits
        log_p = logits[0, :-1].log_softmax(-1).gather(1, labels[1:].clamp(min=0)[:, None])[:, 0]
        return (log_p * (labels[1:] != -100)).sum()

    start = torch.cat([p.flatten() for p in parameters.values()])
    g, q = (
        torch.stack([torch.autograd.functional.jacobian(lambda x, r=r: log_likelihood(x, r), start) for r in side])
        for side in (rows, queries)
    )
    hessian = -sum(torch.autograd.functional.hessian(lambda x, r=r: log_likelihood(x, r), start) for r in rows) / 3
    lowest, highest = torch.linalg.eigvalsh(hessian)[[0, -1]].tolist()
    damping, rate = highest - lowest, 1 / (2 * highest - lowest)
    damped = hessian + damping * torch.eye(len(start), dtype=start.dtype)
    residuals = []
    got = baselines.forward_only_inference(
        model, rows, queries, damping=damping, learning_rate=rate, iterations=60, step=1e-5, residuals=residuals
    )
    want = g @ torch.linalg.solve(damped, q.T)
    assert max(residuals) < 1e-6
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    # By itself: damped by the largest eigenvalue, as eight steps of the power method find it.
    got = baselines.forward_only_inference(model, rows, queries, iterations=60, step=1e-5)
    want = g @ torch.linalg.solve(hessian + highest * torch.eye(len(start), dtype=start.dtype), q.T)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.05 * float(want.abs().max()))
    with pytest.raises(ValueError, match="diverges"):
        baselines.forward_only_inference(model, rows, queries, damping=damping, learning_rate=9 * rate)


# ---- during a run ----


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)

    def pad(name, value):
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": (pad("input_ids", -1) >= 0).long()}


def in_run(tmp_path, trainer_class=Trainer, **settings):
    """A run by plain SGD on LoRA: the model before and after, the rows, and the values."""
    model, rows, validation = lora_model(), build_rows(8), build_rows(3, seed=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback = baselines.InRunShapleyCallback(rows, validation)
    arguments = SFTConfig if trainer_class is SFTTrainer else TrainingArguments
    args = arguments(
        str(tmp_path), optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[], bf16=False,
        save_strategy="no", disable_tqdm=True, logging_steps=100, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    more = {"processing_class": AutoTokenizer.from_pretrained(TINY_MODEL)} if trainer_class is SFTTrainer else {}
    trainer = trainer_class(
        model, args, data_collator=collate, train_dataset=Dataset.from_list(rows), callbacks=[callback], **more
    )
    trainer.train()
    return model, before, rows, validation, callback


@pytest.mark.parametrize("trainer_class", [Trainer, SFTTrainer])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_in_run_values_of_a_step_add_up_to_what_it_gains(tmp_path, trainer_class, accumulate):
    model, before, rows, validation, callback = in_run(
        tmp_path, trainer_class, per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate, max_steps=1, learning_rate=1e-5,
    )  # fmt: skip
    after = baselines.loss(model, validation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    n_validation = torch.tensor([sum(label != -100 for label in row["labels"]) for row in validation])
    gained = (after - baselines.loss(model, validation)) * n_validation
    n_labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert relative(callback.pairwise.sum(0) / n_labelled, gained) < 2e-2
    assert callback.values.all()


def test_in_run_values_are_sums_over_the_steps_that_drew_the_row(tmp_path):
    *_, once = in_run(tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=1e-9)
    *_, thrice = in_run(tmp_path, per_device_train_batch_size=2, num_train_epochs=3, learning_rate=1e-9)
    assert relative(thrice.pairwise, 3 * once.pairwise) < 1e-5


def test_in_run_values_refuse_a_row_that_they_do_not_know():
    model, rows = lora_model(), build_rows(2)
    callback = baselines.InRunShapleyCallback(rows[:1], rows)
    callback.on_train_begin(None, None, None, model=model)
    with pytest.raises(ValueError, match="none of the rows"):
        model.train()(**collate(rows))
    callback.on_train_end(None, None, None)
    model(**collate(rows))


# ---- no model ----


def test_tfidf_is_one_for_the_same_text_and_zero_without_a_common_word():
    scores = baselines.tfidf(["red cat", "blue dog"], ["red cat"])
    assert scores[:, 0].tolist() == pytest.approx([1, 0])


def test_random_scores_are_the_same_for_a_seed():
    assert torch.equal(baselines.random_scores(3, 2, seed=1), baselines.random_scores(3, 2, seed=1))
    assert not torch.equal(baselines.random_scores(3, 2, seed=1), baselines.random_scores(3, 2, seed=2))


@pytest.mark.newest  # transformers 4 imports sklearn itself
def test_the_package_does_not_import_the_baselines():
    code = (
        "import sys, forvalue_callbacks as f; [getattr(f, n) for n in f.__all__];"
        "sys.exit(any(m.startswith('forvalue_callbacks.baselines') or m.startswith('sklearn') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- rows with images ----


def test_per_sample_gradients_and_embeddings_of_rows_with_an_image_each():
    """LoRA in the vision tower too, whose last layer Llava does not read."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlavaConfig(
        text_config={**text, "num_hidden_layers": 2, "num_attention_heads": 4},
        vision_config={**vision, "image_size": 8, "patch_size": 4, "num_attention_heads": 2},
        image_token_index=66,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).double()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    rows = []
    for length in (5, 7, 4):
        ids = [66] * 4 + torch.randint(3, 60, (length,)).tolist()
        labels = [-100] * 6 + ids[6:]
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, 8, 8, dtype=torch.float64)})

    def by_backward(row):
        model.zero_grad()
        pixels = row["pixel_values"][None]
        logits = model(input_ids=torch.tensor([row["input_ids"]]), pixel_values=pixels).logits
        labels = torch.tensor(row["labels"])[1:]
        keep = labels != -100
        log_p = logits[0, :-1][keep].log_softmax(-1).gather(1, labels[keep][:, None])
        log_p.sum().backward()
        return {n.removesuffix(".weight"): p.grad for n, p in model.named_parameters() if p.grad is not None}

    got = baselines.gradients(model, rows)
    assert any("vision" in name for name in got)
    for i, row in enumerate(rows):
        want = by_backward(row)
        for name, value in got.items():
            torch.testing.assert_close(value[i], want.get(name, torch.zeros_like(value[i])), rtol=1e-8, atol=1e-10)
    emb = baselines.emb(model, rows, rows)
    other = [{**rows[0], "pixel_values": -rows[0]["pixel_values"]}, *rows[1:]]
    assert not torch.isclose(emb[0, 0], baselines.emb(model, other, other)[0, 0]), "the image counts"
    torch.testing.assert_close(emb[1:, 1:], baselines.emb(model, other, other)[1:, 1:])
