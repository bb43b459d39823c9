"""Tiny models that read images, with the processors of their families, built in code, and rows for them."""

import json

import numpy as np
import torch
import transformers
from PIL import Image

from helpers.tokenizers import build_tokenizer

_TEMPLATE = """
{%- macro said(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}{%- for part in content or [] %}{{- IMAGE if part.type == 'image' else part.text }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro called(message) %}{%- for call in message.tool_calls or [] %}{{- call | tojson }}{%- endfor %}{% endmacro %}
{%- if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ said(message.content) + called(message) + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}{{- said(message.content) + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1}
_TEXT |= {"eos_token_id": 2}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ANSWERS = ["the sky is blue", "it is blue today", "blueberry pie", "pie", "the sky the sky is blue today"]
# What stands in a text where an image belongs.
PLACES = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "mllama": "<|image|>",
}


def _tokenizer(*special, **named):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def with_template(processing_class, place=""):
    """A tokenizer or processor with a chat template of ours; `place` is what stands where an image belongs."""
    processing_class.chat_template = _TEMPLATE.replace("IMAGE", json.dumps(place))
    return processing_class


def _llava():
    tokenizer = _tokenizer("<image>")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT, "vocab_size": len(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": 8, "patch_size": 4},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return processor, transformers.LlavaForConditionalGeneration(config)


def _qwen_processor(cls):
    class WithoutVideos(cls):
        """Videos need torchvision, which tests do without."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template)

    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=512
    )
    return WithoutVideos(images, tokenizer)


def _qwen_tokens(tokenizer):
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}


def _qwen2_5_vl():
    processor = _qwen_processor(transformers.Qwen2_5_VLProcessor)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "vocab_size": len(processor.tokenizer), "rope_parameters": rope},
        vision_config=vision,
        **_qwen_tokens(processor.tokenizer),
    )
    return processor, transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl():
    processor = _qwen_processor(transformers.Qwen3VLProcessor)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "vocab_size": len(processor.tokenizer), "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [0]},
        **_qwen_tokens(processor.tokenizer),
    )
    return processor, transformers.Qwen3VLForConditionalGeneration(config)


def _gemma3():
    names = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(*names.values(), **names)
    images = transformers.Gemma3ImageProcessor(size={"height": 8, "width": 8})
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 8, "sliding_window": 16, "vocab_size": len(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return processor, transformers.Gemma3ForConditionalGeneration(config)


def _idefics3():
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **_TEXT, "vocab_size": len(tokenizer)},
        vision_config={**_VISION, "image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return processor, transformers.Idefics3ForConditionalGeneration(config)


def _smolvlm():
    """Its own processor spells numbers of frames with num2words and reads videos with torchvision: for images it does
    what that of Idefics3 does."""
    processor, other = _idefics3()
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **_TEXT, "vocab_size": len(processor.tokenizer)},
        vision_config={**_VISION, "image_size": 16, "patch_size": 4},
        image_token_id=other.config.image_token_id,
        scale_factor=2,
    )
    return processor, transformers.SmolVLMForConditionalGeneration(config)


def _mllama():
    tokenizer = _tokenizer("<|python_tag|>", "<|image|>")  # the image's token comes after those of the head
    images = transformers.MllamaImageProcessor(size={"height": 8, "width": 8}, max_image_tiles=2)
    processor = transformers.MllamaProcessor(images, tokenizer)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    config = transformers.MllamaConfig(
        text_config={**_TEXT, "vocab_size": len(tokenizer) - 1, "cross_attention_layers": [1]},
        vision_config=vision,
        image_token_index=processor.image_token_id,
    )
    return processor, transformers.MllamaForConditionalGeneration(config)


def build_vlm(family, dtype=torch.float32):
    """A model of a few ten thousand parameters, and its family's own processor with a chat template of ours."""
    torch.manual_seed(0)
    processor, model = globals()[f"_{family}"]()
    with_template(processor, PLACES[family])
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):  # Mllama's images count for nothing before it is trained
                parameter.fill_(0.5)
    return model.to(dtype).eval(), processor


def build_listener(dtype=torch.float32):
    """The same of a model that hears: Qwen2-Audio, of one second."""
    torch.manual_seed(0)
    tokenizer = _tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    features = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    audio = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 16, "max_source_positions": 50, "model_type": "qwen2_audio_encoder"}
    config = transformers.Qwen2AudioConfig(
        audio_config=audio,
        text_config={"model_type": "qwen2", **_TEXT, "vocab_size": len(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model.to(dtype).eval(), transformers.Qwen2AudioProcessor(features, tokenizer)


def pictures(n, seed=0):
    """Images of random colours and of several sizes."""
    rng = np.random.default_rng(seed)
    sizes = [(16, 16), (12, 20), (20, 12)]
    return [Image.fromarray(rng.integers(0, 255, (*sizes[i % 3], 3), dtype=np.uint8)) for i in range(n)]


def turn(role, content):
    return {"role": role, "content": content}


def image_rows(family, form, counts, seed=0):
    """Rows of mixed lengths with so many images each, every second one with several turns."""
    images, rows = iter(pictures(sum(counts), seed)), []
    for i, n in enumerate(counts):
        asked, answer = "what is the sky " * (1 + i % 3), ANSWERS[(i + seed) % len(ANSWERS)]
        first, last = turn("user", asked), turn("assistant", answer)
        more = [turn("assistant", "pie"), turn("user", "and today")] if i % 2 else []
        if form == "messages":
            row = {"messages": [turn("system", "user assistant"), first, *more, last]}
        elif form == "pairs":
            row = {"prompt": PLACES[family] * n + asked, "completion": " " + answer}
        else:
            row = {"prompt": [first, *more], "completion": [last]}
        rows.append({"images": [next(images) for _ in range(n)], **row})
    return rows
