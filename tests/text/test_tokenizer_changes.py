"""Each key of a tokenizer's files, changed: ids, texts and prompts are those of `transformers`.

Beside a tokenizer.json, special tokens can be in four files, each of which may say something else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tgi_asgi.text.chat.template import load_chat_template
from tgi_asgi.text.tokenizer import Tokenizer

Files = dict[str, Any]
TEXTS = (
    "", " ", "the <s>x", "a<|x|>b <|x|> c", "the<new>x <new>\n", "</s> </s>", "x<img>y", "hello  Hello the ",
    "<unk> <pad>", "I 'm do n't . ok", "e\u0301\u65e5 \U0001f44d",
)  # fmt: skip
CONFIG = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}"
    "{% endfor %}",
}  # fmt: skip
TOKENIZER, OWN, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
FLAGS: tuple[dict[str, bool], ...] = (
    {}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}, {"special": False},
)  # fmt: skip
TEMPLATE = "X{{ bos_token }}{{ messages[0].content }}{{ pad_token }}{{ sep_token }}"


def vocabulary() -> dict[str, Any]:
    """Return the tokenizer.json of all bytes and a few words, whose last token is "the"."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>", "<unk>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the the the"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made: dict[str, Any] = json.loads(backend.to_str())
    return made


def token(content: str, **flags: Any) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **usual, **flags}


def changes(own: dict[str, Any]) -> Iterator[Files]:
    """Yield files that replace or join the usual ones."""
    size = len(own["model"]["vocab"])
    word = max(own["model"]["vocab"], key=own["model"]["vocab"].get)
    yield {}
    for key in (
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "legacy",
        "clean_up_tokenization_spaces",
    ):
        yield from ({OWN: {**CONFIG, key: value}} for value in (True, False))
    for key in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token"):
        for value in ("<new>", "<unk>", word, None):
            rest = {name: text for name, text in CONFIG.items() if name != key}
            yield {OWN: {**CONFIG, key: value}}
            yield {OWN: rest, MAP: {key: value}}
            yield {MAP: {key: value}}
            yield {MAP: {key: value}, OWN: {**CONFIG, "added_tokens_decoder": {"0": token("<s>")}}}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for value in (["<|x|>"], [word], ["<|x|>", "<img>"], []):
            yield {OWN: {**CONFIG, key: value}}
            yield {MAP: {key: value}}
    for content in ("<|x|>", "Hello", "\u65e5", " the"):
        for flags in FLAGS:
            added = copy.deepcopy(own)
            added["added_tokens"].append({"id": size, **token(content, **flags)})
            listed = {"added_tokens_decoder": {str(size): token(content, **flags)}}
            yield {TOKENIZER: added}
            yield {OWN: {**CONFIG, **listed}}
            yield {TOKENIZER: added, OWN: {**CONFIG, **listed, "eos_token": content}}
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        yield {TOKENIZER: {**own, part: None}}
    yield {TOKENIZER: {**own, "normalizer": {"type": "NFC"}}}
    yield {"chat_template.jinja": TEMPLATE}
    named = [{"name": "tool_use", "template": "T" + TEMPLATE}, {"name": "default", "template": TEMPLATE}]
    yield {OWN: {**CONFIG, "chat_template": named}}
    yield {"chat_template.jinja": "J" + TEMPLATE, OWN: {**CONFIG, "chat_template": named}}
    yield {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool_use.jinja": "A" + TEMPLATE}


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def differences(folder: Path) -> list[tuple[Any, ...]]:
    """Return what differs: ids or texts of `TEXTS`, the tokens of both ends, or prompts."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_directory(folder)
    pairs: list[tuple[Any, ...]] = [
        ("bos", theirs.bos_token_id, ours.bos_id), ("eos", theirs.eos_token_id, ours.eos_id)
    ]  # fmt: skip
    for text in TEXTS:
        for adds in (True, False):
            ids = theirs(text, add_special_tokens=adds)["input_ids"]
            pairs.append((text, ids, ours.encode(text, add_special_tokens=adds)))
            for skips in (True, False):
                decoded = ours.decode(ids, skip_special_tokens=skips)
                pairs.append((text, theirs.decode(ids, skip_special_tokens=skips), decoded))
    template = load_chat_template(ours.special_tokens, directory=folder)
    assert template is not None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools in (None, [tool]):
        prompt = theirs.apply_chat_template(messages, tools=tools, tokenize=False)  # type: ignore[arg-type]
        pairs.append(("prompt", prompt, template.render(messages, tools=tools, add_generation_prompt=False)))
    return [pair for pair in pairs if pair[1] != pair[2]]


def test_any_changed_key_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    own, found = vocabulary(), {}
    for index, files in enumerate(changes(own)):
        folder = tmp_path / str(index)
        config = {**files.get(OWN, CONFIG), "tokenizer_class": "PreTrainedTokenizerFast"}
        write(folder, {TOKENIZER: own, **files, OWN: config})
        if apart := differences(folder):
            found[str({name: content for name, content in files.items() if name != TOKENIZER})] = apart[:3]
    assert not found
