"""Encoder-decoders: positions of the decoder against autograd through the model's own loss of its labels."""

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import DataCollatorForSeq2Seq

from forvalue_callbacks.data.reasons import UnscorableError
from forvalue_callbacks.data.seq2seq import decoder_segment, shifted_right
from forvalue_callbacks.model.backbone import Backbone
from helpers.kinds import SEQ2SEQ, SIDES, seq2seq
from helpers.models import VOCAB
from helpers.oracles import relative
from helpers.trained import label_gradient, segment_gradients


def build_batches(family, n=3, dtype=torch.float64):
    """Batches of one, as a collator makes them: lengths of both sides differ, some labels are masked."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for k in range(n):
        source, target = 4 + 3 * k, 9 - 2 * k
        labels = torch.randint(3, VOCAB, (1, target), generator=generator)
        labels[0, 1] = -100
        if family == "whisper":
            batch = {"input_features": torch.randn(1, 8, 20, generator=generator, dtype=dtype)}
        else:
            batch = {"input_ids": torch.randint(3, VOCAB, (1, source), generator=generator)}
            batch["attention_mask"] = torch.ones(1, source, dtype=torch.long)
        batches.append({**batch, "labels": labels})
    return batches


def segments_of(backbone, batches):
    return [decoder_segment(batch, backbone.decoder_inputs, VOCAB) for batch in batches]


def padded(segments):
    """One batch of several, both sides padded on the right with what must not matter."""

    def stack(name, fill):
        rows = [segment.inputs[name][0] for segment in segments]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    fills = {"input_ids": 5, "attention_mask": 0, "decoder_input_ids": 7, "input_features": 0.0}
    return {name: stack(name, fills[name]) for name in segments[0].inputs}


def is_autograd(model, family, prefix=""):
    backbone, batches = Backbone(model), build_batches(family)
    assert backbone.kind == "seq2seq"
    segments = segments_of(backbone, batches)
    backbone.check(segments[0].inputs, batches[0]["labels"].clamp(min=-1))
    expected = [label_gradient(model, f"{prefix}{SEQ2SEQ[family][2]}.weight", batch) for batch in batches]
    for batch in (None, padded(segments)):
        for found, wanted in zip(segment_gradients(backbone, segments, batch), expected, strict=True):
            assert relative(found, wanted) < 1e-10
    return backbone


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_gradients_are_those_of_the_loss_that_the_model_is_trained_by(family):
    is_autograd(seq2seq(family), family)


def test_an_adapter_in_an_encoder_decoder_is_part_of_it():
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(seq2seq("t5"), lora).double().eval()
    with_adapter = is_autograd(model, "t5", "base_model.model.")
    inputs = segments_of(with_adapter, build_batches("t5"))[0].inputs
    with torch.no_grad():
        without = Backbone(seq2seq("t5")).hidden_states(inputs)
        assert not torch.allclose(with_adapter.hidden_states(inputs), without)


def test_a_bias_that_is_a_buffer_of_the_model_is_seen_and_must_be():
    model = seq2seq("bart")
    backbone = Backbone(model)
    inputs = segments_of(backbone, build_batches("bart"))[0].inputs
    assert torch.equal(backbone.head().bias, model.final_logits_bias[0])
    with torch.no_grad():
        own = model(**inputs).logits[0]
        assert torch.allclose(backbone.head().logits(backbone.hidden_states(inputs)[0]), own, rtol=0, atol=1e-12)
    bias = model.final_logits_bias.clone()
    model.final_logits_bias.zero_()
    model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    with pytest.raises(ValueError, match="BartForConditionalGeneration: cannot describe the output head"):
        Backbone(model).check(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_check_holds_in_any_precision(family, dtype):
    model = seq2seq(family, dtype)
    backbone = Backbone(model)
    backbone.check(segments_of(backbone, build_batches(family, dtype=dtype))[1].inputs)
    assert (backbone.head().scale, backbone.head().softcap) == (1.0, None)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_check_holds_under_autocast(family):
    backbone = Backbone(seq2seq(family, torch.float32), dtype="bfloat16")
    inputs = segments_of(backbone, build_batches(family, dtype=torch.float32))[0].inputs
    backbone.check(inputs)


class Peeking(transformers.BartForConditionalGeneration):
    """A decoder whose states hold something of all its inputs."""

    def __init__(self, config):
        super().__init__(config)
        self.model.decoder.layernorm_embedding.register_forward_hook(lambda module, args, out: out + out.mean(1, True))


def test_a_decoder_that_reads_later_tokens_is_refused_and_an_encoder_may():
    model = Peeking(transformers.BartConfig(**SIDES)).eval()
    backbone = Backbone(model)
    batch = build_batches("bart")[0]
    inputs = segments_of(backbone, [batch])[0].inputs
    for predicted in (None, batch["labels"].clamp(min=-1)):
        with pytest.raises(ValueError, match="Peeking reads later tokens"):
            backbone.check(inputs, predicted)
        Backbone(seq2seq("bart")).check(inputs, predicted)


def test_only_the_tables_of_the_decoder_limit_its_length():
    limits = {family: Backbone(seq2seq(family, torch.float32)).max_positions for family in SEQ2SEQ}
    assert limits == {"t5": None, "t5 untied": None, "bart": 64, "mbart": 64, "whisper": 24}


class Tokenizer:
    """As much of one as the collator asks for."""

    padding_side = "right"

    def pad(self, features, **kwargs):
        return {key: torch.tensor([feature[key] for feature in features]) for key in features[0]}


@pytest.mark.parametrize("family", ["t5", "bart", "mbart"])
def test_decoder_inputs_are_the_same_whether_the_collator_makes_them_or_the_model(family):
    model = seq2seq(family)
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9, 10, 11]}
    segments = []
    for maker in (model, None):
        collate = DataCollatorForSeq2Seq(Tokenizer(), model=maker, pad_to_multiple_of=6)
        batch = collate([dict(row)])
        assert ("decoder_input_ids" in batch) == (maker is not None)
        assert batch["labels"].tolist() == [[8, 9, 10, 11, -100, -100]]
        segments.append(decoder_segment(batch, Backbone(model).decoder_inputs, VOCAB))
    one, other = segments
    assert one.inputs["decoder_input_ids"].tolist() == other.inputs["decoder_input_ids"].tolist()
    assert "labels" not in one.inputs
    for segment in segments:
        assert segment.at.tolist() == [0, 1, 2, 3]
        assert segment.target.tolist() == [8, 9, 10, 11]


def test_labels_move_by_one_place_and_masked_ones_are_padding():
    assert shifted_right(torch.tensor([[7, -100, 9, 10]]), start=2, pad=0).tolist() == [[2, 7, 0, 9]]


def test_a_model_that_does_not_say_what_its_decoder_reads_is_refused_by_name():
    model = seq2seq("whisper")
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration: set decoder_start_token_id"):
        Backbone(model).decoder_inputs(torch.tensor([[7, 8]]))


def test_a_batch_without_decoder_inputs_is_refused_before_the_model_makes_its_own():
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration is an encoder-decoder.*decoder_input_ids"):
        Backbone(seq2seq("bart")).hidden_states({"input_ids": torch.tensor([[3, 4, 5]])})


@pytest.mark.parametrize(
    ("labels", "decoder", "reason"),
    [
        ([[-100, -100]], None, "no labels in 'labels' that are trained on"),
        ([[3, VOCAB]], None, f"label {VOCAB} in 'labels', but the model's head has outputs 0 to {VOCAB - 1}"),
        ([[3, -1]], None, "label -1 in 'labels'"),
        ([3, 4], None, r"'labels' of shape \(2,\)"),
        ([[3, 4], [5, 6]], None, r"'labels' of shape \(2, 2\)"),
        ([[3.0, 4.0]], None, "floating-point"),
        ([[3, 4]], [[2]], r"'decoder_input_ids' of shape \(1, 1\)"),
        (None, None, "no 'labels'"),
    ],
)
def test_a_row_that_predicts_nothing_has_a_reason(labels, decoder, reason):
    batch = {"input_ids": np.array([[3, 4, 5]]), "labels": labels, "decoder_input_ids": decoder}
    with pytest.raises(UnscorableError, match=reason):
        decoder_segment(batch, lambda labels: shifted_right(labels, 2, 0), VOCAB)
