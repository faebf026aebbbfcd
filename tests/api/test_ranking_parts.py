"""What rankings are made of: the score of a logit, and the prompt of a yes-or-no model."""

from __future__ import annotations

import math

import pytest

from tests.support.ranking import CARD, INSTRUCTION
from tgi_asgi.api.vectors import probability
from tgi_asgi.runner.load_pooling import RANKING
from tgi_asgi.text.chat.template import ChatTemplate


def test_bad_scores_are_told_apart() -> None:
    scores = [probability(logit) for logit in (-700.0, -60.0, -50.0, -40.0, 0.0, 30.0, 800.0)]
    assert scores == sorted(set(scores))
    assert scores[2] == pytest.approx(math.exp(-50), rel=1e-12, abs=0)
    assert (probability(-800), scores[-1]) == (0, 1)


def test_the_prompt_is_the_model_cards_to_the_last_newline() -> None:
    messages = [{"role": "query", "content": "q?"}, {"role": "document", "content": "d.\nd"}]
    template = ChatTemplate(RANKING, {})
    for instruction in (None, "Find"):
        system = [] if instruction is None else [{"role": "system", "content": instruction}]
        expected = CARD.format(instruction=instruction or INSTRUCTION, query="q?", document="d.\nd")
        assert template.render([*system, *messages]) == expected
