"""The compiler of grammars on a vocabulary of bytes, shared by a module's tests."""

from __future__ import annotations

import pytest

from tests.support.toy_tokenizer import VOCAB_SIZE, ToyTokenizer
from tgi_asgi.text.constrain.compiler import GrammarCompiler


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)
