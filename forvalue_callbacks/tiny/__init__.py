"""A tiny pretrained language model that comes with the package, the made-up world it knows, and demo rows.

Nothing has to be downloaded: the model (about 2.6 million parameters, Llama architecture, 2,048 byte-level tokens)
was pretrained by `recipes/pretrain_tiny.py` on `pretraining_text`, and `instructions` gives rows to fine-tune it on.
It saw 256 tokens at a time: longer inputs work up to 512, but it predicts them badly (1.0 against 3.0 nats per token).

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    train_dataset = instructions(1_000, seed=0, noise=0.3)
    eval_dataset = instructions(300, seed=1)
"""

from pathlib import Path

from .demo import TASKS, instructions
from .pretraining import pretraining_text
from .words import INTENTS, MOODS, TOPICS, past, plural

TINY_MODEL: Path = Path(__file__).parent / "model"  # a folder for `from_pretrained`

__all__ = ["INTENTS", "MOODS", "TASKS", "TINY_MODEL", "TOPICS", "instructions", "past", "plural", "pretraining_text"]
