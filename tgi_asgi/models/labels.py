"""Reads from `config.json` what a classifier's labels are called, and how its logits become scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tgi_asgi.formats.files import read_json
from tgi_asgi.model_info import Activation

_ACTIVATIONS = {
    "single_label_classification": Activation.SOFTMAX,
    "multi_label_classification": Activation.SIGMOID,
    "regression": Activation.IDENTITY,
}


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """What the files say about a classifier's labels.

    Attributes:
        named: The names of some labels, by their numbers as text.
        activation: None: the number of labels determines it.
        pad_id: Decoders of transformers score the last token that is not this one.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    activation: Activation | None = None
    pad_id: int | None = None

    def names(self, num_labels: int) -> tuple[str, ...]:
        """Return the names of all labels; those without one get the name that transformers gives them."""
        return tuple(self.named.get(str(index), f"LABEL_{index}") for index in range(num_labels))

    def activation_of(self, num_labels: int) -> Activation:
        """Return how the logits become scores, as the pipelines of transformers determine it."""
        return self.activation or (Activation.SIGMOID if num_labels == 1 else Activation.SOFTMAX)


def read_labels(directory: Path) -> LabelFiles:
    """Read the names and the kind of the labels from a checkpoint's configuration."""
    config: Mapping[str, Any] = read_json(directory / "config.json")
    names, problem = config.get("id2label"), config.get("problem_type")
    pad_id = config.get("pad_token_id")
    return LabelFiles(
        {
            str(index): name
            for index, name in (names.items() if isinstance(names, dict) else ())
            if isinstance(name, str)
        },
        _ACTIVATIONS.get(problem) if isinstance(problem, str) else None,
        pad_id if type(pad_id) is int else None,
    )
