"""GBNF and XGrammar's EBNF: grammars that llguidance's converter misreads are read as by llama.cpp."""

from __future__ import annotations

import pytest

from tests.support.grammars import accepts
from tests.support.processor_time import computed_within
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.gbnf import gbnf_to_lark


@pytest.mark.parametrize(
    ("grammar", "valid", "invalid"),
    [
        (r'root ::= "\u00e9" "\U0001F600" "\x41"', "é😀A", "e"),
        (r'root ::= "\x1b[0m/\\\"" ""', '\x1b[0m/\\"', "[0m/"),
        (r"root ::= [\u00e0-\u00ff]+", "éü", "a"),
        (r"root ::= [\U0001F600-\U0001F64F]{2}", "😀😁", "a"),
        (r'root ::= [^"\\\u0000-\u001f]+', "aé😀", "\x1f"),
        (r"root ::= [a-c&&x~~y]+", "a&x~y", "d"),
        (r"root ::= [\]\[\-^]+", "[]-^", "a"),
        ("root ::= [-+*/]+ [+*/-]+", "-+/-", "a"),
        ('root ::= "a"\n  | "b" # "c"\n\n  | [|\\n#] "d"', "#d", "c"),
        ('root ::= start\nstart ::= "start"', "start", "start_"),
        ('?start: select\n?select: "SELECT " /[^"]+/', "SELECT a", 'SELECT "'),
        ('start : "a::=b"', "a::=b", "a"),
    ],
)
def test_a_grammar_means_what_it_says(
    compiler: GrammarCompiler, grammar: str, valid: str, invalid: str
) -> None:
    assert accepts(compiler, sources.ebnf(grammar), valid)
    assert not accepts(compiler, sources.ebnf(grammar), invalid)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (r'root ::= "\d"', r"escape \\d is not known"),
        (r'root ::= "\ud800"', r"\\ud800 is not a character"),
        (r"root ::= [\UFFFFFFFF]", r"\\UFFFFFFFF is not a character"),
        ('root ::= "a', "Unexpected end of input at line 1"),
        ('other ::= "a"', "No 'root' rule"),
        ("hello world", "grammar is not valid"),
    ],
)
def test_a_mistake_is_refused_with_its_place(compiler: GrammarCompiler, grammar: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        compiler.compile(sources.ebnf(grammar))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '["' * 50_000, "[" * 100_000 + "\\", "a" + "\n " * 50_000 + "b"]
)
def test_what_has_no_end_is_read_once(text: str) -> None:
    def run() -> None:
        with pytest.raises(ValueError, match=r"Unexpected end of input|Expected ::="):
            gbnf_to_lark(f"root ::= {text}")

    computed_within(5, run)  # each of these took minutes when it was searched again and again
