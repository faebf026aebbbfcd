"""The counts of `bench.forced`, with one token per byte."""

from __future__ import annotations

from bench.forced import count
from tests.support.toy_tokenizer import VOCAB_SIZE, ToyTokenizer
from tgi_asgi.text.constrain.compiler import GrammarCompiler


def test_what_a_schema_leaves_no_choice_about_counts_as_forced() -> None:
    tokenizer = ToyTokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    row = count(compiler, tokenizer, "a short call", is_compact=True)
    free = ["San Francisco", '"', "c", "5", "}"]  # a string and a number can continue; a unit has two values
    forced = ['{"city":"', ',"unit":"', 'elsius","days":']
    assert row["tokens"] == len("".join(free + forced))
    assert row["forced"] == len("".join(forced))
    assert row["steps_saved"] == row["forced"] - len(forced)
