"""Models whose body, factor or cap is not where the config says: scores by autograd, or a refusal by name."""

import warnings

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.model.backbone import Backbone, left_as_found
from helpers.answers import rows_of
from helpers.models import VOCAB, batch, build_model, build_rows
from helpers.oracles import row_gradient

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    **{key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")},
    "model_type": "opt",
    "ffn_dim": 48,
    "num_hidden_layers": 1,
    "word_embed_proj_dim": 32,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CLIP, SIGLIP = {**VISION, "model_type": "clip_vision_model"}, {**VISION, "model_type": "siglip_vision_model"}
QFORMER = {**VISION, "vocab_size": VOCAB}
SMALL_STATE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
IMAGE = VOCAB - 1
COHERE = {**TEXT, "model_type": "cohere2", "logit_scale": 0.25, "head_dim": 8}
FAMILIES = {  # name of the model -> settings of its config
    "llava around gemma 2": (
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 2.0}},
    ),
    "llava around granite": (
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "granite", "logits_scaling": 4.0}},
    ),
    "aya vision": ("AyaVisionForConditionalGeneration", {"text_config": COHERE, "vision_config": SIGLIP}),
    "command a vision": ("Cohere2VisionForConditionalGeneration", {"text_config": COHERE, "vision_config": SIGLIP}),
    "recurrent gemma": (
        "RecurrentGemmaForCausalLM",
        {**TEXT, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "logits_soft_cap": 2.0},
    ),
    "llama 4": ("Llama4ForCausalLM", {**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}),
    "falcon h1": (
        "FalconH1ForCausalLM",
        {
            **TEXT,
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
        },
    ),
    "mamba": ("MambaForCausalLM", SMALL_STATE),
    "falcon mamba": ("FalconMambaForCausalLM", SMALL_STATE),
    "opt": ("OPTForCausalLM", OPT),
    "gpt-j": ("GPTJForCausalLM", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
    "blip 2": (
        "Blip2ForConditionalGeneration",
        {"text_config": OPT, "vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": 2},
    ),
    "instruct blip": (
        "InstructBlipForConditionalGeneration",
        {"text_config": OPT, "vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": 2},
    ),
}
# These compute some of their parts in float32, whatever their dtype.
ROUNDED = {"llama 4": 1e-7, "mamba": 2e-5, "falcon mamba": 2e-5, "gpt-j": 1e-6}


