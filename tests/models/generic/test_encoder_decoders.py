"""Encoder-decoders: every answer has the logits and the text of `transformers`, in steps and over HTTP."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from tests.models.generic.test_http import MAX_TOKENS, serving
from tests.support import encoder_decoders
from tests.support.architectures import made_once, random_ids
from tests.support.generic import open_generic
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.kinds import ENCODER_DECODERS
from tgi_asgi.models.adapters import targets_of
from tgi_asgi.models.generic import encoder_decoder_cache, encoder_decoder_check
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.steps import flat_rows
from tgi_asgi.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

USUAL = ["t5", "bart", "m2m_100", "t5gemma"]
EQUAL = 1e-3  # relative to the largest logit; most are within 1e-6
SPECIAL = ["<s>", "</s>", "<pad>"]
Checkpoint = Callable[[str], Path]

SERVED = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.models)
    for name in encoder_decoders.TYPES
    if name not in encoder_decoders.REFUSED
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made_once(tmp_path_factory.mktemp("encoder-decoders"), encoder_decoders.make)


def load(folder: Path, arithmetic: ops.Arithmetic | None = None) -> GenericModel:
    with open_generic(folder) as opened:
        model = opened.load(arithmetic or ops.Packing(is_exact=True), 128)
    assert isinstance(model, GenericModel)
    return model


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    """Copy a checkpoint with changes of its config.json."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_steps(model: GenericModel, pairs: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """Return the logits after each answer's tokens: prompts in chunks of 16 beside others, then singly."""
    program = model.program([], 128)
    sequences = [np.array([*prompt, *answer[:-1]]) for prompt, answer in pairs]
    sizes = [len(prompt) for prompt, _ in pairs]
    for slot, (prompt, _) in enumerate(pairs):
        program.start(slot, prompt, ())
    done = [0] * len(pairs)
    found: list[list[np.ndarray]] = [[] for _ in pairs]
    while any(at < len(ids) for at, ids in zip(done, sequences, strict=True)):
        rows, wanted, owners, first = [], [], [], 0
        for slot, (ids, size, at) in enumerate(zip(sequences, sizes, done, strict=True)):
            end = min(at + 16, size) if at < size else min(at + 1, len(ids))
            if end == at:
                continue
            rows.append((slot, ids[at:end], at))
            if end >= size:
                wanted.append(first + end - at - 1)
                owners.append(slot)
            first, done[slot] = first + end - at, end
        for owner, logits in zip(owners, program.run(flat_rows(rows, 8), wanted), strict=True):
            found[owner].append(logits.copy())
    return [np.stack(rows) for rows in found]


def random_pairs() -> list[tuple[list[int], list[int]]]:
    return [
        (random_ids(size, size), random_ids(answer, 100 + size))
        for size, answer in ((37, 6), (9, 14), (16, 3))
    ]


def test_every_type_that_is_served_is_tried() -> None:
    assert set(encoder_decoders.TYPES) - set(encoder_decoders.REFUSED) == ENCODER_DECODERS
    assert set(encoder_decoders.TYPES) <= set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def test_the_page_names_those_that_are_served() -> None:
    text = (Path(__file__).parents[3] / "docs/generic.md").read_text(encoding="utf-8")
    part = text.partition("## Encoder-decoders")[2].partition("\n## ")[0]
    served, _, refused = part.partition("Two are refused")
    for name in encoder_decoders.TYPES:
        assert re.search(rf"[ :]{re.escape(name)}\b", refused if name in encoder_decoders.REFUSED else served)


@pytest.mark.parametrize("model_type", SERVED)
def test_answers_have_the_logits_of_transformers(model_type: str, checkpoint: Checkpoint) -> None:
    folder, pairs = checkpoint(model_type), random_pairs()
    model = load(folder)
    assert model.is_batched == (model_type not in encoder_decoders.ALONE)
    references = encoder_decoders.references(folder, pairs)
    for found, expected in zip(in_steps(model, pairs), references, strict=True):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL


