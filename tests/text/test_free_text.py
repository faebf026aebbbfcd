"""Free text of answers, against the grammar's own masks: the tokens it may contain, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.text.constrain.source import GrammarSource, json_schema, literal
from tgi_asgi.text.tools import FORMATS
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import Mark
from tgi_asgi.text.tools.reasoning import STYLES

EOS, CALL, THINK, END_THINK = range(4)
FIRST_BYTE = 4
PIECES = (
    b"a <",
    b"<tool",
    b"_call>",
    b"x<tool_call>",
    b"<tool_call>\n{",
    b"<tool_call>x",
    b"</think>",
    b"<th",
)
VOCAB_SIZE = FIRST_BYTE + 256 + len(PIECES)
SPECIAL = {"<tool_call>": CALL, "<think>": THINK, "</think>": END_THINK}
TOOL = ToolSpec("go", {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]})


class Pieces:
    """Special tokens, bytes, and pieces with parts of marks; the model has two ids more than these."""

    vocab_size = VOCAB_SIZE
    eos_ids = frozenset({EOS})
    special_ids = frozenset(range(FIRST_BYTE))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < FIRST_BYTE:
            return b"<special>"
        index = token_id - FIRST_BYTE
        return bytes([index]) if index < 256 else PIECES[index - 256]

    def encode_inside(self, text: str) -> list[int]:
        return [FIRST_BYTE + byte for byte in text.encode()]


def piece(data: bytes) -> int:
    return FIRST_BYTE + (data[0] if len(data) == 1 else 256 + PIECES.index(data))


def tokens(text: str) -> list[int]:
    return Pieces().encode_inside(text)


def token_mark(text: str) -> str:
    return f"<[{SPECIAL[text]}]>" if text in SPECIAL else literal(text)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(Pieces(), VOCAB_SIZE)


def auto(mark: Mark) -> GrammarSource:
    source = answer_grammar(None, ToolUse(FORMATS["hermes"], [TOOL]), mark=mark)
    assert source is not None
    return source


def allowed(grammar: Grammar, token_ids: Sequence[int]) -> set[int]:
    """Return the tokens that the grammar allows after `token_ids`, all of which it reads."""
    matcher = grammar.matcher()
    for token_id in token_ids:
        matcher.accept(token_id)
    mask = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
    matcher.fill_mask(mask)
    assert matcher.error is None
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def is_whole(token_id: int) -> bool:
    try:
        Pieces().token_bytes(token_id).decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("mark", [literal, token_mark])
@pytest.mark.parametrize("text", ["", "Hello", "a > b, not c\n\n", "\u00e9\u4e16"])
def test_free_text_may_hold_what_the_grammar_allows(compiler: GrammarCompiler, mark: Mark, text: str) -> None:
    grammar = compiler.compile(auto(mark))
    watch = grammar.watch()
    assert watch is not None
    assert not any(watch.push(token_id) for token_id in tokens(text))
    masked = set(watch.part.masked_ids)
    expected = allowed(grammar, tokens(text))
    assert {i for i in range(VOCAB_SIZE) if i not in masked and is_whole(i)} == {
        i for i in expected if is_whole(i)
    }


def test_a_mark_of_one_token_ends_free_text(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(auto(token_mark))
    watch = grammar.watch()
    assert watch is not None
    for token_id in [*tokens("a < b <tool_call>"), *map(piece, (b"x<tool_call>", b"<tool"))]:
        assert not watch.push(token_id), "plain text must not count as the mark"
    assert watch is not None and watch.push(CALL) and watch.is_over


@pytest.mark.parametrize("data", [b"<", b"a <", b"<tool", b"x<tool_call>"])
def test_a_token_that_may_begin_a_mark_ends_free_text(compiler: GrammarCompiler, data: bytes) -> None:
    watch = compiler.compile(auto(literal)).watch()
    assert watch is not None
    assert not any(watch.push(i) for i in tokens("Hello tool_call>"))
    assert watch.push(piece(data)) and watch.is_over


def test_tokens_that_go_on_wrongly_behind_a_mark_are_not_free_text(compiler: GrammarCompiler) -> None:
    watch = compiler.compile(auto(literal)).watch()
    assert watch is not None
    assert piece(b"<tool_call>x") in watch.part.masked_ids
    assert piece(b"<tool_call>\n{") not in watch.part.masked_ids


@pytest.mark.parametrize("mark", [literal, token_mark])
def test_a_matcher_that_skips_free_text_is_where_one_is_that_reads_it(
    compiler: GrammarCompiler, mark: Mark
) -> None:
    grammar = compiler.compile(auto(mark))
    opening = [CALL] if mark is token_mark else tokens("<tool_call>")
    output = [*tokens("I look it up. "), *opening, *tokens('\n{"na')]
    skipping = grammar.matcher(output)
    mask = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
    skipping.fill_mask(mask)
    assert skipping.error is None
    found = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
    assert found == allowed(grammar, output) == {FIRST_BYTE + ord("m")}
    assert grammar.matcher([*tokens("\u00e9")[:1], THINK, *output]).error is None, "free text may be anything"


def test_reasoning_is_a_free_part_of_its_own(compiler: GrammarCompiler) -> None:
    source = answer_grammar(None, ToolUse(FORMATS["hermes"], [TOOL]), STYLES[0], mark=token_mark)
    assert source is not None
    grammar = compiler.compile(source)
    with_it = [THINK, *tokens("hm <"), END_THINK, *tokens("\n\nSo")]
    for text in ([], with_it[:1], with_it[:4], with_it[:-4], with_it, tokens("So")):
        watch = grammar.watch()
        assert watch is not None
        changes = [token_id for token_id in text if watch.push(token_id)]
        assert not watch.is_over
        if text == with_it:
            assert changes == [THINK, END_THINK]
        specials = {EOS, CALL, THINK, END_THINK}
        assert specials - set(watch.part.masked_ids) == specials & allowed(grammar, text)
    assert watch is not None and watch.push(CALL) and watch.is_over
    output = [*with_it, CALL, *tokens('\n{"na')]
    matcher = grammar.matcher(output)
    assert matcher.error is None and matcher.forced_ids()[:1] == tokens("m")


def test_constrained_content_is_free_up_to_the_end_of_open_reasoning(compiler: GrammarCompiler) -> None:
    content = json_schema({"type": "integer"})
    source = answer_grammar(content, None, STYLES[0], is_reasoning_open=True, mark=token_mark)
    assert source is not None
    watch = compiler.compile(source).watch()
    assert watch is not None
    assert not any(watch.push(i) for i in tokens("let me think"))
    assert watch.push(END_THINK) and watch.is_over


@pytest.mark.parametrize(
    "source",
    [
        answer_grammar(None, ToolUse(FORMATS["hermes"], [TOOL], must_call=True), mark=token_mark),
        answer_grammar(None, ToolUse(FORMATS["llama3_json"], [TOOL]), mark=token_mark),
        answer_grammar(json_schema({"type": "integer"}), ToolUse(FORMATS["hermes"], [TOOL]), mark=token_mark),
        answer_grammar(json_schema({"type": "integer"}), None, STYLES[0], mark=token_mark),
    ],
)
def test_what_is_constrained_from_its_first_character_is_not_free(
    compiler: GrammarCompiler, source: GrammarSource
) -> None:
    assert compiler.compile(source).watch() is None