def build(family, dtype):
    name, settings = FAMILIES[family]
    model = getattr(transformers, name, None)
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    settings = dict(settings)
    if "text_config" in settings:
        settings = {"vision_config": CLIP, "image_token_index": IMAGE, "image_token_id": IMAGE, **settings}
    torch.manual_seed(0)
    model = model(model.config_class(**settings)).to(dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def with_image(family, rows):
    """The rows as the model takes them, and a collator where they need one."""
    if "blip" not in family:
        return rows, None
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": [IMAGE, IMAGE, *row["input_ids"]],
            "labels": [-100, -100, *row["labels"]],
            "pixel_values": torch.randn(3, 8, 8, generator=generator).tolist(),
        }
        for row in rows
    ]

    def collate(examples):
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(key, value):
            return torch.tensor([e[key] + [value] * (longest - len(e[key])) for e in examples])

        batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
        batch["attention_mask"] = torch.tensor(
            [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
        )
        batch["pixel_values"] = torch.tensor([e["pixel_values"] for e in examples], dtype=torch.float64)
        if family == "instruct blip":
            batch["qformer_input_ids"] = torch.full((len(examples), 2), 5)
        return batch

    return rows, collate


def gradient(model, family, row):
    inputs = {}
    if "pixel_values" in row:
        inputs["pixel_values"] = torch.tensor(row["pixel_values"], dtype=torch.float64)[None]
    if family == "instruct blip":
        inputs["qformer_input_ids"] = torch.full((1, 2), 5)
    return row_gradient(model, row, **inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_autograd_wherever_the_head_gets_its_input(family):
    model = build(family, torch.float64)
    rows, collate = with_image(family, build_rows(6, vocab=IMAGE))
    scored, validation = rows[:3], rows[3:]
    values = ForValueScorer(model, validation, data_collator=collate, progress=False).score(scored).values
    direction = torch.stack([gradient(model, family, row) for row in validation]).mean(0)
    expected = np.array([float((direction * gradient(model, family, row)).sum()) for row in scored])
    assert np.abs(values - expected).max() <= ROUNDED.get(family, 1e-12) * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mamba", "falcon mamba", "recurrent gemma", "aya vision", "llama 4"])
def test_the_head_is_seen_as_well_in_half_precision(family, dtype):
    expected, found = Backbone(build(family, torch.float64)), Backbone(build(family, dtype))
    for backbone in (expected, found):
        backbone.check({"input_ids": torch.arange(3, 20)[None]})
    assert (found.head().scale, found.head().softcap) == (expected.head().scale, expected.head().softcap)
    assert found.runs_whole_model == expected.runs_whole_model


class OwnModel(transformers.PreTrainedModel):
    """A user's own class: a norm that its body does not apply, a factor and a cap that no config names."""

    config_class = transformers.LlamaConfig
    base_model_prefix = "body"

    def __init__(self, config, factor=0.3, cap=7.0):
        super().__init__(config)
        self.body = transformers.LlamaModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.factor, self.cap = factor, cap
        self.post_init()

    def get_output_embeddings(self):
        return self.out

    def get_input_embeddings(self):
        return self.body.embed_tokens

    def forward(self, input_ids, attention_mask=None):
        hidden = self.norm(self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        logits = self.out(hidden) * self.factor
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (0.3, None), (0.3, 7.0), (1.0, 7.0)])
def test_a_class_of_ones_own_is_understood_by_what_it_computes(factor, cap):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=False)
    model = OwnModel(config, factor, cap).double().eval()
    with torch.no_grad():
        model.out.weight.normal_(std=2.0)
    rows = build_rows(6)
    scorer = ForValueScorer(model, rows[3:], progress=False)
    values = scorer.score(rows[:3]).values
    direction = torch.stack([row_gradient(model, row) for row in rows[3:]]).mean(0)
    expected = np.array([float((direction * row_gradient(model, row)).sum()) for row in rows[:3]])
    assert np.abs(values - expected).max() <= 1e-9 * np.abs(expected).max()
    assert scorer.backbone.runs_whole_model


