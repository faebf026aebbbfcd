"""Templates of real models, from llama.cpp and vLLM: the calls that they render are parsed again.

Each template has at most one call format and one reasoning style. The assistant's turn is cut out of a
rendered conversation and parsed by the character, in pieces, and whole.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.template_names import REPEATED
from tests.support.tool_calls import parse
from tests.support.tool_writers import write
from tgi_asgi.errors import TemplateError
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tools import (
    FORMATS,
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
    ToolSpec,
    harmony,
    with_fitting_ids,
)
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.harmony import HarmonyParser
from tgi_asgi.text.tools.reasoning import STYLES, wrapper_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# template: its call format and its reasoning style
MODELS: dict[str, tuple[str | None, str | None]] = {
    "Apertus-8B-Instruct": ("apertus", "apertus"),
    "Apriel-1.6-15b-Thinker-fixed": ("hunyuan_a13b", "apriel"),
    "Bielik-11B-v3.0-Instruct": ("hermes", "think"),
    "ByteDance-Seed-OSS": ("seed_oss", "seed_oss"),
    "Cohere2MoE": ("cohere_command3", "cohere"),
    "CohereForAI-c4ai-command-r-plus-tool_use": ("cohere_command_r", None),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("cohere_command3", "cohere"),
    "GLM-4.6": ("glm45", "think"),
    "GLM-4.7-Flash": ("glm45", "think"),
    "GigaChat3-10B-A1.8B": ("gigachat3", None),
    "GigaChat3.1-10B-A1.8B": ("gigachat3", None),
    "HuggingFaceTB-SmolLM3-3B": (None, "think"),
    "Kimi-K2-Instruct": ("kimi_k2", None),
    "Kimi-K2-Thinking": ("kimi_k2", "think"),
    "Kimi-K3": (None, None),
    "LFM2-8B-A1B": ("lfm2", None),
    "LFM2.5-8B-A1B": ("lfm2", "think"),
    "LFM2.5-Instruct": ("lfm2", "think"),
    "MiMo-VL": ("hermes", None),
    "MiniMax-M1": ("minimax_m1", None),
    "MiniMax-M2": ("minimax_m2", "think"),
    "MiniMax-M3": (None, "minimax_m3"),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral_ids", None),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("qwen3_coder", "think"),
    "NVIDIA-Nemotron-Nano-v2": ("nemotron", "think"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", None),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None),
    "Qwen-QwQ-32B": ("hermes", "think"),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
    "Qwen-Qwen3-0.6B": ("hermes", "think"),
    "Qwen3-Coder": ("qwen3_coder", None),
    "Qwen3.5-4B": ("qwen3_coder", "think"),
    "Reka-Edge": ("hermes", "think"),
    "Spark2.5": ("glm45", "think"),
    "StepFun3.5-Flash": ("qwen3_coder", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek_v3", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek_v3", "think"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek_v31", "think"),
    "deepseek-ai-DeepSeek-V3.2": ("deepseek_v32", "think"),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("deepseek_v4", "think"),
    "deepseek-ai-DeepSeek-V4": ("deepseek_v4", "think"),
    "fireworks-ai-llama-3-firefunction-v2": ("phi4_mini_json", None),
    "google-gemma-2-2b-it": (None, None),
    "google-gemma-4-31B-it-interleaved": ("gemma4", "gemma4"),
    "google-gemma-4-31B-it": ("gemma4", "gemma4"),
    "ibm-granite-granite-3.3-2B-Instruct": ("granite", "think"),
    "ibm-granite-granite-4.0": ("hermes", None),
    "ibm-granite-granite-4.1": ("hermes", None),
    "inclusionai-ling-3.0-flash": ("glm45", "think"),
    "llama-cpp-deepseek-r1": ("deepseek_v3", "think"),
    "llama-cpp-rwkv-world": (None, "think"),
    "meetkai-functionary-medium-v3.1": ("functionary_v3.1", None),
    "meetkai-functionary-medium-v3.2": ("functionary_v3.2", None),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", None),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3_json", None),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3_json", None),
    "microsoft-Phi-3.5-mini-instruct": (None, None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral_args", "mistral"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None),
    "moonshotai-Kimi-K2": ("kimi_k2", None),
    "muse-glimmer": (None, None),
    "openai-gpt-oss-120b": ("openai", None),
    "openbmb-MiniCPM5-1B": ("minicpm5", "think"),
    "poolside-Laguna-S-2.1": ("glm45", "think"),
    "poolside-Laguna-XS-2.1": ("glm45", "think"),
    "poolside-Laguna-XS.2": ("glm45", "think"),
    "tencent-Hy3": ("hy_v3", "hy_v3"),
    "unsloth-Apriel-1.5": ("hunyuan_a13b", "apriel"),
    "unsloth-mistral-Devstral-Small-2507": ("mistral_args", None),
    "upstage-Solar-Open-100B": ("solar_open", "solar"),
    "tool_chat_template_apertus": ("apertus", "apertus"),
    "tool_chat_template_deepseekr1": ("deepseek_v3", "think"),
    "tool_chat_template_deepseekv3": ("deepseek_v3", None),
    "tool_chat_template_deepseekv31": ("deepseek_v31", "think"),
    "tool_chat_template_functiongemma": ("functiongemma", None),
    "tool_chat_template_gemma3_pythonic": ("pythonic", None),
    "tool_chat_template_gemma4": ("gemma4", "gemma4"),
    "tool_chat_template_glm4": ("glm45", None),
    "tool_chat_template_granite": ("granite", None),
    "tool_chat_template_granite_20b_fc": ("granite-20b-fc", None),
    "tool_chat_template_hermes": ("hermes", None),
    "tool_chat_template_hunyuan_a13b": ("hunyuan_a13b", "think"),
    "tool_chat_template_internlm2_tool": ("internlm", None),
    "tool_chat_template_llama3.1_json": ("llama3_json", None),
    "tool_chat_template_llama3.2_json": ("llama3_json", None),
    "tool_chat_template_llama3.2_pythonic": ("pythonic", None),
    "tool_chat_template_llama4_json": ("llama3_json", None),
    "tool_chat_template_llama4_pythonic": ("pythonic", None),
    "tool_chat_template_mistral": ("mistral", None),
    "tool_chat_template_mistral3": ("mistral", None),
    "tool_chat_template_mistral_parallel": ("mistral", None),
    "tool_chat_template_muse_glimmer": (None, None),
    "tool_chat_template_phi4_mini": ("phi4_mini_json", None),
    "tool_chat_template_qwen3coder": ("qwen3_coder", None),
    "tool_chat_template_toolace": ("pythonic", None),
    "tool_chat_template_xlam_llama": ("xlam", None),
    "tool_chat_template_xlam_qwen": ("xlam", None),
}
# These do not render a call of an assistant's turn, or fail on one, so nothing can be parsed again.
RENDER_NO_CALL = {
    "HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct", "Kimi-K2-Thinking", "LFM2-8B-A1B", "LFM2.5-Instruct",
    "fireworks-ai-llama-3-firefunction-v2", "google-gemma-2-2b-it", "ibm-granite-granite-3.3-2B-Instruct",
    "llama-cpp-deepseek-r1", "llama-cpp-rwkv-world", "microsoft-Phi-3.5-mini-instruct",
    "tool_chat_template_glm4",
}  # fmt: skip
# These write text that does not belong to the turn, or values that are ambiguous.
UNPARSABLE = {
    "GigaChat3-10B-A1.8B": "a call is a message with a role of its own",
    "tool_chat_template_phi4_mini": "calls in Python syntax, without the marker before them",
    "tool_chat_template_gemma3_pythonic": "no comma between arguments",
    "tool_chat_template_llama3.2_pythonic": "no quotes around strings",
    "tool_chat_template_llama4_pythonic": "no quotes are escaped within strings, and numbers are quoted",
    "tool_chat_template_toolace": "no quotes around strings",
}
# Formats that none of these templates writes as `tool_writers` does, with the source of that form.
FORMATS_FROM_DOCS = {
    "mistral": "calls in the history have ids, those in answers do not",
    "pythonic": "Meta's documents; vLLM's templates lack quotes",
    "olmo3": "the template on its model's page",
    "lfm2": "Liquid's documents; LFM2.5's template quotes as Python does",
    "phi4_mini": "Microsoft's page of the model; its template writes no calls",
    "phi4_mini_json": "the prompt of vLLM's template",
    "glm4": "the template of GLM-4-0414",
    "minicpm5": "the template quotes only texts with tags",
    "functiongemma": "Google's documents; vLLM's template quotes numbers",
}

PROPERTIES = {
    "city": {"type": "string", "description": "Where"},
    "days": {"type": "integer", "description": "How many"},
    "units": {"type": "array", "items": {"type": "string"}, "description": "Which"},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES}
SPECS = [ToolSpec("weather", PARAMETERS), ToolSpec("now", None)]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "What it does", "parameters": parameters}}
    for name, parameters in (("weather", PARAMETERS), ("now", {"type": "object", "properties": {}}))
]
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("weather", {"city": 'Paris, "9e" {x}', "days": 3, "units": ["C", "F"]}),
    ("now", {}),
]
QUESTION = {"role": "user", "content": "QUESTION"}
THINKING = {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}


@pytest.fixture(scope="module")
def sources(llama_cpp: Path, vllm_examples: Path) -> dict[str, str]:
    """Return the templates by name."""
    paths = [*(llama_cpp / "models" / "templates").glob("*.jinja"), *vllm_examples.glob("*.jinja")]
    return {path.name.removesuffix(".jinja"): path.read_text() for path in sorted(paths)}


def test_each_template_is_of_one_format_and_one_style(sources: dict[str, str]) -> None:
    found: dict[str, Any] = {}
    for name, source in sources.items():
        forms = [form.name for form in FORMATS.values() if form.recognises(source)]
        forms += [harmony.NAME] if harmony.recognises(source) else []
        styles = [style.name for style in STYLES if style.recognises(source)]
        found[name] = tuple(each[0] if len(each) == 1 else each or None for each in (forms, styles))
    assert found == MODELS


@dataclass(frozen=True)
class Turn:
    """An assistant's turn as a template renders it, following the generation prompt."""

    text: str
    prompt: str
    num_calls: int
    has_text: bool
    has_thoughts: bool