def test_an_answer_that_begins_takes_no_experts_from_the_others(checkpoint: Checkpoint) -> None:
    folder = checkpoint("nllb-moe")
    # The last answer begins when the others have five tokens; the mask of its keys is as wide as theirs.
    pairs = [(random_ids(5, size), random_ids(12, size)) for size in range(1, 6)]
    pairs.append((random_ids(70, 70), random_ids(9, 70)))
    references = encoder_decoders.references(folder, pairs)
    for found, expected in zip(in_steps(load(folder), pairs), references, strict=True):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL


@pytest.mark.parametrize("num_layers", [1, 5])
@pytest.mark.parametrize(
    "model_type", ["t5", *(pytest.param(name, marks=pytest.mark.models) for name in ("longt5", "umt5"))]
)
def test_a_decoder_may_have_more_or_fewer_layers_than_its_encoder(
    model_type: str, num_layers: int, tmp_path: Path
) -> None:
    encoder_decoders.make(model_type, tmp_path, num_decoder_layers=num_layers)
    pairs = random_pairs()
    references = encoder_decoders.references(tmp_path, pairs)
    for found, expected in zip(in_steps(load(tmp_path), pairs), references, strict=True):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_a_sequence_that_is_resumed_goes_on_as_before(model_type: str, checkpoint: Checkpoint) -> None:
    """After a preemption, a row holds the prompt and the answer so far, in chunks that end anywhere."""
    folder, prompt, answer = checkpoint(model_type), random_ids(20, 1), random_ids(9, 2)
    [expected] = encoder_decoders.references(folder, [(prompt, answer)])
    program = load(folder).program([], 128)
    ids = np.array([*prompt, *answer[:-1]])
    for cut in (7, 19, 20, 25):
        program.start(0, prompt, ())
        program.run(flat_rows([(0, ids[:cut], 0)], 8), [])
        found = program.run(flat_rows([(0, ids[cut:], cut)], 8), [len(ids) - cut - 1])
        np.testing.assert_allclose(found[0], expected[-1], atol=EQUAL * np.abs(expected).max())


def test_a_step_that_fails_or_is_void_leaves_the_states_before_it(checkpoint: Checkpoint) -> None:
    program = load(checkpoint("t5")).program([], 128)
    program.start(0, random_ids(10, 1), ())
    program.run(flat_rows([(0, np.array(random_ids(10, 1)), 0)], 8), [9])
    token, other = (np.array(random_ids(1, seed)) for seed in (5, 6))
    expected = program.run(flat_rows([(0, token, 10)], 8), [0]).copy()
    program.roll_back_to(1)
    assert not np.array_equal(program.run(flat_rows([(0, other, 10)], 8), [0]), expected)
    program.roll_back_to(2)
    assert np.array_equal(program.run(flat_rows([(0, token, 10)], 8), [0]), expected)


def bytes_kept(program: Any) -> int:
    """Return the bytes of all tensors that the states of a program's slots keep alive."""
    found: dict[int, int] = {}
    for state in (state.cache for states in program._states._states.values() for state in states):
        for pair in (state.cache, state.batch.cache if state.batch is not None else None):
            for part in () if pair is None else (pair.self_attention_cache, pair.cross_attention_cache):
                for tensor in (each for layer in part.layers for each in (layer.keys, layer.values)):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_an_answer_that_has_ended_keeps_no_other_s_memory(checkpoint: Checkpoint) -> None:
    """Sequences end one after the other; each would otherwise keep the batch that it was in."""
    program, prompt = load(checkpoint("t5")).program([], 128), np.array(random_ids(60, 1))
    for slot in range(12):
        program.start(slot, prompt.tolist(), ())
        program.run(flat_rows([(slot, prompt, 0)], 8), [59])
    alone = bytes_kept(program) / 12
    for step in range(11):
        rows = [(slot, prompt[:1], 60 + step) for slot in range(step, 12)]
        program.run(flat_rows(rows, 8), list(range(len(rows))))
    assert bytes_kept(program) < 12 * 3 * alone


def test_a_short_prompt_does_not_change_the_attention_of_a_long_one(tmp_path: Path) -> None:
    """BigBird's encoder attends fully to short prompts, and goes on doing so."""
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    encoder_decoders.make("bigbird_pegasus", tmp_path, **sparse)
    pairs = [(random_ids(size, size), random_ids(3, size)) for size in (10, 100)]
    model = load(tmp_path)
    short, long = in_steps(model, pairs)
    [expected] = encoder_decoders.references(tmp_path, pairs[1:])
    assert np.abs(long - expected).max() / np.abs(expected).max() < EQUAL
    [expected] = encoder_decoders.references(tmp_path, pairs[:1])
    assert np.abs(short - expected).max() / np.abs(expected).max() < EQUAL


