"""Classifiers of sequences and of tokens, against autograd through the model's own loss."""

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from forvalue_callbacks.data.classification import sequence_segment, token_segment
from forvalue_callbacks.data.reasons import UnscorableError
from forvalue_callbacks.model.backbone import Backbone
from helpers.kinds import CLASSES, CLASSIFIERS, GPT2, TEXT, TOKEN, classifier
from helpers.models import VOCAB
from helpers.oracles import relative
from helpers.trained import label_gradient, segment_gradients


def build_batches(name, n=4):
    """Batches of one, as a collator makes them; padding tokens may stand within a row and end it."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for k in range(n):
        ids = torch.randint(3, VOCAB, (1, 4 + 3 * k), generator=generator)
        ids[0, 2] = 0
        if k == 1:
            ids[0, -1] = 0
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name in TOKEN:
            batch["labels"] = torch.randint(0, CLASSES, ids.shape, generator=generator)
            batch["labels"][0, ::2] = -100
        else:
            batch["labels"] = torch.randint(0, CLASSES, (1,), generator=generator)
        batches.append(batch)
    return batches


def segments_of(name, batches):
    make = token_segment if name in TOKEN else sequence_segment
    return [make(batch, CLASSES) for batch in batches]


def padded(segments):
    """One batch, padded on the right, with a token that is not padding to the model."""
    fills = {"input_ids": 7, "attention_mask": 0}
    return {
        name: nn.utils.rnn.pad_sequence(
            [segment.inputs[name][0] for segment in segments], batch_first=True, padding_value=fill
        )
        for name, fill in fills.items()
    }


def is_autograd(model, name, parameter):
    backbone, batches = Backbone(model), build_batches(name)
    segments = segments_of(name, batches)
    backbone.check(segments[0].inputs)
    expected = [label_gradient(model, parameter, batch) for batch in batches]
    for batch in (None, padded(segments)):
        for found, wanted in zip(segment_gradients(backbone, segments, batch), expected, strict=True):
            assert relative(found, wanted) < 1e-10
    return backbone


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_gradients_are_those_of_the_loss_that_the_model_is_trained_by(name):
    backbone = is_autograd(classifier(name), name, f"{CLASSIFIERS[name][1]}.weight")
    assert backbone.kind == ("token classification" if name in TOKEN else "sequence classification")
    assert backbone.head().weight.shape == (CLASSES, 32)
    assert (backbone.head().scale, backbone.head().softcap) == (1.0, None)


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "RobertaForSequenceClassification"])
def test_the_head_is_the_last_map_where_others_have_as_many_outputs(name):
    backbone = is_autograd(classifier(name, num_labels=32), name, f"{CLASSIFIERS[name][1]}.weight")
    assert backbone.head().weight.shape == (32, 32)


def test_a_classifier_without_a_padding_token_takes_the_last_token_of_each_row():
    name = "GPT2ForSequenceClassification"
    is_autograd(classifier(name, settings=GPT2), name, "score.weight")


@pytest.mark.parametrize(
    ("name", "targets", "parameter"),
    [
        ("BertForSequenceClassification", ["query"], "classifier.modules_to_save.default.weight"),
        ("RobertaForSequenceClassification", ["query"], "classifier.modules_to_save.default.out_proj.weight"),
        ("LlamaForSequenceClassification", ["q_proj"], "score.modules_to_save.default.weight"),
        ("BertForTokenClassification", ["query"], "classifier.modules_to_save.default.weight"),
    ],
)
def test_a_head_that_is_trained_beside_an_adapter_is_the_copy_that_runs(name, targets, parameter):
    kind = "TOKEN_CLS" if name in TOKEN else "SEQ_CLS"
    lora = peft.LoraConfig(task_type=kind, r=4, target_modules=targets, init_lora_weights=False)
    plain = classifier(name)
    before = plain.get_parameter(f"{CLASSIFIERS[name][1]}.weight").detach().clone()
    model = peft.get_peft_model(plain, lora).double().eval()
    parameter = f"base_model.model.{parameter}"
    with torch.no_grad():
        model.get_parameter(parameter).normal_(std=0.5)
    backbone = is_autograd(model, name, parameter)
    assert torch.equal(backbone.head().weight, model.get_parameter(parameter))
    with model.disable_adapter():
        assert torch.equal(backbone.head().weight, before)


def test_an_adapter_on_the_head_is_part_of_it():
    name = "LlamaForSequenceClassification"
    lora = peft.LoraConfig(r=4, target_modules=["score"], init_lora_weights=False)
    plain = classifier(name)
    model = peft.get_peft_model(plain, lora).double().eval()
    backbone, segment = Backbone(model), segments_of(name, build_batches(name))[2]
    backbone.check(segment.inputs)
    with torch.no_grad():
        own, hidden = model(**segment.inputs).logits, backbone.hidden_states(segment.inputs)
    assert torch.allclose(backbone.head().logits(hidden[0]), own, rtol=0, atol=1e-12)
    assert not torch.allclose(backbone.head().weight, classifier(name).score.weight)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_check_holds_in_any_precision_and_for_two_classes(name, dtype, seed):
    model = classifier(name, dtype, num_labels=2)
    with torch.no_grad():
        model.get_parameter(f"{CLASSIFIERS[name][1]}.weight").normal_(generator=torch.Generator().manual_seed(seed))
    backbone = Backbone(model)
    backbone.check(segments_of(name, build_batches(name))[2].inputs)
    assert backbone.head().vocab_size == 2


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_check_holds_under_autocast(name):
    Backbone(classifier(name, torch.float32), dtype="bfloat16").check(segments_of(name, build_batches(name))[2].inputs)


def test_a_cap_that_a_classifier_does_not_apply_is_not_seen_in_an_overflow_of_half_precision():
    model = classifier("Gemma2ForSequenceClassification", torch.float16)
    with torch.no_grad():  # logits far smaller than the inputs of the head
        model.score.weight.normal_(std=0.01)
        model.model.norm.weight.fill_(2.0)
    backbone = Backbone(model)
    backbone.check(build_batches("Gemma2ForSequenceClassification")[2])
    assert (backbone.head().scale, backbone.head().softcap) == (1.0, None)


class Twisted(transformers.BertForSequenceClassification):
    """Something else behind the last linear map."""

    def forward(self, input_ids, attention_mask=None):
        return SequenceClassifierOutput(logits=super().forward(input_ids, attention_mask).logits.sin())


class Averaged(transformers.LlamaForSequenceClassification):
    """The mean of the logits of all tokens."""

    def forward(self, input_ids, attention_mask=None):
        return SequenceClassifierOutput(logits=self.score(self.model(input_ids).last_hidden_state).mean(1))


class Bilinear(transformers.BertForSequenceClassification):
    """No linear map onto the classes."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Bilinear(32, 32, CLASSES)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("BertForTokenClassification", {"num_labels": 1}, r"predicts a number \(num_labels=1"),
        ("BertForSequenceClassification", {"problem_type": "regression"}, "predicts a number .*'regression'"),
        (
            "RobertaForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            "problem_type='multi_label_classification'",
        ),
        (Twisted, {}, "cannot describe the output head"),
        (Averaged, {}, "does not take the logits of one token"),
        (Bilinear, {}, f"no linear map onto its {CLASSES} classes"),
        ("BertForQuestionAnswering", {}, "no output embeddings"),
    ],
)
def test_what_does_not_choose_a_class_by_one_linear_map_is_refused_by_name(model, changes, message):
    torch.manual_seed(0)
    model = getattr(transformers, model) if isinstance(model, str) else model
    model = model(model.config_class(**{**TEXT, "num_labels": CLASSES, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*{message}"):
        Backbone(model).check({"input_ids": torch.arange(3, 9)[None]})


def test_places_before_the_first_token_are_not_counted_among_those_a_model_takes():
    limit = Backbone(classifier("RobertaForSequenceClassification", torch.float32)).max_positions
    assert limit == 63
    model = classifier("RobertaForSequenceClassification", torch.float32)
    with torch.no_grad():
        assert Backbone(model).hidden_states({"input_ids": torch.full((1, 63), 5)}).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            Backbone(model).hidden_states({"input_ids": torch.full((1, 64), 5)})
    assert Backbone(classifier("BertForSequenceClassification", torch.float32)).max_positions == 64
    assert Backbone(classifier("LlamaForSequenceClassification", torch.float32)).max_positions is None


def test_a_class_is_one_position_of_a_row_and_is_read_in_either_spelling():
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "token_type_ids": torch.tensor([[0, 0, 1]])}
    for labels in ({"labels": torch.tensor([2])}, {"label": 2}, {"labels": torch.tensor([[2]])}):
        segment = sequence_segment({**inputs, **labels}, CLASSES)
        assert (segment.at.tolist(), segment.target.tolist()) == ([0], [2])
        assert segment.inputs.keys() == inputs.keys()


def test_a_class_of_a_token_is_predicted_where_the_token_is():
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[-100, 1, -100, 4]])}
    segment = token_segment(batch, CLASSES)
    assert (segment.at.tolist(), segment.target.tolist()) == ([1, 3], [1, 4])
    assert segment.inputs.keys() == {"input_ids"}


@pytest.mark.parametrize(
    ("make", "labels", "reason"),
    [
        (sequence_segment, [0.5], "floating-point"),
        (sequence_segment, [[0, 1, 1]], r"'labels' of shape \(1, 3\)"),
        (sequence_segment, [CLASSES], f"label {CLASSES} in 'labels', but .* 0 to {CLASSES - 1}"),
        (sequence_segment, [-100], "no labels"),
        (sequence_segment, None, "no 'labels'"),
        (sequence_segment, "spam", "no tensor"),
        (token_segment, [[1, 2]], r"'labels' of shape \(1, 2\)"),
        (token_segment, [1, 2, 3], r"'labels' of shape \(3,\)"),
        (token_segment, [[-100, -100, -100]], "no labels"),
        (token_segment, [[0, -2, 0]], "label -2"),
    ],
)
def test_a_row_without_a_class_has_a_reason(make, labels, reason):
    with pytest.raises(UnscorableError, match=reason):
        make({"input_ids": torch.tensor([[3, 4, 5]]), "labels": labels}, CLASSES)
