"""A checkpoint with an adapter merged into it: what `peft` calls `merge_and_unload`, a piece at a time.

An adapter that is the model itself (`--model-id` names it, as in TGI) is served at the speed of its base, and
may do what adapters beside a base may not: DoRA (Liu et al., arXiv 2402.09353), and whole modules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.peft import PeftAdapter, PeftRows, PeftTarget
from tgi_asgi.formats.safetensors import SafeTensor
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading.merged_parameters import Parameters, Part
from tgi_asgi.models.loading.recognise import architecture_of
from tgi_asgi.models.loading.tensors import have_equal_values
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.sources import WORDS

_PIECE = 1 << 22  # numbers of a matrix that are merged at a time, as float32
# Beginnings of modules' names, and of the same modules' tensors in checkpoints of other versions of
# `transformers`.
_RENAMED = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
    ("lm_head.", "language_model.lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", "backbone."),  # of Nemotron-H, likewise
    ("backbone.", "model."),
    ("lm_head.", "embed_out."),  # of GPT-NeoX, in whose files it keeps the old name
    ("embed_out.", "lm_head."),
)
# What a model with a head puts before the names of the model inside it (`base_model_prefix`): the adapter may
# have been trained on the one, and the checkpoint be of the other.
_PREFIXES = (
    "model.", "transformer.", "gpt_neox.", "backbone.",
    "bert.", "roberta.", "distilbert.", "electra.", "mpnet.", "albert.", "deberta.",
)  # fmt: skip
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"}
)
_HEADS = frozenset({"lm_head", "embed_out"})
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of architectures' names
# Models whose layers are `Conv1D`, which stores [columns, rows], and the modules that are.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
# Models that store experts as [experts, columns, rows]: needed where a matrix is square.
_TRANSPOSED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria_text", "aria")


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to a tensor: `up @ down`, or its transpose where the base stores that.

    Attributes:
        part: Which of the target's matrices, if they are those of many experts.
    """

    target: PeftTarget
    is_transposed: bool
    part: Part


