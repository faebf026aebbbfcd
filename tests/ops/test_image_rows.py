"""The operator image_rows and what steps bring: rows, rotary positions, tokens that see later ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ops.helpers import EXACT, angles, random_source, rope_table
from tests.ops.test_attention import Sequences
from tests.reference.attention import attention as reference
from tests.reference.compare import assert_close, assert_within
from tests.reference.layers import rotate
from tests.support.batches import flat_rows
from tests.support.eager_ops import norm_weight
from tests.support.kv import poisoned_pool
from tests.support.open_program import OpenProgram
from tgi_asgi import _C, ops
from tgi_asgi.ops.recorder import Kind

TABLE = 30  # positions of the rotary table
LIMITS = ops.StepLimits(max_tokens=32, max_sequences=2, max_rows=4, max_context=32)


def images(tokens: list[int], rows: Any = None, **given: Any) -> Any:
    found = np.empty((1, len(tokens), 0), np.float32) if rows is None else rows
    return ops.ImageRows(np.array(tokens, np.int64), found, **given).native


class Rows:
    """A program whose residual is an embedding with images' rows of levels 0 and 2."""

    def __init__(self, hidden: int) -> None:
        self.matrix, source = random_source(50, hidden)
        table = ops.linear_weight(source, EXACT, is_vocabulary=True)
        recorder = ops.Recorder()
        x = ops.image_rows(ops.image_rows(ops.embed(recorder.batch, table)), 2)
        ops.head(x, norm_weight(torch.ones(hidden), 1e-5), table)
        self.program, self.hidden = ops.CpuProgram(recorder, LIMITS), hidden

    def run(self, ids: list[int], given: Any = None, pad_id: int = 7) -> torch.Tensor:
        batch = flat_rows([(0, len(ids))], [[0, 1]], 16, ids=ids)
        if given is not None:
            batch.set_images(given, pad_id)
        self.program.run(batch, [len(ids) - 1])
        residual = self.program.residual
        assert not residual[: len(ids), self.hidden :].any()
        return torch.from_numpy(residual[: len(ids), : self.hidden].copy())


@pytest.mark.parametrize("hidden", [32, 72, 129])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_take_the_place_of_tokens_or_are_added(kernel_set: str, hidden: int, threads: int) -> None:
    _C.set_num_threads(threads)
    graph, ids = Rows(hidden), torch.randint(50, (19,)).tolist()
    tokens, rows = [0, 3, 4, 5, 18], np.random.default_rng(0).normal(size=(3, 5, hidden)).astype(np.float32)
    rows[1] = np.nan  # a level that this model does not read
    expected = graph.matrix[ids].clone()
    assert torch.equal(graph.run(ids), expected)
    found = graph.run(ids, images(tokens, rows))
    expected[tokens] = torch.from_numpy(rows[0] + rows[2])
    assert torch.equal(found, expected)
    assert torch.equal(graph.run(ids), graph.matrix[ids])  # nothing is left for the next step


