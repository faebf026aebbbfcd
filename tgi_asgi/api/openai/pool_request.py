"""What OpenAI's and vLLM's requests for vectors and scores have in common: fields, inputs, usage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

from msgspec import Struct

from tgi_asgi.api.openai.params import check_ids
from tgi_asgi.api.parse import Int, Salt, refuse_field
from tgi_asgi.api.pool_call import Input, PoolCall, Pooled, Truncation, check_num_inputs
from tgi_asgi.model_info import Classification, Embedding, ModelInfo, Scoring
from tgi_asgi.settings import Settings


class PoolRequest(Struct, kw_only=True):
    """The fields that all of these requests have."""

    model: str | None = None
    truncate_prompt_tokens: Int | None = None  # how many tokens to keep of an input; -1: as many as fit
    truncation_side: Literal["left", "right"] | None = None  # the side that is cut off; by default the right
    priority: int | None = None
    cache_salt: Salt | None = None

    def call(
        self,
        inputs: Sequence[Input],
        how: Embedding | Scoring | Classification,
        answer: Callable[[Pooled], bytes],
        *,
        adds_special_tokens: bool = True,
    ) -> PoolCall:
        """Return the call of a request with these inputs.

        Raises:
            InvalidRequest: if the number of tokens to keep is out of range.
        """
        keep, truncation = self.truncate_prompt_tokens, None
        if keep is not None:
            if keep < 1 and keep != -1:
                refuse_field("truncate_prompt_tokens", f"must be -1 or at least 1, got {keep}")
            from_left = self.truncation_side == "left"
            truncation = Truncation(None if keep == -1 else keep, from_left=from_left)
        return PoolCall(
            inputs=inputs,
            how=how,
            answer=answer,
            model=self.model,
            truncation=truncation,
            adds_special_tokens=adds_special_tokens,
            priority=self.priority or 0,
            cache_salt=self.cache_salt,
        )


def usage(num_tokens: int) -> dict[str, int]:
    """Return the usage object of an answer without generated tokens."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def inputs_of(
    given: str | list[str | int | list[int]], name: str, info: ModelInfo, settings: Settings
) -> list[Input]:
    """Return the inputs of a call; a text or a list of ids is a single input.

    Raises:
        InvalidRequest: if there are none or too many, one is empty, or an id is not a token of the model.
    """
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    items = [given] if is_one else given
    check_num_inputs(len(items), name, settings)
    inputs = []
    for at, item in enumerate(items):
        where = name if is_one else f"{name}[{at}]"
        if not isinstance(item, str | list):
            refuse_field(where, "must be a string or a list of token ids")
        if not item:
            refuse_field(where, "must not be empty")
        if isinstance(item, str):
            inputs.append(Input(item, where))
        else:
            check_ids(item, where, info.vocab_size)
            inputs.append(Input(cast(list[int], item), where))
    return inputs
