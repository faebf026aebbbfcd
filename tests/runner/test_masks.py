"""Grammar masks with the real operator: ends, `min_tokens`, resumption, and rows without a grammar."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.toy_tokenizer import EOS, VOCAB_SIZE, ToyTokenizer
from tgi_asgi.runner.masks import SlotMasks
from tgi_asgi.runner.plan import Sampled, SlotStart
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)


@pytest.fixture
def masks() -> SlotMasks:
    return SlotMasks(VOCAB_SIZE)


def start(slot: int, grammar: Grammar | None, **changes: Any) -> SlotStart:
    return SlotStart(slot, GREEDY, 0, [1, 2], grammar=grammar, **changes)


def allowed(masks: SlotMasks, *slots: int) -> list[set[int]]:
    mask = masks.compute(slots)
    if mask is None:
        return [set(range(VOCAB_SIZE)) for _ in slots]
    words = [[word & 0xFFFFFFFF for word in row] for row in mask.tolist()]
    return [{i for i in range(VOCAB_SIZE) if row[i // 32] >> i % 32 & 1} for row in words]


def accept(masks: SlotMasks, slot: int, token_id: int) -> Sampled:
    sampled = Sampled(token_id)
    masks.accept([slot], [sampled])
    return sampled


def test_rows_without_a_grammar_are_free_beside_one_that_has_it(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    assert masks.compute([0, 1]) is None
    masks.start(start(1, compiler.compile(sources.choice(["xy"]))))
    assert masks.compute([0, 2]) is None
    free, bound = allowed(masks, 0, 1)
    assert len(free) == VOCAB_SIZE
    assert bound == {ord("x")}


def test_the_token_after_which_nothing_can_follow_is_marked(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    masks.start(start(0, compiler.compile(sources.choice(["xy"]))))
    assert not accept(masks, 0, ord("x")).is_last
    assert accept(masks, 0, ord("y")).is_last
    # The step that was planned before the end was known still runs, so it must find a token to sample.
    assert len(*allowed(masks, 0)) == VOCAB_SIZE
    assert accept(masks, 0, 3).failure is None


def test_an_eos_where_the_text_may_end_is_the_last_token(masks: SlotMasks, compiler: GrammarCompiler) -> None:
    masks.start(start(0, compiler.compile(sources.regex("x+"))))
    assert allowed(masks, 0) == [{ord("x")}]
    assert not accept(masks, 0, ord("x")).is_last
    assert EOS in allowed(masks, 0)[0]
    assert accept(masks, 0, EOS).is_last


def test_a_new_sequence_frees_the_slot_of_the_old_one_s_grammar(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    masks.start(start(0, compiler.compile(sources.choice(["x"]))))
    masks.start(start(0, None))
    assert masks.compute([0]) is None


def test_a_resumed_sequence_goes_on_where_it_was(masks: SlotMasks, compiler: GrammarCompiler) -> None:
    masks.start(start(0, compiler.compile(sources.choice(["xyz"])), output_ids=list(b"xy")))
    assert allowed(masks, 0) == [{ord("z")}]
    grammar = compiler.compile(sources.regex("x{1,4}"))
    masks.start(start(0, grammar, output_ids=list(b"xx"), min_tokens=3, masked_ids=(EOS,)))
    assert EOS not in allowed(masks, 0)[0]
    accept(masks, 0, ord("x"))
    assert EOS in allowed(masks, 0)[0], "it has three tokens, two of them from before"


def test_free_text_under_masks_goes_on_inside_a_character(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    source = sources.GrammarSource(
        'start: TEXT | opening CALL\nTEXT: /(.|\\n)*/\nopening[lazy]: /(.|\\n)*/ "~"\nCALL: /[0-9]+;/',
        free=(sources.literal("~"),),
    )
    grammar = compiler.compile(source)
    assert grammar.watch() is not None
    text = list("aé".encode())[:-1]
    masks.start(start(0, grammar, min_tokens=9))
    for token_id in text:
        accept(masks, 0, token_id)
    masks.start(start(1, grammar, min_tokens=9, output_ids=text))
    running, resumed = allowed(masks, 0, 1)
    assert resumed == running == set(range(0x80, 0xC0))


def test_min_tokens_forbids_the_end_unless_the_grammar_leaves_nothing_else(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    masks.start(start(0, compiler.compile(sources.regex("x{1,4}")), min_tokens=3, masked_ids=(EOS, 259)))
    for _ in range(2):
        assert EOS not in allowed(masks, 0)[0]
        accept(masks, 0, ord("x"))
    assert EOS not in allowed(masks, 0)[0]
    accept(masks, 0, ord("x"))
    assert EOS in allowed(masks, 0)[0]
    masks.start(start(0, compiler.compile(sources.choice(["", "x"])), min_tokens=9, masked_ids=(EOS, 259)))
    accept(masks, 0, ord("x"))
    assert EOS in allowed(masks, 0)[0]


def test_a_sample_that_is_not_finite_does_not_move_the_matcher(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    masks.start(start(0, compiler.compile(sources.choice(["xy"]))))
    masks.accept([0], [Sampled(0, is_finite=False)])
    assert allowed(masks, 0) == [{ord("x")}]


def test_a_matcher_that_fails_says_so_and_leaves_the_row_free(
    masks: SlotMasks, compiler: GrammarCompiler
) -> None:
    masks.start(start(0, compiler.compile(sources.choice(["xy"]))))
    assert accept(masks, 0, ord("q")).failure
    assert len(*allowed(masks, 0)) == VOCAB_SIZE


def test_masks_of_many_slots_are_each_slot_s_own(masks: SlotMasks, compiler: GrammarCompiler) -> None:
    texts = ["abc", "bcd", "cde", "def", "efg", "fgh"]
    for slot, text in enumerate(texts):
        masks.start(
            start(slot, compiler.compile(sources.choice([text])), output_ids=list(text[: slot % 3].encode()))
        )
    accept(masks, 5, ord("q"))  # the matcher fails
    masks.start(start(6, None))
    order = [6, 3, 0, 5, 4, 1, 2]
    free = set(range(VOCAB_SIZE))
    expected = {slot: {ord(text[slot % 3])} for slot, text in enumerate(texts)} | {5: free, 6: free}
    assert allowed(masks, *order) == [expected[slot] for slot in order]


def along(masks: SlotMasks, slots: list[int], drafts: list[list[int]]) -> list[set[int]]:
    mask = masks.compute(slots, drafts)
    assert mask is not None and len(mask) == len(slots) + sum(map(len, drafts))
    words = [[word & 0xFFFFFFFF for word in row] for row in mask.tolist()]
    return [{i for i in range(VOCAB_SIZE) if row[i // 32] >> i % 32 & 1} for row in words]


def test_each_draft_has_the_mask_that_it_would_have_one_by_one(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(sources.regex("(ab|ac)?x?[0-9]{0,3}"))  # the text may end anywhere
    text = ToyTokenizer().encode("acx7", add_special_tokens=False)
    ahead, one_by_one = SlotMasks(VOCAB_SIZE), SlotMasks(VOCAB_SIZE)
    for masks in (ahead, one_by_one):
        for slot in (2, 3):
            masks.start(start(slot, grammar, min_tokens=4, masked_ids=(EOS,)))
    found = along(ahead, [0, 3, 2, 1], [[], list(text), [], [5]])
    expected = []
    for token_id in text:
        expected += allowed(one_by_one, 3)
        accept(one_by_one, 3, token_id)
    expected += allowed(one_by_one, 3)
    assert found[1:-2] == [*expected, expected[0]]
    assert found[0] == found[-1] == found[-2] == set(range(VOCAB_SIZE))
    assert allowed(ahead, 3) == expected[:1], "the matcher advanced with the drafts"


def test_drafts_are_cut_where_the_grammar_allows_no_more(compiler: GrammarCompiler) -> None:
    masks = SlotMasks(VOCAB_SIZE)
    masks.start(start(0, compiler.compile(sources.regex("abc"))))
    tokens = ToyTokenizer().encode("abz", add_special_tokens=False)
    drafts = [list(tokens)]
    found = along(masks, [0], drafts)
    assert drafts == [list(tokens[:2])]
    assert len(found) == 3


def test_no_draft_ends_a_text(compiler: GrammarCompiler) -> None:
    masks = SlotMasks(VOCAB_SIZE)
    masks.start(start(0, compiler.compile(sources.regex("ab"))))
    tokens = ToyTokenizer().encode("ab", add_special_tokens=False)
    drafts = [[*tokens, EOS, 7]]
    along(masks, [0], drafts)
    assert drafts[0] in ([*tokens], [*tokens[:-1]])


def test_what_a_grammar_leaves_no_choice_about_is_certain(compiler: GrammarCompiler) -> None:
    masks = SlotMasks(VOCAB_SIZE)
    masks.start(start(0, compiler.compile(sources.regex("[ab]"))))
    assert not masks.certain(0)
    assert not masks.certain(1)
