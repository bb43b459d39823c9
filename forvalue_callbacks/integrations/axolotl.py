"""axolotl: `plugins: [forvalue_callbacks.integrations.axolotl.ForValuePlugin]` in its YAML.

The clean rows are its `test_datasets`. `forvalue: {method: auto, policy: drop:auto}` says how rows are scored and
which are left out; both have the defaults of `ForValueCallback`. Rows leave before they are packed (`sample_packing`).
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, model_validator

from ..config import ForValueConfig
from ..policies import as_policy
from ..trainer.evaluation import EVAL
from ..trainer.prefilter import prefilter
from ..trainer.refusals import refuse_policy


class ForValueSettings(BaseModel):
    """What stands under `forvalue:`."""

    model_config = ConfigDict(extra="forbid")

    method: str = ForValueConfig().method
    policy: str = str(as_policy(None))

    @model_validator(mode="after")
    def check(self) -> ForValueSettings:
        refuse_policy(as_policy(self.policy), ForValueConfig(method=self.method).gives_log_odds)
        return self


class ForValueArgs(BaseModel):
    """The key `forvalue` of axolotl's YAML."""

    forvalue: ForValueSettings = ForValueSettings()

    @model_validator(mode="before")
    @classmethod
    def check_test_datasets(cls, data: Any) -> Any:
        if not data.get("test_datasets"):
            raise ValueError(
                "ForValuePlugin needs clean rows: name them as test_datasets (val_set_size takes rows as they come)."
            )
        return data


class ForValuePlugin(BasePlugin):
    """Scores the training rows by the test rows, and leaves those out that the policy drops."""

    def get_input_args(self) -> str:
        return f"{__name__}.{ForValueArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        prefilter(trainer, EVAL, cfg.forvalue.policy, ForValueConfig(method=cfg.forvalue.method))
        if not cfg.max_steps:
            trainer.args.max_steps = -1  # axolotl has put the steps of all rows there: now those of num_epochs
