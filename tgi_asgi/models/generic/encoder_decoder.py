"""Encoder-decoders (T5, BART and others): the encoder reads the prompt, the decoder writes the answer.

    position   0  1 ... n-1    n   n+1      as the engine counts: an answer follows its prompt
    token      prompt          y1  y2
    encoder    prompt                       once, when the prompt's last token has come
    decoder              s     y1  y2       s: the tokens that every answer begins with

The logits of position n-1 are those after `s`, so the engine samples, resumes and ends answers as it does for
decoders. The model's own code runs on its own cache (`encoder_decoder_cache.py`), which holds the keys and
values of the answer, and those that the decoder's layers make of the encoded prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.kinds import why_unserved_pair
from tgi_asgi.model_info import EncoderDecoder
from tgi_asgi.models.generic.backend import Backend
from tgi_asgi.models.generic.encoder_decoder_cache import Answer, Batch, RowPositions, empty_pair
from tgi_asgi.models.generic.modules import Head
from tgi_asgi.models.generic.own_cache import cache_name
from tgi_asgi.models.generic.positions import first_position
from tgi_asgi.models.generic.program import ModuleProgram, spans
from tgi_asgi.models.generic.states import SlotStates
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.types import ImageInput

_Ints = npt.NDArray[np.int64]
_RELATIVE = "relative_attention_num_buckets"  # positions are distances, so that texts may have any length
_USUAL = 1024  # tokens of a prompt, and of an answer, if the configuration names no number of positions


def describe(model: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> EncoderDecoder | None:
    """Return the facts about a module that is an encoder-decoder; None if it is not one.

    Args:
        config: The contents of config.json.
        generation: The contents of generation_config.json, which precede those of config.json.

    Raises:
        ModelLoadError: if it is of a kind that is not served, writes other tokens than it reads, or no file
            says how an answer begins.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    name = type(model).__name__
    is_headless = model.get_output_embeddings() is None
    if reason := why_unserved_pair(model.config.model_type, is_labelling=is_headless):
        raise ModelLoadError(f"{name} {reason}")
    files = (generation, config, model.config.to_dict())
    begin, forced, bos = (
        next((file[key] for file in files if file.get(key) is not None), None)
        for key in ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id")
    )
    starts = tuple(each for each in (bos if begin is None else begin, forced) if each is not None)
    num_read = model.get_encoder().get_input_embeddings().weight.shape[0]
    vocab_size = num_written(model)
    if num_read != vocab_size:
        raise ModelLoadError(
            f"{name} cannot be served: it reads {num_read} tokens and writes {vocab_size}, two vocabularies, "
            "of which a tokenizer.json holds one"
        )
    if not starts or any(type(each) is not int or not 0 <= each < vocab_size for each in starts):
        raise ModelLoadError(
            f"{name} needs the token that an answer begins with, as `decoder_start_token_id` in "
            f"generation_config.json or config.json; got {str(starts)[:100]}"
        )
    if hasattr(model.config, _RELATIVE):
        return EncoderDecoder(starts)
    max_answer = _num_positions(model, "decoder") - len(starts) + 1  # the last token is never computed
    return EncoderDecoder(starts, _num_positions(model, "encoder"), max_answer)


def num_written(model: Any) -> int:
    """Return the number of tokens that a pair can write, which `decoder_vocab_size` need not be (Marian)."""
    return int(model.get_output_embeddings().weight.shape[0])


