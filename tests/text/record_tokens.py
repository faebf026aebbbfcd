# ruff: noqa: RUF001 (the strings are strange on purpose)
"""Record `data/smollm2_tokens.json`: a thousand strings and their ids from two other tokenizers.

    llama-server -m SmolLM2-135M-Instruct.Q4_1.gguf --port 18200 &
    python tests/text/record_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf http://127.0.0.1:18200

The ids come from llama.cpp (its llama-vocab.cpp has the split that `smollm` names) and from the GGUF
conversion of transformers. The conversion uses GPT-2's split for every name that it does not know, so this
script adds the step of SmolLM2's own tokenizer.json before the byte level, `Digits(individual_digits=True)`.
Strings on which the two disagree are printed and left out. They contain a byte that the vocabulary lacks
(0x04 is one): the tokenizers library drops it and then merges across the gap, llama.cpp drops it last.
"""

from __future__ import annotations

import json
import random
import sys
import urllib.request
from pathlib import Path

NUM_STRINGS = 1000
SEED = 20260
OUTPUT = Path(__file__).parent / "data" / "smollm2_tokens.json"

SAMPLES = {
    "prose": "The quick brown fox can't jump; it's lazy, they've said. We'll see what I'd do. ",
    "code": 'def f(x: int = 0x1F) -> str:\n    return f"{x:>8}"\n\tif (a && !b) { c[i++] += 3.14e-10; }\n',
    "numbers": "3.14159 1,000,000 0xDEADBEEF 2024-02-29T23:59:59Z ½ ² Ⅷ ٣٤٥ ७८ 一二三 １２３ ",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Ёжик №5. ",
    "cjk": "我能吞下玻璃而不伤身体。日本語のテキスト、カタカナ。한국어 텍스트입니다. 𠮷野家 ",
    "rtl": "مرحبا بالعالم، كيف الحال؟ שלום עולם ",
    "indic": "नमस्ते दुनिया क्षत्रिय தமிழ் ไทยภาษา བོད་ ",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇩🇪 😀😃 ❤️‍🔥 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ ",
    "marks": "e\u0301 n\u0303 Z\u0351\u036b\u0343 a\u0308\u0304 \u202e abc \u200b\u200d\ufeff ",
    "latin": "Zażółć gęślą jaźń, naïve façade, Straße, Ærøskøbing, İstanbul, ﬁne ",
    "special": "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><repo_name><|im_star <jupyter_start> ",
    "space": " \t\n\r\n   \u00a0\u2003\u3000\v\f\x1c\x85 \n\n\n    ",
    "symbols": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ «»„“”‘’…—–•©®™€£¥ ∑∫√∞≠ ←→ ░▒▓ \x00\x01\x7f ",
    "math": r"\frac{1}{2}\sum_{i=0}^{n} x_i^2 \leq \alpha ",
    "json": '{"a": [1, 2, {"b": null}], "c": "d\\n\\u00e9"}\n',
}


def make_strings() -> list[str]:
    """Return test strings: samples whole and cut, mixtures, runs, random characters, random bytes as text."""
    rng = random.Random(SEED)
    samples = list(SAMPLES.values())
    strings = ["", " ", "  ", "\n", "a", "'s", "don't", " 's", "0", "007", " 42", *samples, "".join(samples)]
    while len(strings) < NUM_STRINGS + 20:
        kind = rng.randrange(6)
        if kind == 0:  # a random cut
            text = rng.choice(samples)
            start = rng.randrange(len(text))
            strings.append(text[start : start + rng.randrange(1, 60)])
        elif kind == 1:  # pieces of several samples, joined
            cuts = [(text, rng.randrange(len(text))) for text in rng.choices(samples, k=rng.randrange(2, 6))]
            strings.append("".join(text[at : at + rng.randrange(1, 15)] for text, at in cuts))
        elif kind == 2:  # words and runs of white space
            words = [rng.choice(rng.choice(samples).split() or ["x"]) for _ in range(rng.randrange(1, 12))]
            gaps = [rng.choice((" ", "  ", "\n", "\n\n", "\t", " \n ", "    ", "\r\n")) for _ in words]
            strings.append("".join(part for pair in zip(gaps, words, strict=True) for part in pair))
        elif kind == 3:  # one character repeated
            strings.append(rng.choice(rng.choice(samples)) * rng.randrange(1, 40))
        elif kind == 4:  # characters of any plane (surrogates are none)
            points = (rng.randrange(1, rng.choice((0x80, 0x800, 0x10000, 0x30000))) for _ in range(20))
            strings.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
        else:  # random bytes
            data = rng.randbytes(rng.randrange(1, 40))
            strings.append(data.decode(rng.choice(("latin-1", "utf-8")), "replace"))
    return strings


def by_llama_cpp(server: str, text: str) -> list[int]:
    """Return the ids from a running llama-server."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


def main(gguf: Path, server: str) -> None:
    """Encode all strings twice, and write those on which both tokenizers agree."""
    import transformers
    from tokenizers import pre_tokenizers

    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.pre_tokenizer]
    )
    cases = []
    for text in make_strings():
        ids = theirs.encode(text, add_special_tokens=False).ids
        other = by_llama_cpp(server, text)
        if ids == other:
            cases.append([text, ids])
        else:
            print(f"{text!r}: {ids} by transformers, {other} by llama.cpp")
    del cases[NUM_STRINGS:]
    OUTPUT.parent.mkdir(exist_ok=True)
    lines = [json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases]
    OUTPUT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(cases)} strings agreed on, {sum(len(ids) for _, ids in cases)} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
