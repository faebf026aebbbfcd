"""Images in messages, for vision models."""

from __future__ import annotations

import pytest

from tests.page.conftest import ChatPage
from tests.support.pictures import encoded, picture
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.vision_app import FakeProcessor, vision_app

pytestmark = pytest.mark.page

PASTE = """(data) => {
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "it.png", { type: "image/png" }));
  const event = new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
  document.getElementById("prompt").dispatchEvent(event);
}"""


def serve_vision_model(chat: ChatPage) -> FakeProcessor:
    chat.engine = ScriptedEngine(say("A picture"), has_vision=True)
    app, processor = vision_app(chat.engine)
    chat.serve_app(app)
    chat.open()
    chat.expect("#attach").to_be_visible()
    return processor


def attach(chat: ChatPage, data: bytes, name: str = "it.png", kind: str = "image/png") -> None:
    chat.page.locator("#attach-file").set_input_files({"name": name, "mimeType": kind, "buffer": data})


def sizes_seen(chat: ChatPage, width: int, height: int) -> list[tuple[int, int]]:
    """Ask about a picture of this size; return the sizes of the images that the model received."""
    processor = serve_vision_model(chat)
    attach(chat, encoded(picture(width, height)))
    chat.expect("#attached img").to_be_visible()
    chat.send("What is this?")
    chat.wait_for_answer("A picture")
    return [(image.pixels.width, image.pixels.height) for image in processor.seen]


def test_an_image_is_sent_shown_and_kept(chat: ChatPage) -> None:
    assert sizes_seen(chat, 7, 2) == [(7, 2)]
    chat.expect("#attached").to_be_empty()
    chat.expect("article.user img").to_be_visible()
    chat.page.reload()
    chat.page.locator("#conversations .title").click()
    chat.expect("article.user img").to_be_visible()


def test_a_large_image_is_made_smaller(chat: ChatPage) -> None:
    assert sizes_seen(chat, 3136, 20) == [(1568, 10)]


def test_images_are_pasted_and_removed_and_go_without_words(chat: ChatPage) -> None:
    import base64

    processor = serve_vision_model(chat)
    data = base64.b64encode(encoded(picture(5, 5))).decode()
    chat.page.evaluate(PASTE, data)
    chat.expect("#attached img").to_be_visible()
    chat.page.evaluate(PASTE, data)
    chat.expect("#attached img", 1).to_be_visible()
    chat.button("Remove image 2").click()
    chat.page.get_by_label("Message", exact=True).press("Enter")
    chat.wait_for_answer("A picture")
    assert len(processor.seen) == 1
    assert [part["type"] for part in chat.bodies[0]["messages"][0]["content"]] == ["image_url"]


def test_what_is_no_image_is_refused_by_name(chat: ChatPage) -> None:
    serve_vision_model(chat)
    attach(chat, b"no image", "broken.png")
    chat.expect("#status .notice").to_have_text("broken.png cannot be read as an image.")


def test_a_model_without_eyes_is_offered_no_images(chat: ChatPage) -> None:
    import base64

    chat.open()
    chat.expect("#model").to_have_text("toy/model")
    chat.expect("#attach").to_be_hidden()
    chat.page.evaluate(PASTE, base64.b64encode(encoded(picture(5, 5))).decode())
    chat.expect("#status .notice").to_have_text("This model takes no images.")
    chat.expect("#attached").to_be_empty()