@pytest.mark.parametrize("model_type", ["marian", pytest.param("pegasus", marks=pytest.mark.models)])
def test_a_table_of_sines_is_computed_if_the_files_lack_it(
    model_type: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(checkpoint(model_type) / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "embed_positions" not in name}
    for file in checkpoint(model_type).glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager")
    prompt, answer = random_ids(9, 1), random_ids(4, 2)
    ids = torch.tensor([[encoder_decoders.START, *answer[:-1]]])
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0].numpy()
    [found] = in_steps(load(tmp_path), [(prompt, answer)])
    assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL
    del kept["model.encoder.layers.0.fc1.weight"]
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"there is no tensor 'model\.encoder\.layers\.0\.fc1\.weight'"):
        load(tmp_path)


def test_a_prompt_has_no_logits(checkpoint: Checkpoint) -> None:
    program = load(checkpoint("t5")).program([], 128)
    program.start(0, random_ids(10, 1), ())
    with pytest.raises(ops.PlanError, match="no logits of a prompt"):
        program.run(flat_rows([(0, np.array(random_ids(10, 1)), 0)], 8), [3])
    with pytest.raises(ops.PlanError, match="no logits of a prompt"):
        program.run_head([0])
    with pytest.raises(ops.PlanError, match="gives no vectors"):
        program.hidden(0, 1)


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian"])
def test_packed_weights_stay_close(model_type: str, checkpoint: Checkpoint) -> None:
    """A vocabulary that encoder, decoder and head share is packed once."""
    folder, pairs = checkpoint(model_type), random_pairs()
    model = load(folder, ops.Packing(is_exact=False, quantise="Q8_0"))
    tables = {
        id(module.made)
        for name, module in model.module.named_modules()
        if name.endswith(("embed_tokens", "shared")) or name in ("lm_head.inner", "lm_head")
        if getattr(module, "made", None) is not None
    }
    assert len(tables) == 1
    assert not [name for name, module in model.module.named_modules() if type(module) is torch.nn.Linear]
    for found, expected in zip(
        in_steps(model, pairs), encoder_decoders.references(folder, pairs), strict=True
    ):
        assert np.abs(found - expected).max() / np.abs(expected).max() < 0.1


@pytest.mark.parametrize("model_type", sorted(encoder_decoders.REFUSED))
def test_what_cannot_go_on_from_a_cache_is_refused(model_type: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelLoadError, match=encoder_decoders.REFUSED[model_type]):
        load(checkpoint(model_type))


@pytest.mark.parametrize(
    ("lacks", "fault"),
    [
        (
            "the answer so far",
            lambda answer: encoder_decoder_cache.Answer(encoded=answer.encoded, cache=None),
        ),
        ("the beginning of the prompt", lambda answer: encoder_decoder_cache.Answer(cache=answer.cache)),
    ],
)
def test_the_self_check_finds_what_a_copy_loses(
    lacks: str, fault: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_decoder_cache.Answer, "copy", fault)
    with pytest.raises(ModelLoadError, match=r"self-check|does not run here"):
        load(checkpoint("t5"))