def test_ids_of_images_tokens_are_not_read() -> None:
    batch = flat_rows([(0, 4)], [[0]], 16, ids=[1, 2, 3, 4])
    batch.set_images(images([1, 2]), 9)
    assert batch.ids.tolist() == [1, 9, 9, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": np.zeros((1, 2, 32), np.float32)}, "must have 3 levels of 32 columns, got 1 of 32"),
        ({"rows": np.zeros((3, 2, 64), np.float32)}, "must have 3 levels of 32 columns, got 3 of 64"),
        ({"tokens": [1, 4]}, r"`tokens`\[1\] must be in \[0, 4\), got 4"),
        ({"tokens": [-1, 2]}, r"`tokens`\[0\] must be in \[0, 4\), got -1"),
        ({"tokens": [2, 2]}, "`tokens` must ascend"),
        ({"tokens": [1]}, r"`rows` must be \[levels, images' tokens, columns\]"),
        ({"rotary": np.zeros(3, np.int64)}, "must have an element a token of the step, 4"),
        ({"visible_until": np.zeros(5, np.int64)}, "must have an element a token of the step, 4"),
        ({"rotary": np.full(4, -1)}, "`rotary` must be at least 0, got -1"),
        ({"cosines": np.zeros((1, 16), np.float32)}, "cosines and sines come together"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    values = {"tokens": [1, 2], "rows": np.zeros((3, 2, 32), np.float32), **given}
    graph = Rows(32)
    with pytest.raises(ValueError, match=message):
        graph.run([1, 2, 3, 4], images(values.pop("tokens"), values.pop("rows"), **values))
    with pytest.raises(ValueError, match="`level` must not be negative"):
        ops.image_rows(ops.Recorder().value(Kind.RESIDUAL, 32), -1)


class Heads:
    """A program that writes rotated queries, whose unrotated values are known."""

    def __init__(self, rotary_dim: int, *, is_interleaved: bool) -> None:
        self.a, self.is_interleaved, self.rotary_dim = torch.randn(5, 32), is_interleaved, rotary_dim
        parts = [random_source(heads * 48, 32) for heads in (2, 1, 1)]
        self.plain = (self.a.double() @ parts[0][0].double().T).view(5, 2, 48)
        self.rope = rope_table(rotary_dim, TABLE)
        heads = ops.QkvHeads(2, 1, 48, rotary_dim, is_interleaved=is_interleaved)
        weight = ops.qkv_weight([source for _, source in parts], EXACT, heads)
        layer = poisoned_pool(num_blocks=2, num_kv_heads=1, head_dim=48, dtype="float32").layers[0]
        recorder = ops.Recorder()
        a = recorder.value(Kind.ACTIVATION, 32)
        self.q = ops.qkv(a, weight, layer, self.rope)
        self.program = OpenProgram(recorder, LIMITS, inputs=[a], outputs=[self.q])
        self.program.write(a, self.a.numpy())

    def run(self, given: Any = None) -> torch.Tensor:
        positions = np.arange(4, 9)
        batch = _C.FlatRows(
            ids=0 * positions, positions=positions, slots=positions, query_start=[0, 5], context_len=[9],
            block_table=np.zeros((1, 1), np.int32), row_slots=[1],
        )  # fmt: skip
        if given is not None:
            batch.set_images(given, 0)
        self.program.run(batch, [])
        return torch.from_numpy(self.program.read(self.q, 5)).view(5, 2, 48)

    def rotated(self, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        return rotate(self.plain, cosines, sines, is_interleaved=self.is_interleaved)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [48, 16, 8])
def test_tokens_turn_by_rows_of_the_model_s_table_or_of_the_step_s(
    kernel_set: str, rotary_dim: int, is_interleaved: bool
) -> None:
    heads, pairs = Heads(rotary_dim, is_interleaved=is_interleaved), rotary_dim // 2
    cosines, sines = angles(heads.rope, torch.tensor([3, 0, 29, 0, 11]))
    own = np.random.default_rng(1).integers(0, TABLE, (2, pairs))  # a position for each pair
    table = [each[own, np.arange(pairs)] for each in (heads.rope.cos, heads.rope.sin)]
    for row, place in ((1, 1), (3, 0)):
        cosines[row], sines[row] = (torch.from_numpy(each[place]) for each in table)
    given = images([], rotary=np.array([3, -2, 29, -1, 11]), cosines=table[0], sines=table[1])
    assert_close(heads.run(given), heads.rotated(cosines, sines), length=32)
    here = angles(heads.rope, torch.arange(4, 9))
    assert_close(heads.run(), heads.rotated(*here), length=32)  # nothing is left for the next step


def test_a_slot_s_tokens_turn_by_positions_that_images_have_moved(kernel_set: str) -> None:
    heads = Heads(16, is_interleaved=False)
    heads.program.native.set_rotary_shift(0, -1)  # of another slot
    heads.program.native.set_rotary_shift(1, -4)
    assert_close(heads.run(), heads.rotated(*angles(heads.rope, torch.arange(5))), length=32)
    given = images([], rotary=np.arange(9, 14))
    assert_close(heads.run(given), heads.rotated(*angles(heads.rope, torch.arange(9, 14))), length=32)
    heads.program.native.set_rotary_shift(1, 0)
    assert_close(heads.run(), heads.rotated(*angles(heads.rope, torch.arange(4, 9))), length=32)


def test_rotary_positions_are_within_the_tables() -> None:
    heads = Heads(16, is_interleaved=False)
    with pytest.raises(ValueError, match="`rotary` must be below 30, got 30"):
        heads.run(images([], rotary=np.array([0, 1, 2, 3, 30])))
    wide = np.zeros((1, 32), np.float32)
    with pytest.raises(ValueError, match="must have the columns of the model's, 16, got 32"):
        heads.run(images([], rotary=np.array([0, 1, 2, 3, -1]), cosines=wide, sines=wide))
    for shift, place in ((-5, -1), (22, 30)):
        heads.program.native.set_rotary_shift(1, shift)
        with pytest.raises(ValueError, match=rf"`rotary`\[\d\] must be in \[0, 30\), got {place}"):
            heads.run()
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=rf"a slot must be in \[0, 2\), got {slot}"):
            heads.program.native.set_rotary_shift(slot, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_of_an_image_see_each_other_where_the_layer_lets_them(
    kernel_set: str, dtype: ops.KvDtype, window: int | None, threads: int
) -> None:
    _C.set_num_threads(threads)
    world = Sequences(4, 2, 64, 16, dtype, window=window)
    context, count = 330, 300
    sequence, q = world.add(context), world.queries(count)
    ends = torch.arange(context - count, context) + 1
    ends[20:90] = ends[89]
    ends[200:290] = ends[289]
    keys, values = world.keys[sequence], world.values[sequence]
    tolerance = {"float32": 2e-5, "bfloat16": 1e-2, "int8": 2e-4}[dtype]
    for sees_ahead in (True, False):
        found = _attend(world, sequence, q, ends, sees_ahead=sees_ahead)
        wanted = reference(q, keys, values, 64**-0.5, window, visible_until=ends if sees_ahead else None)
        assert_within(found, wanted, whole=tolerance, worst=2 * tolerance)


def _attend(
    world: Sequences, sequence: int, q: torch.Tensor, ends: torch.Tensor, *, sees_ahead: bool
) -> torch.Tensor:
    """Compute attention of a step whose tokens see up to these ends."""
    made = flat_rows

    def with_ends(*args: Any, **kwargs: Any) -> ops.FlatRows:
        batch = made(*args, **kwargs)
        batch.set_images(images([], visible_until=ends.numpy()), 0)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.ops.test_attention.flat_rows", with_ends)
        world.rules = {"sees_ahead": sees_ahead}
        return world.run([(sequence, len(world.keys[sequence]), q)])


def test_no_token_sees_beyond_its_sequence() -> None:
    world = Sequences(2, 1, 32, 16, "float32")
    sequence, q = world.add(20), world.queries(20)
    with pytest.raises(ValueError, match="`visible_until` must be at most 20, got 21"):
        _attend(world, sequence, q, torch.full((20,), 21), sees_ahead=True)
