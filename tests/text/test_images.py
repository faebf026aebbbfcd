"""Tokens that stand around images, where images or words follow each other."""

from __future__ import annotations

import pytest

from tgi_asgi.text.images import join_fences, spell_out_images

MARK = "\U00100007\U00100009"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("<f><i><f><f><i><f>", "<f><i><f><i><f>"),
        ("<f><i><f>word", "<f><i><f> word"),
        ("<f><i><f>\n", "<f><i><f>\n"),
        ("<f><i><f><end>", "<f><i><f><end>"),
        ("<f><f><f><f>.", "<f><f> ."),
        ("<f>", "<f>"),
    ],
)
def test_images_side_by_side_share_a_token_and_a_word_after_it_has_a_space(source: str, wanted: str) -> None:
    assert join_fences(source, "<f>") == wanted


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("@<f>@<i>@<f>@<f>@<i>@<f>", "@<f>@<i>@<f>@<i>@<f>"),
        ("@<f><f>x", "@<f><f>x"),  # the second is a client's
        ("@<f>x", "@<f> x"),
        ("@<f>@[i]", "@<f> @[i]"),
        ("@<f>@<end>x", "@<f>@<end>x"),
        ("<f>x", "<f>x"),
    ],
)
def test_only_tokens_that_act_as_such_are_changed(source: str, wanted: str) -> None:
    assert join_fences(source.replace("@", MARK), "<f>", MARK) == wanted.replace("@", MARK)


def test_models_without_such_tokens_keep_their_prompts() -> None:
    assert join_fences("<f><f>x", "") == "<f><f>x"


def test_texts_of_images_stay_parts_for_the_roles_whose_parts_a_template_takes() -> None:
    content = [{"type": "text", "text": "see"}, {"type": "image"}]
    messages = [{"role": role, "content": content} for role in ("user", "assistant")]
    found = spell_out_images(messages, "<i>", part_roles={"user"})
    parts = [{"type": "text", "text": "see"}, {"type": "text", "text": "<i>"}]
    assert [each["content"] for each in found] == [parts, "see\n<i>"]