def cache_columns(model: Any) -> int:
    """Return the columns of the keys of all layers of the decoder, in one of its two kinds of attention."""
    config = model.config.get_text_config(decoder=True)

    def first(*names: str) -> int:
        return next(int(found) for name in names if (found := getattr(config, name, None)))

    num_heads = first("decoder_attention_heads", "num_heads", "num_attention_heads")
    columns = num_heads * int(getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or 0)
    num_layers = first("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    return num_layers * (columns or first("hidden_size"))


def context_length(pair: EncoderDecoder) -> int:
    """Return the number of tokens of the longest prompt with the longest answer."""
    return (pair.max_prompt or _USUAL) + (pair.max_answer or _USUAL)


def _num_positions(model: Any, part: Literal["encoder", "decoder"]) -> int:
    own = getattr(model.config, part, None)  # of a pair of two models; transformers finds only a decoder's
    own = None if own is None else own.get_text_config()
    configs = (model.config, model.config.get_text_config(**{part: True})) if own is None else (own,)
    names = (f"max_{part}_position_embeddings", "max_position_embeddings")
    named = (getattr(config, name, None) for name in names for config in configs)
    found = next((int(each) for each in named if type(each) is int and each > 0), _USUAL)
    return found if own is None else found - first_position(getattr(model, f"get_{part}")())


def _takes_positions(model: Any) -> bool:
    """Return whether a model can be told its decoder's positions, as `decoder_position_ids`."""
    if type(model).__name__ == "EncoderDecoderModel":  # hands on to its decoder what begins with `decoder_`
        return "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    return "decoder_position_ids" in inspect.signature(model.forward).parameters


@dataclass(frozen=True, slots=True)
class _Row:
    """A sequence's part of a step.

    Attributes:
        answer: State of the answer so far, which this step continues.
        start: Position of the first of `ids`.
        places: Where its logits are among those of the step.
        wanted: Which of `ids` have them, [n_places].
    """

    answer: Answer
    ids: Tensor
    start: int
    num_prompt: int
    places: _Ints
    wanted: _Ints

    @property
    def is_next(self) -> bool:
        """Whether it is the next token of an answer, and nothing else."""
        return len(self.ids) == 1 and self.start >= self.num_prompt


def _route_all_tokens(model: Any) -> None:
    """Keep NLLB-MoE's routers from leaving tokens out as padding, of which a step has none.

    They look for it in the mask of the decoder's keys, which in a step of several answers is not that of the
    step's tokens: where one has just begun and others have not, the others' tokens would miss their experts.
    """
    for module in model.modules():
        if hasattr(module, "router_ignore_padding_tokens"):
            module.router_ignore_padding_tokens = True


class EncoderDecoderProgram(ModuleProgram):
    """A program that encodes prompts one by one, and computes the next tokens of all answers together.

    Args:
        model: Model with its weights and its own attention.
        head: Head that computes only the requested rows.
        starts: Tokens that the decoder begins with.
        is_batched: Whether answers are computed together; some models have no positions for that.
        backend: The device that computes them.
    """

    def __init__(
        self, model: Any, head: Head, starts: Sequence[int], *, vocab_size: int, is_batched: bool,
        backend: Backend,
    ) -> None:  # fmt: skip
        self._model, self._head, self._vocab_size = model, head, vocab_size
        self._backend, self._device = backend, backend.device
        self._starts = torch.tensor(starts, device=self._device)
        self._cache_name = str(cache_name(model))
        self._num_prompt: dict[int, int] = {}  # by slot
        self._states: SlotStates[Answer] = SlotStates(Answer, Answer.copy)
        self._is_batched = is_batched
        _route_all_tokens(model)
        self._takes_positions = _takes_positions(model)
        self._first_position = first_position(model.get_decoder()) if self._takes_positions else 0
        table = getattr(model.get_decoder(), "embed_positions", None)
        self._positions = None if table is None else RowPositions.in_place_of(table)

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with this prompt."""
        self._num_prompt[slot] = len(prompt_ids)

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; return the logits [n_rows, vocab] of `rows`, indices of tokens.

        Raises:
            PlanError: if a row has none: those before a prompt's last token.
        """
        wanted = np.array(list(rows), dtype=np.int64)
        out = torch.empty(len(wanted), self._vocab_size)
        with torch.inference_mode(), self._backend.computing():
            together = []
            for row in self._rows(batch, wanted):
                if self._is_batched and row.is_next:
                    together.append(row)
                elif len(part := self._take_prompt(row)):
                    wanted_of = row.wanted + len(part) - len(row.ids)
                    out[row.places] = self._decode(row.answer, part, wanted_of).cpu()
            if together:
                logits = self._decode_together(
                    [row.answer for row in together], torch.cat([row.ids for row in together])
                ).cpu()
                for index, row in enumerate(together):
                    out[row.places] = logits[index]
            self._states.commit()
        return out.numpy()

    def _rows(self, batch: ops.FlatRows, wanted: _Ints) -> list[_Row]:
        """Return the rows of a step, whose states may go on."""
        ids = torch.from_numpy(batch.ids.astype(np.int64)).to(self._device)
        parts = spans(batch)
        states = self._states.begin(parts)
        for answer in self._states.of_others():
            answer.leave()
        found, first = [], 0
        for part, state in zip(parts, states, strict=True):
            stop = first + part.length
            places = np.flatnonzero((wanted >= first) & (wanted < stop))
            row = _Row(
                state.cache, ids[first:stop], part.start, self._num_prompt[part.slot], places,
                wanted[places] - first,
            )  # fmt: skip
            if len(places) and part.start + row.wanted.min() < row.num_prompt - 1:
                raise ops.PlanError("an encoder-decoder has no logits of a prompt's tokens")
            found.append(row)
            first = stop
        return found

    def _take_prompt(self, row: _Row) -> Tensor:
        """Encode the prompt once all of its tokens have come; return the tokens for the decoder."""
        answer, rest = row.answer, row.num_prompt - row.start
        if rest <= 0:
            return row.ids
        answer.prompt.append(row.ids[:rest])
        if len(row.ids) < rest:
            return row.ids[:0]
        prompt, encoder = torch.cat(answer.prompt)[None], self._model.get_encoder()
        answer.prompt = []
        if hasattr(encoder, "set_attention_type"):  # BigBird's: a short prompt changes it for all that follow
            encoder.set_attention_type(encoder.config.attention_type)
        answer.encoded = encoder(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        answer.cache = empty_pair(self._model)
        return torch.cat((self._starts, row.ids[rest:]))

    def _decode(self, answer: Answer, ids: Tensor, rows: _Ints) -> Tensor:
        """Return the logits [n_rows, vocab] after some of an answer's next tokens; there may be none."""
        answer.leave()
        given = {"encoder_outputs": answer.encoded, self._cache_name: answer.cache}
        return self._logits(torch.from_numpy(rows).to(self._device), decoder_input_ids=ids[None], **given)[0]

    def _decode_together(self, answers: Sequence[Answer], ids: Tensor) -> Tensor:
        """Return the logits [n_answers, vocab] after the next token of each answer."""
        if len(answers) == 1:
            return self._decode(answers[0], ids, np.zeros(1, np.int64))
        batch = Batch.of(answers)
        prompts, seen = (each.to(self._device) for each in batch.masks())
        hidden = answers[0].encoded.last_hidden_state
        # The decoder has their keys and values already, and asks only for their shape.
        encoded = hidden.new_zeros(1).expand(*prompts.shape, hidden.shape[-1])
        given: dict[str, Any] = {self._cache_name: batch.cache}
        if self._takes_positions:
            positions = torch.tensor(batch.num_answer, device=self._device) + self._first_position
            given["decoder_position_ids"] = positions[:, None]
        if self._positions is not None:
            self._positions.begin(batch.num_answer)
        try:
            logits = self._logits(
                torch.zeros(1, dtype=torch.long, device=self._device), decoder_input_ids=ids[:, None],
                attention_mask=prompts,
                decoder_attention_mask=seen, encoder_outputs=type(answers[0].encoded)(encoded), **given,
            )  # fmt: skip
        finally:
            if self._positions is not None:
                self._positions.end()
        batch.num_answer = [size + 1 for size in batch.num_answer]
        for index, answer in enumerate(answers):
            answer.cache, answer.batch, answer.index = None, batch, index
        return logits[:, 0]

    def _logits(self, rows: Tensor, **given: Any) -> Tensor:
        """Return the logits [n_sequences, n_rows, vocab] of some of the decoder's tokens."""
        self._head.rows = rows
        try:
            logits: Tensor = self._model(use_cache=True, **given).logits
        finally:
            self._head.rows = None
        return logits[:, :, : self._vocab_size].float()

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Refuse: only prompts have more rows than those of a step."""
        raise ops.PlanError("an encoder-decoder has no logits of a prompt's tokens")

    def hidden(self, start: int, stop: int) -> Floats:
        """Refuse: no vectors are made of its states."""
        raise ops.PlanError("an encoder-decoder gives no vectors")
