"""The extension's recorded step: it refuses bad operands before a kernel would write out of bounds."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.ops.helpers import EXACT, random_source
from tests.support.batches import flat_rows
from tests.support.memory import resident_bytes
from tgi_asgi import _C, ops

INT32_MAX = 2**31 - 1
ROTATIONS = np.ones((16, 16), np.float32)

Make = Callable[[_C.Program], Any]
Call = Callable[..., object]


def make_program(max_tokens: int = 8, max_rows: int = 2, max_sequences: int = 1) -> _C.Program:
    return _C.Program(
        max_tokens=max_tokens, max_sequences=max_sequences, max_rows=max_rows, max_context=16
    )  # fmt: skip


@functools.cache
def pool() -> _C.KvPool:
    """Return a pool of one layer with one KV head."""
    return _C.KvPool(layers=[(1, 32, 32, 0)], num_blocks=2, block_size=16, precision="float32")


@functools.cache
def matrix(rows: int) -> Any:
    """Return a weight of 64 columns."""
    return ops.linear_weight(random_source(rows, 64)[1], EXACT).made.matrix


def product(rows: int, source: Any) -> _C.Product:
    return _C.Product(weight=matrix(rows), source=source)


def heads(**change: Any) -> _C.Heads:
    return _C.Heads(**{"pool": pool(), "layer": 0, "num_heads": 2, "true_dim": 32, "scale": 0.2, **change})


def rows(program: _C.Program) -> Any:
    return program.rows(64)


def head_rows(program: _C.Program) -> Any:
    return program.rows(128)


def activation(program: _C.Program) -> Any:
    return program.activation(64, "float32")


def last_activation(program: _C.Program) -> Any:
    return program.activation(64, "float32", for_logits=True)


def query(program: _C.Program) -> Any:
    return program.query(pool(), 0, 2)


def norm_of(columns: int = 64, width: int | None = None) -> _C.Norm:
    ones = np.ones(columns, np.float32)
    return _C.Norm(weight=ones, bias=None, width=columns if width is None else width, eps=1e-5)


def norm(p: _C.Program, x: Any, out: Any, **change: bool) -> None:
    p.norm(x=x, norm=norm_of(), out=out, **{"for_logits": False, "is_private": False, **change})


def write_heads(p: _C.Program, rows: Any, out: Any, *, has_keys: bool = True, **change: Any) -> None:
    p.head_rows(rows=rows, heads=heads(**change), has_keys=has_keys, out=out)


def attend(p: _C.Program, q: Any, **out: Any) -> None:
    p.attention(q=q, pool=pool(), layer=0, true_dim=32, spec=_C.AttentionSpec(scale=1.0), **out)


# Every operator with the buffers that it accepts.
OPERATORS: dict[str, tuple[Call, dict[str, Make]]] = {
    "embed": (
        lambda p, out: p.embed(table=matrix(32), factor=1.0, positions=None, out=out),
        {"out": rows},
    ),
    "embed_add": (
        lambda p, rows: p.embed_add(table=matrix(32), factor=1.0, rows=rows),
        {"rows": rows},
    ),
    "image_rows": (lambda p, x: p.image_rows(x=x, level=0, adds=False), {"x": rows}),
    "norm_in_place": (lambda p, x: p.norm_in_place(norm=norm_of(), x=x), {"x": rows}),
    "up": (
        lambda p, source, out: p.up(
            product=product(64, source), activation="xielu", alphas=(0.5, 0.5), out=out
        ),
        {"source": activation, "out": activation},
    ),
    "norm": (norm, {"x": rows, "out": activation}),
    "norm of logits": (functools.partial(norm, for_logits=True), {"x": rows, "out": last_activation}),
    "norm_add": (
        lambda p, **given: p.norm_add(norm=norm_of(), factor=1.0, scale=1.0, **given),
        {"rows": rows, "x": rows},
    ),
    "pack": (lambda p, **given: p.pack(**given), {"rows": rows, "out": activation}),
    "linear": (
        lambda p, source, out: p.linear(product=product(64, source), out=out),
        {"source": activation, "out": rows},
    ),
    "linear_add": (
        lambda p, source, x: p.linear_add(product=product(64, source), factor=1.0, x=x),
        {"source": activation, "x": rows},
    ),
    "qkv": (
        lambda p, source, out: p.qkv(products=[product(128, source)], heads=heads(), has_keys=True, out=out),
        {"source": activation, "out": query},
    ),
    "head_rows": (write_heads, {"rows": head_rows, "out": query}),
    "attention": (attend, {"q": query, "out": activation}),
    "attention to rows": (attend, {"q": query, "rows": rows}),
    "gate_up": (
        lambda p, source, out: p.gate_up(product=product(128, source), activation="silu", out=out),
        {"source": activation, "out": activation},
    ),
    "act_mul": (
        lambda p, **given: p.act_mul(activation="silu", first_column=0, **given),
        {"gate": rows, "up": rows, "out": activation},
    ),
    "logits": (
        lambda p, source: p.logits(product=product(64, source), vocab_size=60, scale=1.0, cap=0.0),
        {"source": last_activation},
    ),
    "end_cache_writes": (
        lambda p, rows, query: p.end_cache_writes(can_gather=True, rows=[rows], query=query),
        {"rows": rows, "query": query},
    ),
}
OPERANDS = [(operator, name) for operator, (_, buffers) in OPERATORS.items() for name in buffers]


@pytest.mark.parametrize("operator", OPERATORS)
def test_buffers_of_the_program_are_taken(operator: str) -> None:
    program = make_program()
    call, buffers = OPERATORS[operator]
    call(program, **{name: make(program) for name, make in buffers.items()})


@pytest.mark.parametrize(("operator", "operand"), OPERANDS)
@pytest.mark.parametrize("others", [(5, 1), (9, 3)], ids=str)
def test_a_buffer_of_another_program_s_size_is_refused(
    operator: str, operand: str, others: tuple[int, int]
) -> None:
    program, other = make_program(), make_program(*others)
    call, buffers = OPERATORS[operator]
    given = {name: make(other if name == operand else program) for name, make in buffers.items()}
    with pytest.raises(ValueError, match=r"must have the program's \d rows of|must be \[8, "):
        call(program, **given)


@pytest.mark.parametrize(
    ("operator", "operand"), [given for given in OPERANDS if given != ("end_cache_writes", "query")]
)
def test_a_buffer_that_is_none_is_refused(operator: str, operand: str) -> None:
    program = make_program()
    call, buffers = OPERATORS[operator]
    given = {name: None if name == operand else make(program) for name, make in buffers.items()}
    with pytest.raises((TypeError, ValueError)):
        call(program, **given)


def test_a_pool_that_is_none_is_refused() -> None:
    program = make_program()
    with pytest.raises(TypeError):
        heads(pool=None)
    with pytest.raises(TypeError):
        program.attention(
            q=query(program),
            pool=None,  # type: ignore[arg-type]
            layer=0,
            true_dim=32,
            spec=_C.AttentionSpec(scale=1.0),
            rows=rows(program),
        )


def test_what_is_for_the_rows_of_logits_has_no_room_for_all_tokens() -> None:
    program = make_program(max_tokens=4096, max_rows=1)
    for call, given in (
        (program.pack, {"rows": program.rows(64)}),
        (
            functools.partial(program.act_mul, activation="silu", first_column=0),
            {"gate": rows(program), "up": rows(program)},
        ),
    ):
        with pytest.raises(ValueError, match="`out` must have the program's 4096 rows of tokens, got 1"):
            call(**given, out=last_activation(program))
    with pytest.raises(ValueError, match="`source` must have the program's 1 rows of logits, got 4096"):
        OPERATORS["logits"][0](program, source=activation(program))


def test_a_private_norm_needs_room_for_every_thread() -> None:
    few = make_program(max_tokens=1)
    _C.set_num_threads(3)
    program = make_program(max_tokens=1)
    with pytest.raises(ValueError, match="`out` must have room for 3 threads' own copies, got 1"):
        norm(program, rows(program), activation(few), is_private=True)
    norm(program, rows(program), activation(program), is_private=True)
    norm(program, rows(program), activation(few))


@pytest.mark.parametrize("sizes", [(5, 11), (11, 5)], ids=str)
def test_ids_are_held_to_every_table(sizes: tuple[int, int]) -> None:
    program = make_program()
    for size in sizes:
        program.embed(table=matrix(size), factor=1.0, positions=None, out=rows(program))
    program.run(flat_rows([(0, 1)], [[0]], 16, ids=[4]), [])
    with pytest.raises(ValueError, match=r"`ids`\[0\] must be in \[0, 5\), got 7"):
        program.run(flat_rows([(0, 1)], [[0]], 16, ids=[7]), [])


@pytest.mark.parametrize(
    "order", [np.append(-1, np.arange(31)), np.full(32, -1, np.int64)], ids=["first", "nothing else"]
)
def test_a_table_with_padding_before_its_rows_is_refused(order: np.ndarray) -> None:
    source = random_source(31, 64)[1]
    table = _C.pack(sources=[source.data], format="F32", columns=64, order=order, arena=_C.Arena())
    program = make_program()
    with pytest.raises(ValueError, match="`table` must have its padding after"):
        program.embed(table=table, factor=1.0, positions=None, out=rows(program))


@pytest.mark.parametrize("name", ["max_tokens", "max_sequences", "max_rows", "max_context"])
@pytest.mark.parametrize("size", [0, -1, 2**31, 2**58])
def test_a_program_of_sizes_beyond_all_bounds_is_refused(name: str, size: int) -> None:
    sizes = {"max_tokens": 1, "max_sequences": 1, "max_rows": 1, "max_context": 16, name: size}
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        _C.Program(**sizes)


def test_buffers_whose_size_is_no_number_of_bytes_are_refused() -> None:
    program = make_program(max_tokens=INT32_MAX, max_rows=INT32_MAX)
    for make in (
        lambda: program.rows(INT32_MAX),
        lambda: program.rows(INT32_MAX, for_logits=True),
        lambda: program.activation(INT32_MAX, "float32"),
        lambda: program.query(pool(), 0, INT32_MAX),
    ):
        with pytest.raises(MemoryError):
            make()
    for columns in (2**31, 2**58, 2**62):
        with pytest.raises(ValueError, match="`columns` must be at most"):
            program.rows(columns)
        with pytest.raises(ValueError, match="`columns` must be at most"):
            program.activation(columns, "int8")
        with pytest.raises(ValueError, match="`columns` must be at most"):
            _C.pack(
                sources=[], format="F32", columns=columns, order=np.full(32, -1, np.int64), arena=_C.Arena()
            )
    with pytest.raises(ValueError, match="`num_heads` must be at most"):
        program.query(pool(), 0, 2**50)


def test_long_contexts_take_no_memory_before_threads_share_them() -> None:
    """At 2^24 tokens, partial results would occupy at least 50 MiB per thread if all were written."""
    program = _C.Program(max_tokens=8, max_sequences=1, max_rows=2, max_context=2**24)
    before = resident_bytes()
    attend(program, query(program), rows=rows(program))
    assert resident_bytes() - before < 8 << 20


def test_behind_the_last_write_nothing_is_written_or_read_of_all_tokens() -> None:
    program = make_program()
    program.end_cache_writes(can_gather=True, rows=[], query=None)
    for operator in ("embed", "embed_add", "image_rows", "qkv", "head_rows"):
        call, buffers = OPERATORS[operator]
        with pytest.raises(ValueError, match="`end_cache_writes` must come after"):
            call(program, **{name: make(program) for name, make in buffers.items()})
    write_heads(program, program.rows(64), query(program), has_keys=False, cosines=ROTATIONS, sines=ROTATIONS)


def test_a_query_without_a_scale_stays_as_it_is() -> None:
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    found = []
    for scale in (None, 1.0):
        program = make_program()
        given, out = program.rows(64), query(program)
        given.array()[:] = values
        write_heads(program, given, out, has_keys=False, scale=scale)
        program.run(flat_rows([(0, 8)], [[0]], 16), [])
        found.append(out.array().view(np.float32))
    np.testing.assert_array_equal(found[0], values)
    np.testing.assert_array_equal(found[1], values * np.float32(np.log2(np.e)))


def test_norms_that_do_not_fit_are_refused() -> None:
    program = make_program()
    for columns, width, message in (
        (48, 48, "groups of 48 columns must make up x, which has 64"),
        (32, 31, "groups of 31 columns must make up x, which has 64"),
        (64, 65, r"`width` must be in \[1, 64\], got 65"),
        (64, 0, r"`width` must be in \[1, 64\], got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            program.norm_in_place(norm=norm_of(columns, width), x=rows(program))
    for first in (-1, 33, 1 << 62):
        with pytest.raises(
            ValueError, match=rf"columns \[{first}, {first} \+ 32\) must be in x, which has 64"
        ):
            program.norm_in_place(norm=norm_of(32), x=rows(program), first_column=first)
    for columns in (0, -1, 65):
        with pytest.raises(ValueError, match=rf"`columns` must be in \[1, 64\], got {columns}"):
            program.pack(rows=rows(program), out=activation(program), columns=columns)
    ones = np.ones(64, np.float32)
    with pytest.raises(ValueError, match=r"`bias` must have shape \[64\]"):
        uneven = _C.Norm(weight=ones, bias=ones[:32], width=64, eps=1e-5)
        program.norm_in_place(norm=uneven, x=rows(program))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": norm_of(64)}, r"`k_norm` must have shape \[32\]"),
        ({"query": norm_of(96)}, r"`q_norm` must have shape \[64\]"),
        ({"is_whole": True}, "norms over all heads are those of `head_rows`"),
        ({"is_whole": True, "is_last": True}, "must be an RMSNorm before the rotation"),
        ({"is_whole": True, "has_values": True}, "values are normalised with the RMSNorms of single heads"),
    ],
)
def test_norms_of_heads_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    program = make_program()
    is_whole = bool(change.get("is_whole"))
    query_norm = norm_of(64 if is_whole else 32)
    norms = _C.HeadNorms(
        **{
            "query": query_norm, "key": norm_of(32), "is_whole": False, "is_last": False,
            "has_values": False, **change,
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        program.qkv(
            products=[product(128, activation(program))], heads=heads(norms=norms), has_keys=True,
            out=query(program),
        )  # fmt: skip


def test_positions_are_held_to_their_table_without_a_cache() -> None:
    program = make_program()
    with pytest.raises(ValueError, match=r"`positions` must have shape \[-1, 64\]"):
        program.embed(table=matrix(32), factor=1.0, positions=np.ones((4, 32), np.float32), out=rows(program))
    program.embed(table=matrix(32), factor=1.0, positions=np.ones((4, 64), np.float32), out=rows(program))
    program.run(flat_rows([(3, 4)], [[0]], 16, ids=[1]), [])
    with pytest.raises(ValueError, match=r"`positions`\[0\] must be in \[0, 4\), got 4"):
        program.run(flat_rows([(4, 5)], [[0]], 16, ids=[1]), [])


def batch(start: int, stop: int, num_generated: int = 0) -> _C.FlatRows:
    """Return the step that computes positions [start, stop) of slot 0, which has one block."""
    return _C.FlatRows(
        ids=range(start, stop), positions=range(start, stop), slots=range(start, stop),
        query_start=[0, stop - start], context_len=[stop], block_table=np.zeros((1, 1), np.int32),
        row_slots=[0], num_generated=num_generated,
    )  # fmt: skip


@pytest.mark.parametrize("num_generated", [-1, 3])
def test_generated_tokens_are_some_of_a_step_s_without_a_cache(num_generated: int) -> None:
    program = make_program()
    program.pack(rows=rows(program), out=program.activation(64, "by_kind"))
    program.run(batch(0, 2, 2), [])
    message = rf"`num_generated` must be in \[0, 2\], got {num_generated}"
    with pytest.raises(ValueError, match=message):
        program.run(batch(0, 2, num_generated), [])


@functools.cache
def conv() -> _C.ShortConv:
    return _C.ShortConv(
        weight=np.zeros((2, 64), np.float32), bias=None, first_column=0, in_gate=None, out_gate=None,
        has_silu=False,
    )  # fmt: skip


def test_two_rows_of_a_step_have_no_state_in_common() -> None:
    program = make_program(max_sequences=2)
    states = _C.StatePool(layers=[(64, 2, 0)], num_slots=2)
    program.short_conv(rows=rows(program), conv=conv(), states=states, layer=0, out=rows(program))
    step = _C.FlatRows(
        ids=[1, 2], positions=[0, 0], slots=[0, 1], query_start=[0, 1, 2], context_len=[1, 1],
        block_table=np.zeros((2, 1), np.int32), row_slots=[0, 0],
    )  # fmt: skip
    with pytest.raises(ValueError, match="two rows of a step have one slot"):
        program.run(step, [])


def test_a_step_whose_states_are_missing_leaves_the_logits_of_the_one_before() -> None:
    program = make_program()
    x, source = rows(program), last_activation(program)
    program.embed(table=matrix(32), factor=1.0, positions=None, out=x)
    states = _C.StatePool(layers=[(64, 2, 0)], num_slots=1)
    program.short_conv(rows=x, conv=conv(), states=states, layer=0, out=rows(program))
    norm(program, x, source, for_logits=True)
    program.logits(product=product(64, source), vocab_size=60, scale=1.0, cap=0.0)
    expected = program.run(batch(0, 2), [0, 1]).copy()
    with pytest.raises(ValueError, match="slot 0 has no state of 5 tokens"):
        program.run(batch(5, 6), [0])
    np.testing.assert_array_equal(program.run_head([0, 1]), expected)


def shard_group(**change: int) -> _C.ShardGroup:
    """Return the first of two shards whose other one is not there."""
    sizes = {"num_columns": 64, "max_tokens": 8, "max_sequences": 1, "max_rows": 2, "vocab_size": 64}
    shape = _C.ShardShape(
        count=2, num_members=_C.num_threads(), num_groups=1, table_width=1, **{**sizes, **change}
    )
    with tempfile.TemporaryFile() as file:
        file.truncate(shape.num_bytes)
        return _C.ShardGroup(fd=file.fileno(), rank=0, shape=shape)


def test_blocks_are_copied_in_all_shards_or_in_none() -> None:
    many = 5000  # more than the shards' mailbox has room for
    cache = _C.KvPool(layers=[(1, 2, 2, 0)], num_blocks=many + 1, block_size=16, precision="float32")
    program = make_program()
    program.set_shards(shard_group(), first_vocab_id=0)
    program.attention(
        q=program.query(cache, 0, 1), pool=cache, layer=0, true_dim=2, spec=_C.AttentionSpec(scale=1.0),
        rows=program.rows(2),
    )  # fmt: skip
    memory = cache.memory()
    memory[0] = 7
    with pytest.raises(ValueError, match="must fit the shards' mailbox"):
        program.copy_blocks([(0, to) for to in range(1, many + 1)])
    assert not memory[1:].any()


@pytest.mark.parametrize("names", [("max_tokens", "num_groups"), ("max_rows", "vocab_size")], ids=str)
def test_shards_of_sizes_beyond_all_memory_are_refused(names: tuple[str, str]) -> None:
    sizes = dict.fromkeys(
        ("count", "num_members", "num_columns", "max_tokens", "max_sequences", "max_rows", "vocab_size",
         "num_groups", "table_width"),
        1,
    )  # fmt: skip
    with pytest.raises(MemoryError):
        assert _C.ShardShape(**sizes | dict.fromkeys(names, INT32_MAX)).num_bytes


def test_a_gate_has_no_numbers_of_its_own() -> None:
    program = make_program()
    with pytest.raises(ValueError, match=r"`activation` must be silu, .* got xielu"):
        program.gate_up(
            product=product(128, activation(program)), activation="xielu", out=activation(program)
        )
