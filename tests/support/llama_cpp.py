"""llama.cpp's own sources, from the source package of `llama-cpp-python`, for comparison in tests.

    models = llama_cpp_source() / "models"      # vocabularies with test vectors, chat templates
    converter = llama_cpp_source() / "convert_hf_to_gguf.py"

They are fetched once into build/ (77 MB over the network) and are not part of this repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.source_package import SourcePackage

RELEASE = "llama_cpp_python-0.3.36"
_PACKAGE = SourcePackage(
    store="llama_cpp",
    release=RELEASE,
    folder="ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    members=re.compile(
        r"llama_cpp/llama_chat_format\.py"
        r"|vendor/llama\.cpp/(LICENSE|convert_\w+\.py|(conversion|gguf-py|models)/.*|src/llama-vocab\.cpp"
        r"|tools/mtmd/legacy-models/convert_image_encoder_to_gguf\.py)"
    ),
)


def llama_cpp_source() -> Path:
    """Return the root of llama.cpp's sources (`vendor/llama.cpp`), fetching them on first use.

    Skips the calling test if there is no network; every other failure is an error.
    """
    return package_source() / "vendor" / "llama.cpp"


def package_source() -> Path:
    """Return the root of the package, whose `llama_cpp` has its own templates; fetches or skips as above."""
    return _PACKAGE.root()
