"""Record the results of sentence-transformers for tiny checkpoints; run by hand, with that package installed.

pip install sentence-transformers
PYTHONPATH=. python tests/models/oracle/record_sentence_transformers.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import sentence_transformers  # type: ignore[import-not-found]

from tests.support import encoders
from tests.support.pooling_models import QUERIES, RECORDED, TEXTS, save_recorded, save_recorded_classifier

_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "!", "model_max_length": 512}


def main() -> None:
    found: dict[str, object] = {"version": sentence_transformers.__version__}
    for name in RECORDED:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            save_recorded(name, directory)
            (directory / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER))
            model = sentence_transformers.SentenceTransformer(folder, device="cpu")
            # One at a time, to avoid padding.
            found[name] = [model.encode([text])[0].astype(float).round(6).tolist() for text in TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        save_recorded_classifier(Path(folder))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER))
        ranker = sentence_transformers.CrossEncoder(folder, device="cpu")
        found["classifier"] = [
            [float(ranker.predict([(query, text)])[0]) for text in TEXTS] for query in QUERIES
        ]
    path = Path(__file__).with_name("sentence-transformers.json")
    path.write_text(json.dumps(found))
    path = path.with_name("sentence-transformers-encoders.json")
    path.write_text(json.dumps(record_encoders()))


def record_encoders() -> dict[str, object]:
    """Return the vectors and scores of encoders."""
    found: dict[str, object] = {"version": sentence_transformers.__version__}
    for name, (_, _, mode) in encoders.RECORDED.items():
        with tempfile.TemporaryDirectory() as folder:
            encoders.save_recorded(name, Path(folder))
            if mode is not None:
                model = sentence_transformers.SentenceTransformer(folder, device="cpu")
                found[name] = [
                    model.encode([text])[0].astype(float).round(6).tolist() for text in encoders.TEXTS
                ]
                continue
            ranker = sentence_transformers.CrossEncoder(folder, device="cpu")
            found[name] = [
                [float(ranker.predict([(query, text)])[0]) for text in encoders.TEXTS] for query in QUERIES
            ]
    return found


if __name__ == "__main__":
    main()
