"""Any Hugging Face language model, VLM or classifier, PEFT included -> the inputs of its output head."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..core import Head, pair_head, working_dtype
from ..data.preference import inputs_of_sides
from .check import check
from .kinds import classifies, decoder_inputs, first_input, head_module, kind_of, logits_of, of_sequences
from .sharding import dtype_of, gathered, goes_again, holder_of, readable, refuse_shares, unwrapped
from .unembedding import left_as_found, linear_map, named_transforms

__all__ = ["Backbone", "left_as_found"]

# How deep the middle layer lies, as a share: where states say most of meaning (2511.04715).
MIDDLE = 2 / 3
_PLACES = re.compile(r"(image|video|audio|vision|[be]o[ia])_(\w+_)?token_(id|index)")


class _HeadReached(Exception):  # noqa: N818 (it stops a forward pass, nothing went wrong)
    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class Backbone:
    """A model without its head: batches in, inputs of the output head out.

    TRL never calls the head while it trains, and hooks would change the model, so the backbone is run by itself. For
    most `PreTrainedModel`s `model.base_model(...).last_hidden_state` is the input of the head, after the final norm
    and, for a VLM, after the images are merged. Where it is not, which `check` sees, and for classifiers, the whole
    model is run up to its head.

    Attributes:
        model: without DDP, FSDP1 and compilation; `causal`: without adapters' wrappers too; `holder`: what holds the
            weights, which FSDP1's wrapper does.
        kind: "causal", "seq2seq" (positions are those of the decoder), "sequence classification" (one position a
            row), "token classification"; classes stand in place of the vocabulary. "reward": one position for a pair
            of answers.

    Args:
        model: `PreTrainedModel`, or a `PeftModel` around one; DDP and compiled wrappers are looked through.
        dtype: run the forward under autocast in this dtype ("bfloat16", "float16"); None: in the model's own,
            or that of FSDP1's mixed precision.

    Raises:
        ValueError: a model without an output head, or with one that is not a linear map, a classifier that does not
            choose one of several classes, a prompt-learning adapter (named in the message).
    """

    def __init__(self, model: nn.Module, dtype: str | None = None):
        self.model, self.holder = unwrapped(model), holder_of(model)
        self.causal: Any = unwrapped(self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model
        self.dtype = dtype or dtype_of(self.holder)
        self.kind = kind_of(self.causal)
        self.transform: tuple[float, float | None] | None = None
        self.runs_whole_model = self.causal.base_model is self.causal or classifies(self.kind)
        self._refuse()

    def _refuse(self) -> None:
        """What can be refused before any forward pass."""
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{self.name}: Prompt-learning adapters (prefix or prompt tuning) cannot be scored: score the base "
                "model instead."
            )
        refuse_shares(self.name, self.holder, self.head_module())
        self.head()

    @property
    def name(self) -> str:
        return type(self.causal).__name__

    @property
    def device(self) -> torch.device:
        embeddings = self.causal.get_input_embeddings()
        with align_module_device(embeddings):  # where accelerate has offloaded weights: where it runs them
            return embeddings.weight.device

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens that the model (the decoder, where there are two) can take, None where there is no
        such number."""
        return self.most_tokens()[self.ids_name]

    def most_tokens(self) -> dict[str, int | None]:
        """Largest number of tokens in each input that has such, by its name.

        Rotary positions are computed for rows of any length, learned ones lie in a table.
        """
        config = self.causal.config.get_text_config()
        rotary = ("rope_parameters", "rope_scaling", "rope_theta")
        learned = all(getattr(config, name, None) is None for name in rotary)
        tables = {"input_ids": ["max_position_embeddings"]}
        if self.kind == "seq2seq":
            tables["input_ids"].insert(0, "max_encoder_position_embeddings")
            tables[self.ids_name] = [
                "max_target_positions",
                "max_decoder_position_embeddings",
                "max_position_embeddings",
            ]
        most: dict[str, int | None] = {}
        for ids, names in tables.items():
            sizes = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
            most[ids] = sizes[0] - self._positions_skipped if sizes and learned else None
        return most

    @property
    def n_tokens(self) -> int:
        """How many tokens the model knows."""
        return self.causal.get_input_embeddings().num_embeddings

    @cached_property
    def _positions_skipped(self) -> int:
        """Places at the start of a table of positions that no token gets: those up to its padding (RoBERTa)."""
        tables = [m for name, m in self.causal.named_modules() if name.endswith("position_embeddings")]
        return max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)

    @property
    def places(self) -> set[int]:
        """Tokens in whose places the model puts images, videos and sounds, and those around them: configs have names
        for them."""
        config = self.causal.config.to_dict()
        return {token for name, token in config.items() if isinstance(token, int) and _PLACES.fullmatch(name)}

    @property
    def bos(self) -> int:
        """The token that a text starts with: BOS, or EOS where the model has none."""
        config = self.causal.config.get_text_config()
        for tokens in (config.bos_token_id, config.eos_token_id):
            token = tokens[0] if isinstance(tokens, list) else tokens
            if token is not None and token < config.vocab_size:  # a default of the config may lie beyond
                return token
        return 0

    def head(self) -> Head:
        """The head as it is now, adapters on it included (the score is the gradient in its whole weight).

        Factor and soft-cap are what `check` has seen; before it, what the config says. Of a reward model it says which
        of two answers is better.
        """
        head = self.own_head()
        return pair_head(head) if self.kind == "reward" else head

    def own_head(self) -> Head:
        """The head whose outputs are the model's."""
        module = self.head_module()
        with gathered(self.holder), readable(module, recurse=True):
            weight, bias = linear_map(module, self.name)
            if goes_again(self.holder):
                weight, bias = weight.clone(), None if bias is None else bias.clone()
        added = self._added_bias
        if added is not None:
            bias = added if bias is None else bias + added
        scale, softcap = self.transform or named_transforms(self.causal.config)[0]
        return Head(weight.detach(), None if bias is None else bias.detach(), scale, softcap)

    def head_module(self) -> nn.Module:
        return head_module(self.causal, self.kind)

    @property
    def _added_bias(self) -> Tensor | None:
        """What BART and its kin add to the outputs of their head, (V,): a bias that is a buffer of the model."""
        added = getattr(self.causal, "final_logits_bias", None)
        return None if added is None else added[0]

    def biased(self, head_output: Tensor) -> Tensor:
        """`W h + b` from what the head module gives, (..., V)."""
        added = self._added_bias
        return head_output if added is None else head_output + added.to(head_output.device)

    @property
    def ids_name(self) -> str:
        """The input that has a token for each position of the head's input."""
        return "decoder_input_ids" if self.kind == "seq2seq" else "input_ids"

    @property
    def mask_name(self) -> str:
        return "decoder_attention_mask" if self.kind == "seq2seq" else "attention_mask"

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        """What the decoder reads where it is to predict labels: `kinds.decoder_inputs`."""
        return decoder_inputs(self.causal, labels)

    def autocast(self, dtype: torch.dtype | None = None) -> Any:
        if dtype is None and self.dtype is not None:
            dtype = getattr(torch, self.dtype)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the forward takes that is run."""
        run = self.causal if self.runs_whole_model else self.causal.base_model
        return inspect.signature(unwrapped(run).forward).parameters

    @cached_property
    def _places_tokens_itself(self) -> bool:
        """Whether the model makes positions of several dimensions of its inputs (M-RoPE: Qwen2-VL, GLM-4V, ...)."""
        rope = getattr(self.causal.config.get_text_config(), "rope_parameters", None)
        rope = rope or getattr(self.causal.config.get_text_config(), "rope_scaling", None) or {}
        return "mrope_section" in rope or any(hasattr(module, "get_rope_index") for module in self.causal.modules())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the forward takes of a batch, on the model's device."""
        if self.ids_name not in batch and self.kind == "seq2seq":
            raise ValueError(f"{self.name} is an encoder-decoder: a batch for it needs 'decoder_input_ids'.")
        device = self.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        mask = inputs.get("attention_mask")
        if self.kind != "causal":
            return self._with_pads(inputs, mask)
        takes_positions = "position_ids" in self._parameters and not self._places_tokens_itself
        padded_left = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        if padded_left and takes_positions and "position_ids" not in inputs:
            # Learned positions count from the first real token.
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def _with_pads(self, inputs: dict[str, Any], mask: Any) -> dict[str, Any]:
        """Padding tokens wherever the mask has padding, whatever stands there: classifiers find the end of a row by
        its tokens."""
        ids = inputs.get("input_ids")
        if self._pad is not None and isinstance(mask, Tensor) and isinstance(ids, Tensor) and ids.shape == mask.shape:
            inputs["input_ids"] = ids.masked_fill(mask == 0, self._pad)
        return inputs

    @property
    def _pad(self) -> int | None:
        return getattr(self.causal.config.get_text_config(), "pad_token_id", None)

    def run(self, inputs: dict[str, Any]) -> Tensor:
        """Inputs of the head, (B, L, D), for `inputs`; (B, 1, D) for a sequence classifier."""
        if not self.runs_whole_model:
            hidden = getattr(self._base(**inputs, use_cache=False), "last_hidden_state", None)
            if hidden is not None:
                return hidden
            self.runs_whole_model = True  # a base model with a head of its own
        hidden, place = self.up_to_head(inputs)
        return self.of_sequence(hidden, place) if of_sequences(self.kind) else hidden

    def _base(self, **inputs: Any) -> Any:
        """The base model by itself, which passes by the forward of the whole one, where FSDP gathers the weights that
        are in no part of their own (embeddings, final norm); FSDP2's stay, as after any forward of the whole."""
        for module in (self.model, self.causal):
            if isinstance(module, FSDPModule):
                module.unshard()
        with gathered(self.holder):
            return self.causal.base_model(**inputs)

    @staticmethod
    def of_sequence(states: Tensor, place: Tensor | None) -> Tensor:
        """States at the place whose logits are a sequence's, (B, 1, ...); None: there is one state a sequence."""
        if place is None:
            return states[:, None]
        return states[torch.arange(len(states), device=states.device), place.to(states.device)][:, None]

    def up_to_head(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run the whole model for what its head gets, (B, L, D) or (B, D).

        Returns:
            the inputs of the head, and, of a sequence classifier whose head runs at each token, the place of the one
            whose logits it takes, (B,). Models choose it by padding tokens, by the mask, by the end of the text:
            the head gives places in place of logits, and which one comes out is seen.
        """
        reached: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = first_input(args, kwargs)
            if not of_sequences(self.kind) or hidden.ndim == 2:
                raise _HeadReached(hidden)
            reached.append(hidden)

        def places(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            count = torch.arange(output.shape[1], dtype=torch.float32, device=output.device)
            return count[:, None].expand(output.shape).contiguous()

        head = self.head_module()
        hooks = [head.register_forward_pre_hook(stop, with_kwargs=True), head.register_forward_hook(places)]
        try:
            with gathered(self.holder):
                found = logits_of(self.causal(**inputs, **self.without_cache()))
        except _HeadReached as reason:
            return reason.hidden, None
        finally:
            for hook in hooks:
                hook.remove()
        if not reached:
            raise ValueError(
                f"{self.name} does not call its output head, and its base_model does not give the head's input: "
                "For-Value cannot see the last hidden states."
            )
        place = found[:, 0].long()
        if not (found == place[:, None]).all() or place.max() >= reached[-1].shape[1]:
            raise ValueError(
                f"{self.name} does not take the logits of one token of a sequence: For-Value scores classifiers that "
                "end with one linear map."
            )
        return reached[-1], place

    def without_cache(self) -> dict[str, bool]:
        parameters = inspect.signature(self.causal.forward).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return {"use_cache": False} if anything or "use_cache" in parameters else {}

    def hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        """Inputs of the head, (B, L, D), for a batch of model inputs (`input_ids` (B, L), ...); `labels` go unread.

        Of an encoder-decoder those at the decoder's positions, of a sequence classifier one a row, (B, 1, D); of a
        reward model that of the chosen answer minus that of the rejected one.
        """
        if self.kind != "reward":
            return self._hidden_states(batch)
        chosen, rejected = (self._hidden_states(side) for side in inputs_of_sides(batch))
        dtype = working_dtype(chosen)
        return chosen.to(dtype) - rejected.to(dtype)

    def _hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        inputs = self.inputs(batch)
        mask = inputs.get("attention_mask")
        with self.autocast():
            if not of_sequences(self.kind) or self._pad is not None or mask is None or len(mask) == 1:
                return self.run(inputs)
            # Without a padding token a classifier takes one row at a time.
            rows = [
                {k: v[i : i + 1, m.bool()] if v.shape == mask.shape else v[i : i + 1] for k, v in inputs.items()}
                for i, m in enumerate(mask)
            ]
            return torch.cat([self.run(row) for row in rows])

    @contextmanager
    def watched_middle(self, wanted: bool) -> Iterator[list[Tensor]]:
        """What the layer at two thirds of the depth gives, put into a list at each forward pass: (B, L, D), or others
        where an image's layers are as many. Nothing where no such layer is known."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])

        hooks = [layer.register_forward_hook(keep) for layer in self._middle_layers if wanted]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @cached_property
    def _middle_layers(self) -> list[nn.Module]:
        """By the number of layers: no framework says in public where they are."""
        n = getattr(self.causal.config.get_text_config(), "num_hidden_layers", None)
        if self.kind != "causal" or n is None or n < 3:
            return []
        stacks = [module for module in self.causal.modules() if isinstance(module, nn.ModuleList) and len(module) == n]
        return [stack[round(n * MIDDLE) - 1] for stack in stacks]

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows can go on from a beginning that was run once: every layer attends to all that came before."""
        if self.kind != "causal" or self.runs_whole_model or self._places_tokens_itself:
            return False
        layers = DynamicCache(config=self.causal.config.get_text_config()).layers
        return {"position_ids", "past_key_values"} <= set(self._parameters) and all(
            type(x) is DynamicLayer for x in layers
        )

    def hidden_states_after(
        self, prefixes: Mapping[str, Any], batch: Mapping[str, Any], prefix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the head of prefixes, each of which is run once, (P, K, D), and of rows that go on from them,
        (B, L, D).

        Args:
            prefixes: `input_ids`, `attention_mask` (P, K), padded on the right.
            batch: `input_ids` (B, L) and `position_ids` of what follows, `attention_mask` (B, K + L) of both.
            prefix: which of the prefixes each row goes on from, (B,).
        """
        cache = DynamicCache(config=self.causal.config.get_text_config())
        with self.autocast():
            before = self._base(**self.inputs(prefixes), past_key_values=cache, use_cache=True).last_hidden_state
            cache.batch_select_indices(prefix.to(self.device))
            inputs = self.inputs(batch)
            return before, self._base(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

    def check(self, batch: Mapping[str, Any], predicted_BL: Tensor | None = None) -> None:
        """See that the model is what is described here, on a batch, or refuse it by name: `model.check.check`."""
        check(self, inputs_of_sides(batch)[0], predicted_BL)