def test_answers_are_computed_alone_if_they_are_wrong_together(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's code sees here what stands before the shorter answer."""
    masks = encoder_decoder_cache.Batch.masks

    def without_answers(batch: encoder_decoder_cache.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        prompts, answers = masks(batch)
        return prompts, torch.ones_like(answers)

    monkeypatch.setattr(encoder_decoder_cache.Batch, "masks", without_answers)
    model, pairs = load(checkpoint("bart")), random_pairs()
    assert not model.is_batched
    references = encoder_decoders.references(checkpoint("bart"), pairs)
    for found, expected in zip(in_steps(model, pairs), references, strict=True):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL


def test_the_self_check_finds_logits_that_are_no_numbers(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_decoder_check, "_whole", lambda *_: torch.full((6, 320), torch.nan))
    with pytest.raises(ModelLoadError, match="fails its self-check"):
        load(checkpoint("t5"))


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_the_class_with_a_head_computes_a_file_that_names_the_one_without(
    model_type: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As in facebook/bart-base and older files of T5."""
    name = {"bart": "BartModel", "t5": "T5WithLMHeadModel"}[model_type]
    with open_generic(with_config(checkpoint(model_type), tmp_path, architectures=[name])) as opened:
        assert opened.config.architecture.endswith("ForConditionalGeneration")


def test_files_must_say_how_an_answer_begins(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = with_config(checkpoint("t5"), tmp_path, decoder_start_token_id=None)
    (folder / "generation_config.json").unlink()
    with open_generic(with_config(folder, folder, bos_token_id=7)) as opened:
        assert opened.config.encoder_decoder is not None and opened.config.encoder_decoder.starts == (7,)
    for wrong in (None, 320, -1, "0", True):
        with pytest.raises(ModelLoadError, match="needs the token that an answer begins with"):
            open_generic(with_config(folder, folder, bos_token_id=wrong))
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 4, "forced_bos_token_id": 5}')
    with open_generic(folder) as opened:
        assert opened.config.encoder_decoder is not None and opened.config.encoder_decoder.starts == (4, 5)


def test_marian_writes_every_token_of_a_vocabulary_that_its_parts_share(tmp_path: Path) -> None:
    encoder_decoders.make("marian", tmp_path, decoder_vocab_size=200)  # transformers ignores it then
    pairs = random_pairs()
    model = load(tmp_path)
    assert model.config.vocab_size == 320
    for found, expected in zip(
        in_steps(model, pairs), encoder_decoders.references(tmp_path, pairs), strict=True
    ):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL


def test_a_pair_that_writes_other_tokens_than_it_reads_is_refused(tmp_path: Path) -> None:
    encoder_decoders.make("marian", tmp_path, decoder_vocab_size=400, share_encoder_decoder_embeddings=False)
    with pytest.raises(ModelLoadError, match="it reads 320 tokens and writes 400, two vocabularies"):
        load(tmp_path)


def test_adapters_beside_the_base_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelLoadError, match="takes no adapters: it is an encoder-decoder"):
        targets_of(load(checkpoint("t5")))


def test_an_adapter_that_is_the_model_is_merged(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base: Any = encoder_decoders.open_reference(checkpoint("t5"))
    torch.manual_seed(1)
    how = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=64, target_modules=["q", "wo"], init_lora_weights=False
    )
    adapted: Any = peft.get_peft_model(base, how)
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint("t5"))
    adapted.save_pretrained(tmp_path)
    ids = random_ids(20, 1)
    expected = adapted.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 1:]
    with serving(tmp_path) as client:
        assert complete(client, ids, max_tokens=8)["choices"][0]["token_ids"] == expected.tolist()


@pytest.fixture(scope="module")
def t5(checkpoint: Checkpoint) -> Iterator[httpx.Client]:
    with serving(checkpoint("t5"), enable_prefill_logprobs=True) as client:
        yield client


def complete(client: httpx.Client, prompt: str | list[int], **more: Any) -> Any:
    body = {"model": "any", "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    answer = client.post("/v1/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_many_answers_at_once_are_those_of_generate(
    penalty: float, t5: httpx.Client, checkpoint: Checkpoint
) -> None:
    """More of them than run at a time; a penalty counts the answer, not the prompt."""
    model: Any = encoder_decoders.open_reference(checkpoint("t5"))
    prompts = [random_ids(20 + seed, seed) for seed in range(8)]
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=penalty)
        for ids in prompts
    ]
    with ThreadPoolExecutor(len(prompts)) as executor:
        answers = list(executor.map(lambda ids: complete(t5, ids, repetition_penalty=penalty), prompts))
    for prompt, answer, ids in zip(prompts, answers, expected, strict=True):
        assert answer["choices"][0]["token_ids"] == ids[0, 1:].tolist()
        assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_generate_answers_as_the_pipeline_of_such_models_does(t5: httpx.Client) -> None:
    assert t5.get("/info").json()["model_pipeline_tag"] == "text2text-generation"
    parameters = {"max_new_tokens": 5, "details": True, "decoder_input_details": True}
    body: dict[str, Any] = {"inputs": "abc", "parameters": parameters}
    whole = t5.post("/generate", json=body).json()
    assert whole["details"]["generated_tokens"] == len(whole["details"]["tokens"]) == 5
    assert whole["details"]["prefill"] == [{"id": encoder_decoders.START, "text": "<s>", "logprob": None}]
    assert not whole["generated_text"].startswith("abc")
    del parameters["decoder_input_details"]
    assert t5.post("/", json=body).json()[0]["generated_text"] == whole["generated_text"]
    parameters["return_full_text"] = True
    assert t5.post("/generate", json=body).json()["generated_text"] == "abc" + whole["generated_text"]
    with t5.stream("POST", "/generate_stream", json=body) as stream:
        events = [json.loads(line[5:]) for line in stream.iter_lines() if line]
    assert [event["token"]["id"] for event in events] == [each["id"] for each in whole["details"]["tokens"]]


def test_what_needs_a_prompt_s_logits_is_refused(t5: httpx.Client) -> None:
    def refusal(path: str, **body: Any) -> str:
        answer = t5.post(path, json={"model": "any"} | body)
        assert answer.status_code in (400, 422)
        return str(answer.json()["error"]["message"])

    assert "encoder-decoder" in refusal("/v1/completions", prompt="abc", echo=True, logprobs=1)
    assert complete(t5, "abc", echo=True, best_of=2)["choices"][0]["text"].startswith("abc")
    assert "an encoder-decoder gives no vectors" in refusal("/v1/embeddings", input="abc")
    assert "no chat template" in refusal("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert f"maximum context length is {MAX_TOKENS}" in refusal("/v1/completions", prompt="ab" * 60)


def test_prompt_and_answer_may_each_be_as_long_as_the_positions(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bart"
    encoder_decoders.make("bart", folder, max_position_embeddings=24)
    with caplog.at_level(logging.WARNING), serving(folder, max_input_tokens=40) as client:
        assert client.get("/info").json()["max_input_tokens"] == 24
        ids = random_ids(25, 1)
        answer = complete(client, ids[:24], max_tokens=24, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 24
        answer = client.post("/v1/completions", json={"model": "any", "prompt": ids[:3], "max_tokens": 25})
        assert (
            answer.json()["error"]["message"]
            == "`max_tokens` must be at most 24, the longest answer of this model"
        )
        assert client.post("/v1/completions", json={"model": "any", "prompt": ids}).status_code == 400
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 30}}
        assert client.post("/generate", json=body).status_code == 200
    assert "--max-input-tokens 40 is cut to 24: the encoder has no more positions" in caplog.text


def test_an_answer_is_a_text_of_its_own(tmp_path: Path) -> None:
    """Sentencepiece writes a space before a text's first word, which `decode` of transformers removes."""
    encoder_decoders.make("t5", tmp_path)
    letters = [chr(ord("a") + each) for each in range(26)]
    pairs = [f"▁{first}{second}" for first in letters for second in letters]
    pieces = [*SPECIAL, "<unk>", "▁", *letters, *pairs][:320]
    scores = [(piece, -float(at % 7)) for at, piece in enumerate(pieces)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, 3, byte_fallback=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    model: Any = encoder_decoders.open_reference(tmp_path)
    firsts = set()
    with serving(tmp_path) as client:
        for prompt in ("translate this", "ab cd", "he ll o", "xyz", "q"):
            ids = own(prompt, return_tensors="pt").input_ids
            expected = own.decode(
                model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True
            )
            answer = complete(client, prompt, max_tokens=8)
            assert answer["choices"][0]["text"] == expected
            firsts.add(own.convert_ids_to_tokens(answer["choices"][0]["token_ids"][:1])[0][0])
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 8}}
            assert client.post("/generate", json=body).json()["generated_text"] == expected
        # A grammar allows the token that writes the space as well.
        likes = {"logit_bias": {str(pieces.index("▁ab")): 60}, "max_tokens": 8}
        answer = complete(client, "xyz", **likes, structured_outputs={"choice": ["ab", "cd"]})
        assert answer["choices"][0]["text"] == "ab"
        assert answer["choices"][0]["token_ids"][0] == pieces.index("▁ab")
    assert "▁" in firsts
    assert Tokenizer.from_directory(tmp_path).drops_first_space