@functools.cache  # compiling a template takes a tenth of a second, and three tests read its turns
def turns(source: str) -> tuple[Turn, ...]:
    """Return the turns that a template renders, with and without text, reasoning and a second call."""
    template = ChatTemplate(source, SPECIAL)
    result = []
    for num_calls, has_text, has_thoughts in product((1, 2), (True, False), (True, False)):
        calls: list[dict[str, Any]] = [
            {
                "id": f"call0000{index}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for index, (name, arguments) in enumerate(CALLS[:num_calls])
        ]
        answer: dict[str, Any] = {
            "role": "assistant",
            "content": "TEXT" if has_text else None,
            "tool_calls": calls,
        }
        if has_thoughts:
            answer |= {"reasoning_content": "THOUGHTS", "reasoning": "THOUGHTS"}
        results = [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "name": call["function"]["name"],
                "content": "RESULT",
            }
            for call in calls
        ]
        options: dict[str, Any] = {"tools": TOOLS, **THINKING}
        try:
            prompt = template.render([QUESTION], add_generation_prompt=True, **options)
            whole = template.render(
                with_fitting_ids([QUESTION, answer, *results], source), add_generation_prompt=False, **options
            )
        except TemplateError:
            continue
        prompt, whole = (text[text.rindex("QUESTION") :] for text in (prompt, whole))
        text = whole[begin_of(prompt, whole) :].partition("RESULT")[0]
        result.append(Turn(text, prompt, num_calls, "TEXT" in text, "THOUGHTS" in text))
    return tuple(result)