class MergedCheckpoint(Checkpoint):
    """The tensors of a base model, changed by an adapter when they are read; overrides all of its class.

    Attributes:
        vocab_size: The number of tokens if the adapter changes it, else None.
    """

    def __init__(
        self,
        base: Checkpoint,
        config: Mapping[str, Any],
        directory: Path,
        file_names: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {},
    ) -> None:
        """Read an adapter's directory.

        Args:
            config: The base's config.json.
            file_names: Returns which of these tensors of the base the modules' are, by the modules' names;
                called only for an adapter with names that neither the base nor this module knows.

        Raises:
            ModelLoadError: if it cannot be read, or does not fit the base; the message names the tensor. The
                base is closed then.
        """
        self._base = base
        self._config = config
        self._file_names = functools.cache(lambda: file_names(base))
        self._whole: dict[str, SafeTensor] = {}  # tensors that replace the base's, by their names there
        self._copies: dict[str, str] = {}  # further names of tensors of the base, as they were in it
        self._changes: dict[str, _Change] = {}
        self._rows: dict[str, PeftRows] = {}
        self.vocab_size: int | None = None
        with ExitStack() as failing:
            failing.callback(base.close)
            self._adapter = PeftAdapter(directory, is_merged=True)
            failing.callback(self._adapter.close)
            try:
                for name, tensor in self._adapter.whole.items():
                    self._replace(name, tensor)
                self._keep_tied_head()
                self._check_vocabulary()
                for target in self._adapter.targets:
                    self._take(target)
                for rows in self._adapter.rows:
                    self._replace_rows(rows)
            except ModelLoadError as error:
                raise ModelLoadError(f"{directory}: {error}") from None
            failing.pop_all()

    def _replace(self, module_name: str, tensor: SafeTensor) -> None:
        """Take a whole tensor of the adapter; an embedding or head may be new, or have other rows."""
        last = _module(module_name)  # a head may be new
        name = _name_in(self._base, module_name) if last in _HEADS else self._find(module_name)
        if tensor.dtype not in WORDS:
            raise ModelLoadError(f"tensor {tensor.name!r} is of dtype {tensor.dtype}")
        if name is None and last not in _HEADS:
            raise ModelLoadError(f"tensor {tensor.name!r}: the base model has none of that name")
        like = name or next((each for each in self._base if _is_table(each, _EMBEDDINGS)), None)
        if like is not None and tensor.shape != (shape := self._base.tensor(like).shape):
            is_resized = last in _EMBEDDINGS | _HEADS and tensor.shape[1:] == shape[1:] and len(shape) == 2
            if not is_resized:
                raise ModelLoadError(f"tensor {tensor.name!r} {_shapes(tensor.shape, shape)}")
            self.vocab_size = tensor.shape[0]
        if (name or module_name) in self._whole:
            raise ModelLoadError(f"tensor {tensor.name!r} is in the adapter under another name, too")
        self._whole[name or module_name] = tensor

    def _keep_tied_head(self) -> None:
        """Keep the base's embedding as the head if the adapter has only an embedding, as `peft` does."""
        generates = architecture_of(self._config).endswith(_GENERATES)
        if not generates or any(_is_table(name, _HEADS) for name in self):
            return
        for target in self._adapter.targets:
            name = _name_in(self._base, f"{target.module}.weight")
            if target.is_embedding and name is not None and _is_table(name, _EMBEDDINGS):
                if name in self._whole:  # saved beside LoRA's matrices, because it is resized
                    self._whole["lm_head.weight"] = self._whole[name]
                    return
                self._copies["lm_head.weight"] = name
        for name, tensor in self._whole.items():
            if not _is_table(name, _EMBEDDINGS):
                if len(tensor.shape) == 2 and tensor.shape[0] == self._text_config().get("vocab_size"):
                    raise ModelLoadError(f"tensor {tensor.name!r} may be the head, too: save both")
            elif self.vocab_size is None:
                self._copies["lm_head.weight"] = name
            else:
                raise ModelLoadError(
                    f"tensor {tensor.name!r} has {tensor.shape[0]} rows, the base's embedding, which is its "
                    f"head, too, {self._base.tensor(name).shape[0]}: save both the embedding and the head"
                )

    def _find(self, name: str) -> str | None:
        """Return the base's name of a module's tensor; None if it has none, or only as a part of others."""
        return _name_in(self, name) or self._file_names().get(name)

    def _text_config(self) -> Mapping[str, Any]:
        """Return the part of the configuration with the size of the vocabulary."""
        text = self._config.get("text_config")
        return text if isinstance(text, dict) and "vocab_size" not in self._config else self._config

    def _check_vocabulary(self) -> None:
        """Refuse an adapter that changes the size of the embedding and not of the head, or only the other."""
        if self.vocab_size is None:
            return
        for name in self:
            shape = self.tensor(name).shape
            if _is_table(name, _EMBEDDINGS | _HEADS) and len(shape) == 2 and shape[0] != self.vocab_size:
                raise ModelLoadError(
                    f"the adapter's vocabulary has {self.vocab_size} tokens, {name!r} has {shape[0]}: save "
                    "both the embedding and the head"
                )

    def _take(self, target: PeftTarget) -> None:
        """Take a LoRA target: a module's matrix, or a parameter, which may be many tensors of the base."""
        parts: list[Part] = []
        if self._adapter.parameters:
            parameters = Parameters(self, self._adapter, lambda name: _name_in(self, name))
            target, parts = parameters.resolve(target)
        for part in parts or [Part(self._matrix_of(target))]:
            self._change(target, part)

    def _matrix_of(self, target: PeftTarget) -> str:
        """Return the base's name of a module's matrix."""
        wanted = f"{target.module}.weight"
        name = self._find(wanted)
        if name is not None and self.tensor(name).dtype in WORDS:
            return name
        has_codes = name is not None or self._config.get("quantization_config")
        why = "is quantised, or has no matrix of that name" if has_codes else "has no matrix of that name"
        needs_merging = self._whole or target.magnitude is not None or _is_table(wanted, _HEADS)
        cure = ": serve it with --lora-adapters" if has_codes and not needs_merging else ""
        raise ModelLoadError(
            f"tensor {target.down.name!r}: the base model {why}, so nothing can be added to it{cure}"
        )

    def _change(self, target: PeftTarget, part: Part) -> None:
        """Take what a target adds to a tensor, in the order in which the base stores that."""
        what, name = f"tensor {target.down.name!r}", part.name
        if self.tensor(name).dtype not in WORDS:
            raise ModelLoadError(f"{what}: the base model stores {name!r} as codes: nothing can be added")
        shape, rows, columns = self.tensor(name).shape, target.up.shape[0], target.down.shape[1]
        # Not by `fan_in_fan_out`: `peft` corrects it for each layer.
        is_conv1d = self._config.get("model_type") in _CONV1D_MODELS and _module(name) in _CONV1D
        is_transposed = is_conv1d or target.is_embedding
        if len(shape) == 3:
            is_transposed = self._has_experts_transposed(shape[1:], (rows, columns))
        if part.expert is not None and part.num_rows == rows:
            rows = shape[0]
        stack = (part.num_matrices,) if part.expert is None and part.num_matrices > 1 else ()
        if shape != (*stack, *((columns, rows) if is_transposed else (rows, columns))):
            raise ModelLoadError(f"{what} {_shapes((rows, columns), shape)}: is it of another base?")
        if target.up.shape[1] != target.rank:
            raise ModelLoadError(f"{what} has the rank {target.rank}, its other matrix {target.up.shape[1]}")
        if target.magnitude is not None and is_transposed:
            raise ModelLoadError(f"{what}: DoRA of layers that are stored transposed is not merged")
        if target.magnitude is not None and math.prod(target.magnitude.shape) != rows:
            raise ModelLoadError(f"{what}: its magnitudes are not one for each row of the base's matrix")
        if name in self._changes:
            raise ModelLoadError(f"{what} is in the adapter under another name, too")
        self._changes[name] = _Change(target, is_transposed, part)

    def _replace_rows(self, rows: PeftRows) -> None:
        """Take rows of an embedding; a head that is tied to it has them, too, as in `peft`."""
        what = f"tensor {rows.rows.name!r}"
        name = self._find(f"{rows.module}.weight")
        if name is None or self.tensor(name).dtype not in WORDS:
            raise ModelLoadError(f"{what}: the base model has no such embedding, or stores it as codes")
        shape = self.tensor(name).shape
        if rows.rows.shape[1:] != shape[1:] or max(rows.token_ids, default=0) >= shape[0]:
            raise ModelLoadError(
                f"{what}: it has rows that the base's {name!r}, {list(shape)}, does not have"
            )
        self._rows[name] = rows
        head = next((each for each in self._base if _is_table(each, _HEADS)), None)
        if head is not None and head not in self._whole and self._is_tied(name, head):
            self._rows.setdefault(head, rows)

    def _is_tied(self, name: str, head: str) -> bool:
        """Return whether `transformers` ties a head that the base stores, too, to this embedding."""
        if not _is_table(name, _EMBEDDINGS) or self.tensor(name).shape != self.tensor(head).shape:
            return False
        given = self._config.get("tie_word_embeddings", self._text_config().get("tie_word_embeddings"))
        return have_equal_values(self._base, name, head) if given is None else given is True

    def _has_experts_transposed(self, shape: tuple[int, ...], adapter: tuple[int, int]) -> bool:
        """Return whether each expert's matrix is [columns, rows]; a square one does not say."""
        if shape[0] == shape[1]:
            return self._config.get("model_type") in _TRANSPOSED_EXPERTS
        return shape == adapter[::-1]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._base, *self._whole, *self._copies]))

    def __contains__(self, name: object) -> bool:
        return name in self._base or name in self._whole or name in self._copies

    def tensor(self, name: str) -> SafeTensor:
        """Return a tensor's dtype and shape; raise `ModelLoadError` if there is none of that name."""
        if name in self._copies:
            return replace(self._base.tensor(self._copies[name]), name=name)
        return self._whole[name] if name in self._whole else self._base.tensor(name)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, or some of them; merged matrices are computed anew at each call.

        Raises:
            ModelLoadError: if merging gives values that are not finite.
        """
        change, replaced = self._changes.get(name), self._rows.get(name)
        if change is None and replaced is None:
            return self._unchanged(name, start, stop)
        info = self.tensor(name)
        stop = info.nbytes if stop is None else stop
        row_bytes = info.nbytes // math.prod(info.shape[:-1])
        first, last = start // row_bytes, -(-stop // row_bytes)
        if change is None:
            merged = self._unchanged(name, first * row_bytes, last * row_bytes).copy()
        else:
            merged = self._merged(name, change, first, last)
        if replaced is not None:
            own = _rounded(self._floats(replaced.rows), info.dtype).data.reshape(-1, row_bytes)
            for token_id, row in zip(replaced.token_ids, own, strict=True):
                if first <= token_id < last:
                    merged.reshape(-1, row_bytes)[token_id - first] = row
        return merged[start - first * row_bytes : stop - first * row_bytes]

    def _unchanged(self, name: str, start: int, stop: int | None) -> npt.NDArray[np.uint8]:
        """Return bytes of a tensor without what LoRA adds to it."""
        if name in self._whole:
            found: npt.NDArray[np.uint8] = self._adapter.raw(self._whole[name])[start:stop]
            return found
        return self._base.raw(self._copies.get(name, name), start, stop)

    def _merged(self, name: str, change: _Change, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of some rows of a merged tensor, which has one matrix or many."""
        info, target = self.tensor(name), change.target
        num_rows, columns = info.shape[-2:]
        width = columns * np.dtype(WORDS[info.dtype]).itemsize
        magnitude = None if target.magnitude is None else self._floats(target.magnitude).reshape(-1, 1)
        merged = np.empty((last - first, width), np.uint8)
        for matrix in range(first // num_rows, -(-last // num_rows)):
            up, product = self._factors(change, matrix, num_rows)
            begin, end = max(first, matrix * num_rows), min(last, (matrix + 1) * num_rows)
            for at, stop in _pieces(begin, end, max(_PIECE // columns, 1)):
                source = ops.WeightSource(
                    self._unchanged(name, at * width, stop * width), info.dtype, (stop - at, columns)
                )
                of_matrix = slice(at - matrix * num_rows, stop - matrix * num_rows)
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # refused below
                    rows = ops.decode(source) + np.float32(target.scale) * product.of(up[of_matrix])
                    if magnitude is not None:
                        rows *= magnitude[of_matrix] / np.linalg.norm(rows, axis=1, keepdims=True)
                    rounded = _rounded(rows, info.dtype)
                if not np.isfinite(ops.decode(rounded)).all():
                    raise ModelLoadError(
                        f"tensor {target.down.name!r}: merged, it gives values that are not finite"
                    )
                merged[at - first : stop - first] = rounded.data.reshape(-1, width)
        return merged.reshape(-1)

    def _factors(self, change: _Change, matrix: int, num_rows: int) -> tuple[Floats, ops.Product]:
        """Return [rows, rank] and the product with [rank, columns] of one matrix of a tensor."""
        part, count = change.part, change.part.num_matrices
        expert = matrix if part.expert is None else part.expert
        down, up = self._words(change.target.down), self._words(change.target.up)
        rank = len(down) // count
        down, up = down[expert * rank : (expert + 1) * rank], up[:, expert::count]
        if part.expert is not None:
            up = up[part.first : part.first + num_rows]
        floats = [
            ops.decode(
                ops.WeightSource(np.ascontiguousarray(each).reshape(-1).view(np.uint8), dtype, each.shape)
            )
            for each, dtype in ((up, change.target.up.dtype), (down, change.target.down.dtype))
        ]
        if change.is_transposed:
            floats = [floats[1].T, floats[0].T]
        return floats[0], ops.Product(floats[1].T)

    def _words(self, tensor: SafeTensor) -> npt.NDArray[Any]:
        """Return a matrix as its file holds it, without decoding it."""
        words: npt.NDArray[Any] = self._adapter.raw(tensor).view(WORDS[tensor.dtype]).reshape(tensor.shape)
        return words

    def _floats(self, tensor: SafeTensor) -> Floats:
        return ops.decode(ops.WeightSource(self._adapter.raw(tensor), tensor.dtype, tensor.shape))

    def fitted_config(self) -> dict[str, Any]:
        """Return the base's configuration, with the size of the vocabulary that the adapter has."""
        config, text = self._config, self._text_config()
        if self.vocab_size is None:
            return dict(config)
        changed = {**text, "vocab_size": self.vocab_size}
        return changed if text is config else {**config, "text_config": changed}

    def close(self) -> None:
        """Release the mappings."""
        self._base.close()
        self._adapter.close()


def _pieces(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Return the ranges of at most this size that a range consists of."""
    for at in range(first, last, size):
        yield at, min(at + size, last)


def _rounded(rows: Floats, dtype: str) -> ops.WeightSource:
    """Return rows in the dtype of a checkpoint; what is too large for it is infinite."""
    return ops.as_bfloat16(rows) if dtype == "BF16" else ops.from_floats(rows.astype(WORDS[dtype]))


def _module(name: str) -> str:
    """Return the last part of the name of a tensor's module."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_table(name: str, modules: Collection[str]) -> bool:
    """Return whether a tensor is the matrix of one of these modules, not its bias."""
    return name.endswith(".weight") and _module(name) in modules


def _name_in(checkpoint: Checkpoint, name: str) -> str | None:
    """Return a checkpoint's name of a tensor, None if it has none."""
    renamed = [new + name.removeprefix(old) for old, new in _RENAMED if name.startswith(old)]
    longer = [prefix + name for prefix in _PREFIXES]
    shorter = [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)]
    return next((each for each in (*renamed, *longer, *shorter) if each in checkpoint), None)


def _shapes(shape: tuple[int, ...], base: tuple[int, ...]) -> str:
    return f"is for the shape {list(shape)}, the base model's is {list(base)}"
