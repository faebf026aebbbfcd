"""How many realistic JSON schemas are accepted or refused by keyword, and whether answers comply.

    python -m bench.schemas [--model-id model.gguf] [--answers 5] [--out schemas.json]

From each accepted schema's grammar, answers are sampled among the tokens that it allows, preferring
those that end something, and `jsonschema` checks them, formats included. Loads only the model's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from bench.engine import settings_of
from bench.report import command_line, emit, table
from bench.schema_suite import suite
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.formats.sources import resolve
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.text.constrain.source import json_schema
from tgi_asgi.text.constrain.vocabulary import Vocabulary

MAX_TOKENS = 600
_KEYWORD = re.compile(r"`(\$?\w+)`|\[\"(\$?\w+)\"")


class Writer:
    """Samples answers from grammars."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        self._tokenizer, self._num_words = tokenizer, -(-vocab_size // 32)
        texts = [tokenizer.token_bytes(token) for token in range(min(tokenizer.vocab_size, vocab_size))]
        closing = [token for token, text in enumerate(texts) if text[:1] in (b'"', b"}", b"]", b",", b":")]
        self._ending = np.zeros(self._num_words * 32, bool)
        self._ending[closing] = True
        self._ending[list(tokenizer.eos_ids)] = True

    def write(self, grammar: Grammar, rng: random.Random) -> str | None:
        """Sample an answer; None if it has not ended after `MAX_TOKENS`."""
        matcher, data = grammar.matcher(), b""
        mask = np.empty(self._num_words, np.int32)
        for _ in range(MAX_TOKENS):
            matcher.fill_mask(mask)
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
            ending = np.flatnonzero(allowed & self._ending)
            among = ending if len(ending) and rng.random() < 0.6 else np.flatnonzero(allowed)
            token = int(among[rng.randrange(len(among))])
            if token in self._tokenizer.eos_ids:
                return data.decode()
            data += self._tokenizer.token_bytes(token)
            matcher.accept(token)
            if matcher.error is not None:
                raise RuntimeError(matcher.error)
            if matcher.is_ended:
                return data.decode()
        return None


def problem(text: str, schema: dict[str, Any]) -> str | None:
    """Return why a text does not comply with a schema, or None; numbers are compared as written."""
    checker = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    try:
        checker.validate(json.loads(text, parse_float=Decimal))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text[:200]!r}: {str(error).splitlines()[0]}"
    return None


def judge(compiler: GrammarCompiler, writer: Writer, schema: dict[str, Any], answers: int) -> dict[str, Any]:
    """Compile one schema and check answers that its grammar allows."""
    try:
        grammar = compiler.compile(json_schema(schema))
    except InvalidRequest as error:
        found = _KEYWORD.search(error.message)
        return {"refused": next(filter(None, found.groups()), "") if found else "", "message": error.message}
    rng = random.Random(0)
    written = [text for _ in range(answers) if (text := writer.write(grammar, rng)) is not None]
    wrong = [reason for text in written if (reason := problem(text, schema))]
    return {"answers": len(written), "wrong": wrong}


def main() -> None:
    """Judge the suite and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--answers", type=int, default=5, help="answers sampled from each accepted schema")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    with OpenModel(resolve(settings_of(arguments))) as opened:
        tokenizer, _ = opened.read_text()
        vocab_size = opened.config.vocab_size
    compiler, writer = GrammarCompiler(tokenizer, vocab_size), Writer(tokenizer, vocab_size)
    rows: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for family, schema in suite():
        row = rows.setdefault(
            family,
            {"family": family, "schemas": 0, "accepted": 0, "answers": 0, "valid": 0, "refused": Counter()},
        )
        found = judge(compiler, writer, schema, options.answers)
        row["schemas"] += 1
        if "refused" in found:
            row["refused"][found["refused"] or found["message"]] += 1
            continue
        row["accepted"] += 1
        row["answers"] += found["answers"]
        row["valid"] += found["answers"] - len(found["wrong"])
        wrong += [f"{family}: {reason}" for reason in found["wrong"]]
    keys = ("schemas", "accepted", "answers", "valid")
    total = {key: sum(row[key] for row in rows.values()) for key in keys}
    emit(
        {
            "bench": "schemas",
            "command": command_line(),
            "total": total,
            "wrong": wrong,
            "rows": list(rows.values()),
        },
        options.out,
    )
    shown = [
        {**row, "refused": ", ".join(f"{key} {n}" for key, n in row["refused"].items())}
        for row in rows.values()
    ]
    print(
        table(
            ("family", *keys, "refused"),
            [[row[key] for key in ("family", *keys, "refused")] for row in shown],
        )
    )
    print(total)


if __name__ == "__main__":
    main()
