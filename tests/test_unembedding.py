"""The head is described as it computes, under adapters and in any precision, or refused by name."""

import warnings

import accelerate
import numpy as np
import peft
import pytest
import torch
from torch import nn

from forvalue_callbacks import ForValueScorer
from forvalue_callbacks.model.backbone import Backbone
from forvalue_callbacks.model.unembedding import linear_map
from helpers.models import ARCHITECTURES, batch, build_model, build_rows
from helpers.oracles import row_gradient


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_rebuilt_for_every_architecture(architecture, padding):
    backbone = Backbone(build_model(architecture))
    backbone.check(batch(padding))
    head = backbone.head()
    assert (head.softcap is not None) == ("softcap" in architecture)
    assert (head.scale != 1.0) == ("scal" in architecture)
    assert (head.bias is not None) == ("bias" in architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gemma2-softcap", "cohere-scale", "granite-scaling", "phi-bias"])
def test_a_head_described_without_its_transform_is_refused(architecture, dtype, monkeypatch):
    """The check itself is checked: forget the soft-cap, the scale or the bias, and it must refuse, in half precision
    too, where rounding explains more."""
    monkeypatch.setattr("forvalue_callbacks.model.check.seen_transform", lambda *_: (1.0, None))
    if architecture == "phi-bias":
        monkeypatch.setattr("forvalue_callbacks.model.backbone.linear_map", lambda *_: (linear_map(*_)[0], None))
    model = build_model(architecture, dtype)
    with pytest.raises(ValueError, match=type(model).__name__ + r".*cannot describe the output head"):
        Backbone(model).check(batch())


def lora(model, names, **options):
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, lora_dropout=0.5, **options)
    )


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2-softcap", "phi-bias"])
def test_adapters_count_wherever_they_sit(architecture):
    plain = build_model(architecture)
    without = Backbone(plain).head().weight.clone()
    model = lora(plain, ["q_proj", "lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj", "lm_head"], init_lora_weights=False))
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        backbone = Backbone(model)
        backbone.check(batch())
        assert not torch.equal(backbone.head().weight, without)
    with model.disable_adapter():
        Backbone(model).check(batch())
        assert torch.equal(Backbone(model).head().weight, without)
    model.merge_adapter()
    Backbone(model).check(batch())


def test_a_head_kept_whole_by_modules_to_save_is_the_trained_copy():
    model = peft.get_peft_model(
        build_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.add_(1.0)
    backbone = Backbone(model)
    backbone.check(batch())
    assert float((backbone.head().weight - build_model().lm_head.weight).detach().mean()) == pytest.approx(
        1.0, abs=1e-4
    )


def test_what_cannot_be_described_is_refused_by_name():
    prompt_tuned = peft.get_peft_model(
        build_model(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*Prompt-learning"):
        Backbone(prompt_tuned).check(batch())
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        Backbone(build_model().model)
    odd = build_model()
    odd.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*cannot describe"):
        Backbone(odd).check(batch())


def test_half_precision_and_autocast_pass_the_check():
    Backbone(build_model(dtype=torch.bfloat16)).check(batch())
    Backbone(build_model(), dtype="bfloat16").check(batch())


def test_the_oracle_sees_a_dropped_softcap():
    """An oracle is trusted after it was seen to fail: gradients with and without the soft-cap differ."""
    row = build_rows(1)[0]
    model = build_model("gemma2-softcap", torch.float64)
    with_cap = row_gradient(model, row)
    model.config.final_logit_softcapping = None
    assert float((row_gradient(model, row) - with_cap).abs().max() / with_cap.abs().max()) > 1e-2


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True, init_lora_weights=False),
    "lora bias": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True, init_lora_weights=False),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], use_rslora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], init_ia3_weights=False),
    "ia3 on inputs": lambda: peft.IA3Config(
        target_modules=["lm_head"], feedforward_modules=["lm_head"], init_ia3_weights=False
    ),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["lm_head"], init_weights=False),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["lm_head"], init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["lm_head"], init_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_head_under_any_linear_adapter_scores_as_the_merged_one_does(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():  # peft's, of kinds of adapters
        warnings.simplefilter("ignore")
        architecture = "phi-bias" if "bias" in kind else "llama"  # peft merges a bias into a bias only
        model = peft.get_peft_model(build_model(architecture, torch.float64), ADAPTERS[kind]()).double().eval()
    rows = build_rows(6)
    before = build_model(architecture, torch.float64).lm_head.weight
    scorer = ForValueScorer(model, rows[3:], progress=False)
    values = scorer.score(rows[:3]).values
    assert not torch.allclose(scorer.backbone.head().weight, before)
    ids = torch.tensor(rows[0]["input_ids"])[None]
    with torch.no_grad():
        own, hidden = model(input_ids=ids).logits, scorer.backbone.hidden_states({"input_ids": ids})
    assert torch.allclose(
        scorer.backbone.head().logits(hidden[0]), own[0], rtol=0, atol=1e-13 * float(own.abs().max())
    )
    merged = model.merge_and_unload().eval()
    expected = ForValueScorer(merged, rows[3:], progress=False).score(rows[:3]).values
    assert np.abs(values - expected).max() <= 1e-12 * np.abs(expected).max()


def test_an_adapter_that_is_not_linear_is_refused_by_name():
    model = peft.get_peft_model(
        build_model(), peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True, init_lora_weights=False)
    )
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output**2)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: adapter \['default'\] on the output head.*Merge it"):
        Backbone(model)


def test_an_offloaded_head_under_an_adapter_is_read_without_dropout():
    lora = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(0)
    plain = peft.get_peft_model(build_model(), lora)
    torch.manual_seed(0)
    offloaded = peft.get_peft_model(build_model(), lora).train()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    rows = build_rows(6)
    values = ForValueScorer(offloaded, rows[3:], progress=False).score(rows[:3]).values
    expected = ForValueScorer(plain, rows[3:], progress=False).score(rows[:3]).values
    assert np.abs(values - expected).max() < 1e-5 * np.abs(expected).max()


class Quantised(torch.Tensor):
    """As torchao's: it says that it is floating-point."""


def test_a_quantised_head_is_refused_by_name_and_weights_that_are_nowhere_too():
    model = build_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.as_subclass(Quantised), requires_grad=False)
    for refused in (model, build_model().to("meta")):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM: the output head Linear has no dense.*quantised"):
            Backbone(refused)
