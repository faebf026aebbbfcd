"""Count the tokens of an answer that its grammar forces, and the steps that jumping over them could save.

    python -m bench.forced [--model-id model.gguf] [--out forced.json]

Walks through the grammars of some schemas along a matching answer. Tokens for which the grammar allows no
alternative count as forced. When they become known the next step is already in flight, so a run of n saves n
- 1 steps. Loads only the model's tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.engine import settings_of
from bench.report import command_line, emit, table
from tgi_asgi.formats.sources import resolve
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.source import COMPACT, SPACED, GrammarSource, inline_json


def record(**properties: Any) -> dict[str, Any]:
    """Return a schema that requires all of some properties and allows no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, COUNT, AMOUNT = {"type": "string"}, {"type": "integer"}, {"type": "number"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a short call": (
        record(city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}, days=COUNT),
        {"city": "San Francisco", "unit": "celsius", "days": 5},
    ),
    "an invoice": (
        record(
            invoice_number=TEXT,
            customer=record(full_name=TEXT, email_address=TEXT, phone_number=TEXT),
            line_items={
                "type": "array",
                "items": record(description=TEXT, quantity=COUNT, unit_price=AMOUNT),
            },
            total=AMOUNT,
        ),
        {
            "invoice_number": "INV-2024-00123",
            "customer": {
                "full_name": "Ada Lovelace",
                "email_address": "ada@example.com",
                "phone_number": "+44 20 7946 0958",
            },
            "line_items": [
                {"description": "Analytical engine, brass", "quantity": 1, "unit_price": 1999.5},
                {"description": "Punched cards", "quantity": 500, "unit_price": 0.05},
            ],
            "total": 2024.5,
        },
    ),
    "a summary": (
        record(title=TEXT, summary=TEXT, sentiment={"enum": ["positive", "negative", "neutral"]}),
        {
            "title": "New bridge opens",
            "summary": "The city opened its new bridge on Friday after four years of work. Commuters say "
            "that the trip to the centre now takes half the time; shopkeepers near the old ferry worry.",
            "sentiment": "positive",
        },
    ),
    "any object": ({"type": "object"}, {"name": "Ada", "age": 36, "languages": ["en", "fr"]}),
}


def count(compiler: GrammarCompiler, tokenizer: Any, name: str, *, is_compact: bool) -> dict[str, Any]:
    """Walk along one answer; count its tokens, the forced ones, and the steps that jumping saves."""
    schema, answer = CASES[name]
    text = json.dumps(answer, separators=(",", ":") if is_compact else None).encode()
    style = COMPACT if is_compact else SPACED
    expression, _ = inline_json(schema, style)
    matcher = compiler.compile(GrammarSource(f"start: {expression}")).matcher()
    tokens = forced = saved = at = 0
    while at < len(text):
        ids = matcher.forced_ids()
        forced += len(ids)
        saved += max(len(ids) - 1, 0)
        if not ids:
            ids = tokenizer.encode(text[at:].decode(), add_special_tokens=False)[:1]
        for token_id in ids:
            matcher.accept(token_id)
            at += len(tokenizer.token_bytes(token_id))
        tokens += len(ids)
        assert matcher.error is None, (name, matcher.error)
    style_name = "compact" if is_compact else "spaced"
    return {"answer": name, "style": style_name, "tokens": tokens, "forced": forced, "steps_saved": saved}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    with OpenModel(resolve(settings_of(arguments))) as opened:
        tokenizer, _ = opened.read_text()
        compiler = GrammarCompiler(tokenizer, opened.config.vocab_size)
    rows = [count(compiler, tokenizer, name, is_compact=each) for name in CASES for each in (True, False)]
    emit({"bench": "forced", "command": command_line(), "rows": rows}, options.out)
    keys = ("answer", "style", "tokens", "forced", "steps_saved")
    print(table(keys, ([row[key] for key in keys] for row in rows)))


if __name__ == "__main__":
    main()