def begin_of(prompt: str, whole: str) -> int:
    """Return where the turn begins: after the common prefix and the assistant's mark, not within a mark."""
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    if same < len(prompt):
        ends = [found.end() for found in re.finditer(r"[>\]\n]", whole[:same])]
        same = max(ends, default=same)
    mark = re.search(r"(<[^<>]+>|\w+:)\s*(<think>)?\s*$", prompt)
    if mark and "think" not in mark[1].lower():
        rest = re.split("TEXT|THOUGHTS|weather", whole[same:])[0]
        at = rest.rfind(mark[1])
        same += at + len(mark[1]) if at >= 0 else 0
    return same


def read(turn: Turn, source: str, model: tuple[str | None, str | None], size: int) -> list[Piece]:
    form, style = model
    if form == harmony.NAME:
        return parse(HarmonyParser(SPECS), turn.text, size)
    known = next((each for each in STYLES if each.name == style), None)
    is_open = known is not None and known.is_open(turn.prompt)
    if known is not None and is_open:  # some templates open it again, or omit an empty one
        is_open = known.end in turn.text and not turn.text.lstrip().startswith(known.start)
    parser = AnswerParser(
        known, FORMATS[form or "hermes"], SPECS, is_reasoning_open=is_open, wrapper=wrapper_of(source)
    )
    return parse(parser, turn.text, size)


