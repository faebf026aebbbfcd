"""Encoder-decoders (T5, BART and others): the encoder reads the prompt, the decoder writes the answer.

    position   0  1 ... n-1    n   n+1      as the engine counts: an answer follows its prompt
    token      prompt          y1  y2
    encoder    prompt                       once, when the prompt's last token has come
    decoder              s     y1  y2       s: the tokens that every answer begins with

The logits of position n-1 are those after `s`, so the engine samples, resumes and ends answers as it does for
decoders. Sequences are computed one after the other, each on the cache of the model's own code, which holds
the keys and values of the answer, and those that the decoder's layers make of the encoded prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.modules import Head
from tgi_asgi.models.generic.program import ModuleProgram, cache_name, spans
from tgi_asgi.models.generic.states import SlotStates, copy_cache
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.types import EncoderDecoder, ImageInput

_RELATIVE = "relative_attention_num_buckets"  # positions are distances, so that texts may have any length
_USUAL = 1024  # tokens of a prompt, and of an answer, if the configuration names no number of positions


def describe(model: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> EncoderDecoder | None:
    """Return the facts about a module that is an encoder-decoder; None if it is none.

    Args:
        config: The contents of config.json.
        generation: The contents of generation_config.json, which precede those of config.json.

    Raises:
        ModelLoadError: if it does not turn a text into another, or no file says how an answer begins.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    name = type(model).__name__
    if not writes_text(name):
        raise ModelLoadError(f"{name} is an encoder-decoder that does not turn a text into another")
    files = (generation, config, model.config.to_dict())
    begin, forced, bos = (
        next((file[key] for file in files if file.get(key) is not None), None)
        for key in ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id")
    )
    starts = tuple(each for each in (bos if begin is None else begin, forced) if each is not None)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if not starts or any(type(each) is not int or not 0 <= each < vocab_size for each in starts):
        raise ModelLoadError(
            f"{name} needs the token that an answer begins with, as `decoder_start_token_id` in "
            f"generation_config.json or config.json; got {str(starts)[:100]}"
        )
    if hasattr(model.config, _RELATIVE):
        return EncoderDecoder(starts)
    max_answer = _num_positions(model, "decoder") - len(starts) + 1  # the last token is never computed
    return EncoderDecoder(starts, _num_positions(model, "encoder"), max_answer)


def writes_text(architecture: str) -> bool:
    """Return whether a class of `transformers` turns a text into another."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as BY_TYPE

    return architecture in BY_TYPE.values()


def context_length(pair: EncoderDecoder) -> int:
    """Return the number of tokens of the longest prompt with the longest answer."""
    return (pair.max_prompt or _USUAL) + (pair.max_answer or _USUAL)


def _num_positions(model: Any, part: str) -> int:
    configs = (model.config, model.config.get_text_config(**{part: True}))
    names = (f"max_{part}_position_embeddings", "max_position_embeddings")
    named = (getattr(config, name, None) for name in names for config in configs)
    return next((int(each) for each in named if type(each) is int and each > 0), _USUAL)


@dataclass(slots=True)
class _Answer:
    """What a sequence leaves for its next tokens: its prompt, until that is encoded, and then its cache."""

    prompt: list[Tensor] = field(default_factory=list)  # ids of its chunks
    encoded: Any = None  # the encoder's output
    cache: Any = None

    def copy(self) -> _Answer:
        """Return a copy that may go on without affecting this one."""
        return replace(self, prompt=list(self.prompt), cache=self.cache and _copy_both(self.cache))


class EncoderDecoderProgram(ModuleProgram):
    """A program that computes one sequence after the other.

    Args:
        model: Model with its weights and its own attention.
        head: Head that computes only the requested rows.
        starts: Tokens that the decoder begins with.
    """

    native = None

    def __init__(self, model: Any, head: Head, starts: Sequence[int], *, vocab_size: int) -> None:
        self._model, self._head, self._vocab_size = model, head, vocab_size
        self._starts = torch.tensor(starts)
        self._cache_name = str(cache_name(model))
        self._num_prompt: dict[int, int] = {}  # by slot
        self._states: SlotStates[_Answer] = SlotStates(_Answer, _Answer.copy)

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with this prompt."""
        self._num_prompt[slot] = len(prompt_ids)

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; return the logits [n_rows, vocab] of `rows`, indices of tokens.

        Raises:
            PlanError: if a row has none: those before a prompt's last token.
        """
        wanted = np.array(list(rows), dtype=np.int64)
        ids = torch.from_numpy(batch.ids.astype(np.int64))
        slots, (starts, lengths) = batch.row_slots.tolist(), spans(batch)
        out = torch.empty(len(wanted), self._vocab_size)
        with torch.inference_mode(), ops.keep_threads_awake():
            states = self._states.begin(slots, starts, lengths)
            first = 0
            for slot, start, length, state in zip(slots, starts, lengths, states, strict=True):
                at = np.flatnonzero((wanted >= first) & (wanted < first + length))
                positions = wanted[at] - first + start
                answer, num_prompt = state.cache, self._num_prompt[slot]
                if len(at) and positions.min() < num_prompt - 1:
                    raise ops.PlanError("an encoder-decoder has no logits of a prompt's tokens")
                part = self._take_prompt(answer, ids[first : first + length], start, num_prompt)
                if len(part):
                    # A token's index among all of the decoder's; the first of `part`'s, likewise.
                    indices = positions - num_prompt + len(self._starts)
                    begin = start - num_prompt + len(self._starts) if start >= num_prompt else 0
                    out[at] = self._decode(answer, part, indices - begin)
                first += length
            self._states.commit()
        return out.numpy()

    def _take_prompt(self, answer: _Answer, ids: Tensor, start: int, num_prompt: int) -> Tensor:
        """Encode the prompt once all of its tokens have come; return the tokens for the decoder."""
        if start >= num_prompt:
            return ids
        answer.prompt.append(ids[: num_prompt - start])
        if start + len(ids) < num_prompt:
            return ids[:0]
        prompt = torch.cat(answer.prompt)[None]
        answer.prompt = []
        answer.encoded = self._model.get_encoder()(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        answer.cache = _empty_cache(self._model)
        return torch.cat((self._starts, ids[num_prompt - start :]))

    def _decode(self, answer: _Answer, ids: Tensor, rows: Any) -> Tensor:
        """Return the logits after some of an answer's next tokens; there may be none to return."""
        self._head.rows = torch.from_numpy(rows)
        try:
            logits: Tensor = self._model(
                encoder_outputs=answer.encoded,
                decoder_input_ids=ids[None],
                use_cache=True,
                **{self._cache_name: answer.cache},
            ).logits
        finally:
            self._head.rows = None
        return logits[0, :, : self._vocab_size].float()

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Refuse: only prompts have more rows than those of a step."""
        raise ops.PlanError("an encoder-decoder has no logits of a prompt's tokens")

    def hidden(self, start: int, stop: int) -> Floats:
        """Refuse: no vectors are made of its states."""
        raise ops.PlanError("an encoder-decoder gives no vectors")


def _empty_cache(model: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    return EncoderDecoderCache(own, DynamicCache())


def _copy_both(cache: Any) -> Any:
    """Copy the answer's part; that of the encoded prompt does not change once it exists."""
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(copy_cache(cache.self_attention_cache), cache.cross_attention_cache)