NOT_CAUSAL = {
    "BertForMaskedLM": {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "XLMWithLMHeadModel": {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 1, "n_heads": 2},
    "CpmAntForCausalLM": {
        "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64,
        "num_hidden_layers": 1,
    },
    "PaliGemmaForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8}, "vision_config": SIGLIP,
        "image_token_index": IMAGE, "projection_dim": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_reads_later_tokens_is_refused_by_name(name, dtype):
    torch.manual_seed(0)
    model = getattr(transformers, name)
    model = model(model.config_class(**NOT_CAUSAL[name])).to(dtype)
    rows = build_rows(8, vocab=IMAGE, longest=30)
    with pytest.raises(ValueError, match=f"{name} reads later tokens"):
        ForValueScorer(model, rows[2:], progress=False).score(rows[:2])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Qwen2VLForConditionalGeneration", {}), ("Qwen2_5_VLForConditionalGeneration", {"out_hidden_size": 32})],
)
def test_left_padding_does_not_move_the_places_of_an_image(name, settings):
    """M-RoPE models make positions of three dimensions themselves, of ids, mask and grids."""
    model = getattr(transformers, name)
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16 if settings else 32, "num_heads": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 1, "temporal_patch_size": 1, "intermediate_size": 16, **settings}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": IMAGE - 1, "vision_end_token_id": IMAGE - 2}
    text = {**TEXT, "rope_scaling": rope}
    model = model(
        model.config_class(text_config=text, vision_config=vision, video_token_id=IMAGE - 3, **tokens)
    ).eval()
    row = torch.tensor([5, IMAGE - 1, *[IMAGE] * 6, IMAGE - 2, 7, 8, 9])[None]
    image = {"pixel_values": torch.randn(6, 48), "image_grid_thw": torch.tensor([[1, 2, 3]])}
    image["mm_token_type_ids"] = (row == IMAGE).int()
    backbone = Backbone(model)
    with torch.no_grad():
        bare = backbone.hidden_states({"input_ids": row, "attention_mask": torch.ones_like(row), **image})
        padded = {"input_ids": nn.functional.pad(row, (4, 0)), **image}
        padded["attention_mask"] = nn.functional.pad(torch.ones_like(row), (4, 0))
        padded["mm_token_type_ids"] = nn.functional.pad(image["mm_token_type_ids"], (4, 0))
        left = backbone.hidden_states(padded)[:, 4:]
        flat = model.base_model(
            **padded, position_ids=(padded["attention_mask"].cumsum(-1) - 1).clamp(min=0), use_cache=False
        ).last_hidden_state[:, 4:]
        backbone.check(padded)  # which changes later tokens, and leaves the image its place
    assert float((left - bare).abs().max()) < 1e-5
    assert float((flat - bare).abs().max()) > 1e-3, "the fault is seen"


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_are_kept(how, tmp_path):
    rows = build_rows(8)
    expected = ForValueScorer(build_model(), rows[4:], progress=False).score(rows[:4]).values
    model, device = build_model(), torch.device("cpu")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=device)
    assert model.lm_head.weight.is_meta
    values = ForValueScorer(model, rows[4:], progress=False).score(rows[:4]).values
    assert np.array_equal(values, expected)
    assert model.lm_head.weight.is_meta


@pytest.mark.parametrize("method", ["auto", "label_model"])
def test_a_device_map_that_puts_layers_and_head_on_disk_changes_no_score(method, tmp_path):
    clean, noisy = rows_of(40, 1)[0], rows_of(40, 2, 0.3)[0]
    config = ForValueConfig(method)
    expected = ForValueScorer(build_model(), clean, config, progress=False).score(noisy).values
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = accelerate.dispatch_model(
        build_model(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert np.array_equal(ForValueScorer(model, clean, config, progress=False).score(noisy).values, expected)
    assert model.lm_head.weight.is_meta
    assert np.nanstd(expected) > 0


def test_weights_that_zero_3_has_shared_out_are_refused_where_no_engine_gathers_them():
    model = build_model()
    for parameter in model.parameters():  # as zero.Init leaves them
        parameter.data = torch.empty(0)
        parameter.ds_id = 0
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: DeepSpeed ZeRO-3 .* no engine .*Use ForValueCallback"):
        ForValueScorer(model, build_rows(8), progress=False)


def test_wrappers_are_looked_through_however_they_are_nested():
    rows = build_rows(6)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = peft.get_peft_model(build_model(), lora)
    expected = ForValueScorer(plain, rows[3:], progress=False).score(rows[:3]).values
    with warnings.catch_warnings():  # torch's own, of its import of what compiles
        warnings.simplefilter("ignore")
        compiled = torch.compile(plain)
    values = ForValueScorer(compiled, rows[3:], progress=False).score(rows[:3]).values
    assert np.array_equal(values, expected)


def test_only_tables_of_positions_limit_the_length_of_a_row():
    assert Backbone(build_model("llama")).max_positions is None
    assert Backbone(build_model("gpt2")).max_positions == 64
    assert Backbone(build("opt", torch.float32)).max_positions == 64
    ids = torch.randint(3, VOCAB, (1, 100))
    with torch.no_grad():
        assert Backbone(build_model("llama")).hidden_states({"input_ids": ids}).isfinite().all()


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
