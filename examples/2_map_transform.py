"""Without a trainer: add a `forvalue_score` column to a data set, look at it, filter on it."""

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks import TINY_MODEL, ForValueTransform
from forvalue_callbacks.tiny import instructions

train = instructions(400, seed=0, noise=0.2)
transform = ForValueTransform(
    AutoModelForCausalLM.from_pretrained(TINY_MODEL),
    instructions(100, seed=1),
    processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
)
scored = train.map(transform, batched=True)  # a second run is served from the cache of `datasets`
cut = np.nanquantile(scored["forvalue_score"], 0.2)
kept = scored.filter(lambda row: row["forvalue_score"] > cut)

for row in scored.sort("forvalue_score").select([0, 1, len(scored) - 2, len(scored) - 1]):
    print(f"{row['forvalue_score']:+9.2f}  {row['prompt'][-60:]!r} ->{row['completion']!r}")
print(f"{len(kept)} of {len(train)} rows kept")