def calls_of(pieces: list[Piece]) -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            result.append((piece.name, None))
        elif isinstance(piece, CallArguments):
            result[-1] = (result[-1][0], json.loads(piece.text))
    return result


def as_parameter(name: str) -> Any:
    """Return the parameter of a template; the repeated ones are left to `make test-models`."""
    return pytest.param(name, marks=pytest.mark.models if name in REPEATED else ())


def with_calls(source: str) -> list[Turn]:
    """Return the turns of a template that contain a call's name."""
    return [turn for turn in turns(source) if "weather" in turn.text]


@pytest.mark.parametrize("name", [as_parameter(name) for name in MODELS])
def test_the_table_knows_which_templates_render_no_call(name: str, sources: dict[str, str]) -> None:
    assert (not with_calls(sources[name])) == (name in RENDER_NO_CALL)


@pytest.mark.parametrize(
    "name",
    [as_parameter(name) for name, (form, _) in MODELS.items() if form is not None and name not in UNPARSABLE],
)
def test_a_turn_with_calls_is_read_as_it_was_rendered(name: str, sources: dict[str, str]) -> None:
    rendered = with_calls(sources[name])
    marker = form.marker if (form := FORMATS.get(MODELS[name][0] or "")) else "<|channel|>"
    for turn in rendered:
        if turn.has_text and not marker:  # such an answer is either all calls or all text
            continue
        for size in (1, 7, len(turn.text)):
            pieces = read(turn, sources[name], MODELS[name], size)
            assert calls_of(pieces) == [call for call in CALLS if re.search(rf"\b{call[0]}\b", turn.text)], (
                turn
            )
            thoughts = [piece.text.strip() for piece in pieces if isinstance(piece, Reasoning)]
            if MODELS[name][0] == harmony.NAME:  # only reasoning may precede a call
                expected = {
                    (True, True): "THOUGHTS\n\nTEXT",
                    (True, False): "THOUGHTS",
                    (False, True): "TEXT",
                }
                assert "".join(thoughts) == expected.get((turn.has_thoughts, turn.has_text), ""), turn
            elif MODELS[name][1]:
                assert "".join(thoughts) == ("THOUGHTS" if turn.has_thoughts else ""), turn
            first = next(at for at, piece in enumerate(pieces) if isinstance(piece, CallStart))
            before = "".join(piece.text for piece in pieces[:first] if isinstance(piece, Content)).strip()
            assert before in ("", "TEXT"), turn


def test_calls_are_written_as_the_formats_writers_write_them(sources: dict[str, str]) -> None:
    def bare(text: str) -> str:
        return re.sub(r"\s", "", text).replace("'", '"')

    written = set()
    for name, (form, _) in MODELS.items():
        for turn in turns(sources[name]) if form in FORMATS and name not in REPEATED else ():
            if form is not None and bare(write(form, CALLS[: turn.num_calls])) in bare(turn.text):
                written.add(form)
    assert FORMATS.keys() - written == FORMATS_FROM_DOCS.keys()
