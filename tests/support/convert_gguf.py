"""Run llama.cpp's own converter, with its sources on PYTHONPATH: checkpoint, then type and output in pairs.

The converter knows tokenizers by a hash of what they make of a text, and refuses one that was made for tests:
here every tokenizer is one that cuts text as GPT-2's. It also wants the sentencepiece package to learn that a
model has no vocabulary of that kind. Run by `family_files`; knows nothing of this project.
"""

from __future__ import annotations

import sys
from typing import Any

import convert_hf_to_gguf  # type: ignore[import-not-found]
from conversion.base import TextModel  # type: ignore[import-not-found]


def _name_pre_tokenizer(model: Any, tokenizer: Any) -> str:
    return "gpt-2"


def _refuse_sentencepiece(model: Any) -> None:
    raise FileNotFoundError


if __name__ == "__main__":
    TextModel.get_vocab_base_pre = _name_pre_tokenizer
    TextModel._create_vocab_sentencepiece = _refuse_sentencepiece
    checkpoint, *outputs = sys.argv[1:]
    for kind, output in zip(outputs[::2], outputs[1::2], strict=True):
        sys.argv[1:] = [checkpoint, "--outtype", kind, "--outfile", output]
        convert_hf_to_gguf.main()
