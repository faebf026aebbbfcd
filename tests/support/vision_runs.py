"""Run tiny vision models: compute logits step by step, or serve a model over a socket.

model = load(folder)
logits, program = run(model, [(prompt, answer), ...], chunks=[7, 1000])
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.serving import serving
from tests.support.vision_models import Prompt
from tgi_asgi import ops
from tgi_asgi.app import App, create_app
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.open import OpenGeneric
from tgi_asgi.models.generic.steps import BLOCK, flat_rows, make_pool
from tgi_asgi.models.generic.vision.native import NativeImages, NativeVisionProgram
from tgi_asgi.models.generic.vision.program import SequentialVisionProgram, VisionProgram
from tgi_asgi.models.generic.vision.tower import Tower
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.runner.programs import make_program
from tgi_asgi.settings import Settings
from tgi_asgi.types import Bidirectional

_MIB = 1 << 20


def load(
    folder: Path, quantised: str | None = None, *, is_exact: bool = True,
    arithmetic: ops.Arithmetic | None = None,
) -> GenericModel:  # fmt: skip
    """Load a checkpoint, by default on the CPU and in float32."""
    config = json.loads((folder / "config.json").read_text())
    weights = SafetensorsWeights(folder, Quantisation.from_json(config))
    opened = OpenGeneric(folder, config, trusts_code=False)
    model = opened.load(weights, arithmetic or ops.Packing(is_exact, quantised), 2048)
    assert isinstance(model, GenericModel)
    return model


def load_native(folder: Path, arithmetic: ops.Arithmetic | None = None) -> Model | None:
    """Load a checkpoint as it is served, in float32 by default; None if no native family computes it."""
    with OpenModel(ModelFiles(folder.name, None, "directory", folder), model_impl="auto") as opened:
        if opened.kind != "native":
            return None
        model = opened.load(arithmetic or ops.Packing(is_exact=True), 2048)
    assert model.kind == "native"
    return model


def tower_of(model: GenericModel | Model) -> Tower:
    """Return the tower of a model of either kind."""
    holder = model if model.kind == "generic" else model.images
    assert isinstance(holder, GenericModel | NativeImages) and holder.tower is not None
    return holder.tower


def run(
    model: GenericModel | Model, sequences: Sequence[tuple[Prompt, list[int]]], chunks: Sequence[int]
) -> tuple[list[np.ndarray], VisionProgram | SequentialVisionProgram | NativeVisionProgram]:
    """Return the logits [n_tokens, vocab] of each sequence of prompt and answer, all in one batch.

    Prompts are computed in chunks of these sizes, extended where a prompt or image must not be cut; answers
    are computed token by token.
    """
    longest = max(len(prompt.ids) + len(answer) for prompt, answer in sequences)
    width = -(-longest // BLOCK)
    program = _program(model, width, len(sequences), longest)
    for slot, (prompt, _) in enumerate(sequences):
        program.start(slot, prompt.ids, prompt.images)
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    while True:
        rows = []
        for slot, (prompt, answer) in enumerate(sequences):
            start = sum(map(len, found[slot]))
            ids = [*prompt.ids, *answer]
            if start < len(ids):
                end = _end(program.bidirectional, prompt, start, chunks[slot])
                rows.append((slot, np.array(ids[start:end]), start))
        if not rows:
            break
        batch = flat_rows(rows, width)
        logits = program.run(batch, range(len(batch.ids)))
        if model.kind == "generic":
            logits = logits[:, : model.module.get_output_embeddings().out_features]
        parts = np.split(logits, np.cumsum([len(ids) for _, ids, _ in rows])[:-1])
        for (slot, _, _), part in zip(rows, parts, strict=True):
            found[slot].append(part.copy())
    return [np.concatenate(parts) for parts in found], program


def _program(
    model: GenericModel | Model, width: int, num_sequences: int, longest: int
) -> VisionProgram | SequentialVisionProgram | NativeVisionProgram:
    if model.kind == "generic":
        blocks = make_pool(model, width * num_sequences)
        program = model.program([] if blocks is None else blocks.layers, longest, _MIB)
        assert isinstance(program, VisionProgram | SequentialVisionProgram)
        return program
    pool = ops.KvPool(
        model.config.caches, num_blocks=width * num_sequences, block_size=BLOCK, dtype="float32"
    )
    most = width * BLOCK * num_sequences
    limits = ops.StepLimits(
        max_tokens=most, max_sequences=num_sequences, max_rows=most, max_context=width * BLOCK
    )
    made = make_program(model, pool.layers, limits, image_cache=_MIB)
    assert isinstance(made, NativeVisionProgram)
    return made


def _end(bidirectional: Bidirectional, prompt: Prompt, start: int, chunk: int) -> int:
    """Return the end position of a prompt chunk that starts at `start`."""
    if start >= len(prompt.ids):
        return start + 1
    end = min(start + chunk, len(prompt.ids))
    if bidirectional is Bidirectional.PROMPT:
        return len(prompt.ids)
    for image in prompt.images if bidirectional is Bidirectional.IMAGES else ():
        stop = image.start + image.num_tokens
        end = stop if image.start < end < stop else end
    return end


@asynccontextmanager
async def served(folder: Path, **options: Any) -> AsyncIterator[tuple[str, App]]:
    """Serve a checkpoint in this process; yield its URL and the app."""
    values = {"dtype": "float32", "num_threads": 1, "max_batch_total_tokens": 4096, **options}
    app = create_app(Settings(model_id=str(folder), hostname="127.0.0.1", port=0, **values))
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    app.on_ready = lambda _: ready.set_result(None)
    app.on_fatal = ready.set_exception
    async with serving(app) as url:
        app.start()
        try:
            await asyncio.wait_for(ready, 60)
            yield url, app
        finally:
            await app.stop()


def program_of(app: App) -> VisionProgram:
    """Return the program that runs a served model's steps."""
    assert app.context.served is not None
    engine: Any = app.context.served.engine
    program: VisionProgram = engine._runner._program
    return program
