"""A small byte-level BPE tokenizer built in code, with ChatML-like templates with and without generation markers."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"

# The tools and the `shout` argument are there to show that they reach the template.
_CHATML = """
{%- if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}
{%- if shout %}<|im_start|>shout<|im_end|>{% endif %}
{%- for message in messages %}
    {%- if message.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{GENERATION}{{ message.content + '<|im_end|>' }}{ENDGENERATION}{{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n{THOUGHT}' }}{% endif %}"""


def chatml(*, markers: bool = False, thought: str = "") -> str:
    """A chat template; `thought` ends the generation prompt and is left out where the answer is known."""
    return (
        _CHATML.replace("{GENERATION}", "{% generation %}" if markers else "")
        .replace("{ENDGENERATION}", "{% endgeneration %}" if markers else "")
        .replace("{THOUGHT}", thought)
    )


def build_tokenizer(chat_template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """About 300 tokens. `bos` puts a BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the sky is blue", "what is the sky", "it is blue today", "blueberry pie", "user assistant system"] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            min_frequency=2,
            special_tokens=[PAD, BOS, EOS, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=6,
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=chat_template,
        model_max_length=100_000,
    )
