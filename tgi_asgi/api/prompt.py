"""Turns a job's messages or text into token ids. Slow for long inputs, so it runs in a worker thread.

`prompt_text.py` renders the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tgi_asgi.api.job import Conversation, Job, Text
from tgi_asgi.api.limits import Overflow, check_characters, tgi_too_long
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.api.prompt_text import chat_text, echoed_text, plain_text
from tgi_asgi.errors import ContextExceeded, InvalidRequest, UnsupportedSuffix
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.text.images import locate_images
from tgi_asgi.types import ImageInput

if TYPE_CHECKING:
    from tgi_asgi.api.served import Served
    from tgi_asgi.text.fill import Fill

_TAIL_CHARS = 64
MAX_COUNTED_CHARS = 4 * MIB  # of a text whose tokens are counted, if no longer prompt fits
SLACK_TOKENS = 64  # beyond those kept of a long text, because cutting text shifts token boundaries


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        ids: Its tokens.
        echo: Text that precedes the answer's, if the request asks for that.
        text: The prompt as text, for text offsets; None if not needed.
        num_characters: Length of the prompt's text, if it came as text.
        tail: End of a chat's prompt, which may open a reasoning section.
        images: Positions of its images in the tokens.
        end_ids: Tokens that end its answer besides the model's own: of a text with a suffix.
    """

    ids: list[int]
    echo: str = ""
    text: str | None = None
    num_characters: int = 0
    tail: str = ""
    images: tuple[ImageInput, ...] = ()
    end_ids: frozenset[int] = frozenset()


def make_prompt(job: Job, served: Served, settings: Settings) -> Prompt:
    """Render and tokenise a job's prompt, and truncate it as the job says.

    Raises:
        InvalidRequest, TemplateError: as in `chat_text`, or if it is too long however it is tokenised.
    """
    info, keep = served.info, job.keep_tokens
    if keep == "fitting":
        keep = max(min(info.max_total_tokens - (job.max_tokens or 1), info.max_input_tokens), 1)
    try:
        if isinstance(job.prompt, Text):
            prompt = _text_prompt(job.prompt, served, keep)
        else:
            prompt = chat_prompt(job.prompt, served, settings, keep)
    except ContextExceeded as error:
        if job.overflow is Overflow.TGI:
            raise tgi_too_long(info, f"at least {error.num_tokens}") from None
        raise
    if keep is not None and len(prompt.ids) > keep:
        prompt = _cut(prompt, len(prompt.ids) - keep, job.prompt)
    if not prompt.ids:
        field = job.prompt.field if isinstance(job.prompt, Text) else ("prompt",)
        raise InvalidRequest("`{field}` must not be empty", field=field)
    check_vocabulary(prompt.ids, served)
    return prompt


def check_vocabulary(ids: Sequence[int], served: Served) -> None:
    """Raise `InvalidRequest` if a text has tokens that the model lacks: a tokenizer may have more.

    Ids sent by clients were checked when their requests were read.
    """
    vocab_size = served.info.vocab_size
    if served.tokenizer.vocab_size <= vocab_size:
        return
    if (unknown := next((token_id for token_id in ids if token_id >= vocab_size), None)) is not None:
        text = served.tokenizer.decode([unknown], skip_special_tokens=False)
        where = f"the prompt has token {unknown} ({text!r})"
        raise InvalidRequest(f"{where}, but the model has only {vocab_size}")


def _cut(prompt: Prompt, size: int, source: Conversation | Text) -> Prompt:
    """Return a prompt without its first tokens. No image is cut off, because later text may refer to it."""
    if prompt.images and prompt.images[0].start < size:
        assert source.images is not None, "located images have a source"
        param = source.images.sources[0].param
        refuse_field(param, "is where truncation would cut the prompt off")
    del prompt.ids[:size]
    moved = tuple(replace(image, start=image.start - size) for image in prompt.images)
    return replace(prompt, images=moved)


def chat_prompt(
    chat: Conversation,
    served: Served,
    settings: Settings,
    keep: int | None = None,
    *,
    is_bounded: bool = True,
) -> Prompt:
    """Render and tokenise a conversation; raises as `chat_text`.

    Args:
        keep: Number of tokens of the end that matter; a longer text is cut before tokenising.
        is_bounded: Whether it must fit into the context; otherwise, whether it can be counted is checked.
    """
    text = chat_text(chat, served, settings)
    source = text.source
    if is_bounded:
        source = _bounded(source, len(text.shown), served, None if chat.images else keep)
    else:
        check_countable(text.shown, served)
    ids = served.tokenizer.encode(
        source, add_special_tokens=text.adds_special_tokens, is_marked=text.is_marked
    )
    assert served.chat_template is not None, "the messages were rendered"
    return Prompt(
        ids,
        echo=echoed_text(chat, served.chat_template, settings),
        num_characters=len(text.shown),
        tail=text.shown[-_TAIL_CHARS:],
        images=_located(ids, chat.images),
    )


def _located(ids: Sequence[int], images: Images | None) -> tuple[ImageInput, ...]:
    return locate_images(ids, images.loaded) if images else ()


def _text_prompt(prompt: Text, served: Served, keep: int | None) -> Prompt:
    end_ids = frozenset[int]()
    if isinstance(prompt.content, str):
        text = source = plain_text(prompt, served)
        if prompt.suffix:
            fill = _fill(served)
            source, end_ids = fill.marks.prompt(text, prompt.suffix), fill.end_ids
        source = _bounded(source, len(source), served, None if prompt.images else keep)
        ids = served.tokenizer.encode(source, add_special_tokens=prompt.adds_special_tokens)
        if not ids and prompt.may_be_empty:
            ids = _beginning(served)
    else:
        ids, text = list(prompt.content), ""
        if prompt.needs_text:
            text = served.tokenizer.decode(ids, skip_special_tokens=not prompt.shows_special_tokens)
    return Prompt(
        ids,
        echo=text if prompt.echoes else "",
        text=text if prompt.needs_text else None,
        num_characters=len(text) + len(prompt.suffix),
        images=_located(ids, prompt.images),
        end_ids=end_ids,
    )


def _fill(served: Served) -> Fill:
    if served.fill is None:
        message = "`suffix` is not supported: the vocabulary has no tokens that mark it for the model"
        raise UnsupportedSuffix(message, param="suffix", code="unsupported_parameter")
    return served.fill


def _beginning(served: Served) -> list[int]:
    """Return the token that stands for the beginning of a document, which is EOS for models without BOS."""
    tokenizer = served.tokenizer
    token_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [] if token_id is None else [token_id]


def check_countable(text: str, served: Served) -> None:
    """Refuse a text that would take too much memory if it were tokenised: about 200 bytes a character.

    Raises:
        InvalidRequest: if it is longer than `MAX_COUNTED_CHARS` and than any prompt that fits.
    """
    limit = max(MAX_COUNTED_CHARS, served.info.max_input_tokens * served.tokenizer.longest_token)
    if len(text) > limit:
        raise InvalidRequest(
            f"The tokens of a text with {len(text)} characters are not counted: the limit is {limit}",
            field=("prompt",),
        )


def _bounded(text: str, num_characters: int, served: Served, keep: int | None) -> str:
    """Return the end of a text that can matter; refuse a text that is too long however it is tokenised.

    Tokenising 16 MiB of text would occupy a worker thread for 20 s.
    """
    longest = served.tokenizer.longest_token
    if keep is None:
        check_characters(num_characters, longest, served.info)
        return text
    return text[-(keep + SLACK_TOKENS) * longest :]
