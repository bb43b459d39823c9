"""Scores as an object: keep them, read them, ask which validation rows and which tokens they come from."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks import TINY_MODEL, Drop, ForValueConfig, ForValueScorer, ForValueScores
from forvalue_callbacks.tiny import instructions

train, validation = instructions(200, seed=0, noise=0.2), instructions(50, seed=1)
model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_MODEL), AutoTokenizer.from_pretrained(TINY_MODEL)
scorer = ForValueScorer(model, validation, ForValueConfig(normalize="length"), processing_class=tokenizer)
scores = scorer.score(train)
scores.save("outputs/example_3.parquet")
print(ForValueScores.load("outputs/example_3.parquet").summary())

# Weights without any trainer: a fifth of each task dropped, so that no task is emptied.
weights = Drop(0.2, group_column="task")(scores.values, train["task"])
print(f"{int((weights > 0).sum())} of {len(train)} rows kept")

pairs = ForValueScorer(model, validation, processing_class=tokenizer).pairwise(train.select(range(3)))
for row, best in zip(train, pairs.argmax(1).tolist(), strict=False):
    print(f"{row['prompt'][-50:]!r} helps most with {validation[best]['prompt'][-50:]!r}")
