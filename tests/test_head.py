import peft
import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, build_model, build_rows
from oracles import row_gradient

from forvalue_callbacks.model.backbone import Backbone, left_as_found
from forvalue_callbacks.model.unembedding import linear_map


def batch(padding="right"):
    torch.manual_seed(1)
    ids, mask = torch.randint(3, VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 3) if padding == "left" else slice(6, 9)] = 0
    return {"input_ids": ids, "attention_mask": mask}


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


def test_left_padding_gives_the_hidden_states_of_the_bare_row():
    """GPT-2 has learned absolute positions: without position ids a left-padded row would sit elsewhere."""
    for architecture in ("gpt2", "llama"):
        backbone, padded = Backbone(build_model(architecture)), batch("left")
        with torch.no_grad():
            bare = backbone.hidden_states({"input_ids": padded["input_ids"][:1, 3:]})
            assert torch.allclose(backbone.hidden_states(padded)[:1, 3:], bare, atol=1e-5)


def test_modes_are_restored_module_by_module():
    model = build_model().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with left_as_found(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == before


def test_the_oracle_sees_a_dropped_softcap():
    """An oracle is trusted after it was seen to fail: gradients with and without the soft-cap differ."""
    row = build_rows(1)[0]
    model = build_model("gemma2-softcap", torch.float64)
    with_cap = row_gradient(model, row)
    model.config.final_logit_softcapping = None
    assert float((row_gradient(model, row) - with_cap).abs().max() / with_cap.abs().max()) > 1e-2
