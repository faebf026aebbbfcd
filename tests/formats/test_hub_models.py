"""Models from the Hub over sockets, with huggingface_hub's real client: what is chosen, fetched and kept.

Each process resolves several names, because the client reads its environment when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.support.fake_hub import COMMIT, FILES, Hub, Repository, running_hub
from tests.support.forked import run_forked

WHISPER = b'{"is_encoder_decoder": true, "num_mel_bins": 80}'
LLAMA = {**FILES, "config.json": b'{"architectures": ["LlamaForCausalLM"]}'}
GGUFS = {
    "README.md": b"# GGUF",
    "config.json": b"{}",
    "m-Q8_0.gguf": b"eight",
    "m-Q4_K_M.gguf": b"four",
    "big [x]/m-BF16-00001-of-00002.gguf": b"first",
    "big [x]/m-BF16-00002-of-00002.gguf": b"second",
    "mmproj-F16.gguf": b"eyes",
}
INDEX = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}


MATRICES = {"a.lora_A.weight": np.ones((4, 8)), "a.lora_B.weight": np.ones((8, 4))}
ADAPTER = save({name: matrix.astype(np.float32) for name, matrix in MATRICES.items()})


def adapter_config(base: str, **keys: Any) -> bytes:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base, "revision": "v2"}
    return json.dumps({**config, **keys}).encode()


def repositories() -> dict[str, Repository]:
    return {
        "org/m-GGUF": Repository(GGUFS),
        "org/private-GGUF": Repository(GGUFS, is_private=True),
        "org/gated-GGUF": Repository(GGUFS, is_gated=True),
        "org/both": Repository({**LLAMA, "m-Q4_K_M.gguf": b"four"}),
        "org/lacking-GGUF": Repository({"m-Q8_0-00002-of-00002.gguf": b"second"}),
        "org/gptq": Repository({"config.json": b"{}", "gptq_model-4bit.safetensors": b"x"}),
        "org/sharded": Repository(
            {
                "config.json": b"{}",
                "model.safetensors.index.json": json.dumps(INDEX).encode(),
                "part-1.safetensors": b"x",
                "part-2.safetensors": b"y",
                "model.fp16.safetensors": b"again",
            }
        ),
        "org/lacking": Repository(
            {
                "config.json": b"{}",
                "model.safetensors.index.json": json.dumps(INDEX).encode(),
                "part-1.safetensors": b"x",
            }
        ),
        "org/tuned": Repository(
            {
                "adapter_config.json": adapter_config("org/both"),
                "adapter_model.safetensors": ADAPTER,
                "adapter_model.bin": b"pickle",
                "tokenizer_config.json": b"{}",
                "checkpoint-1/adapter_model.safetensors": b"y",
            }
        ),
        "org/lost": Repository(
            {"adapter_config.json": adapter_config("org/gone"), "adapter_model.safetensors": ADAPTER}
        ),
        "org/dead": Repository(
            {
                "adapter_config.json": adapter_config("org/both", lora_bias=True),
                "adapter_model.safetensors": ADAPTER,
            }
        ),
        "org/pickled": Repository(
            {"adapter_config.json": adapter_config("org/both"), "adapter_model.bin": b"x"}
        ),
        "org/medusa": Repository(
            {
                "config.json": b'{"medusa_num_heads": 3, "base_model_name_or_path": "org/both"}',
                "medusa_lm_head.safetensors": b"x",
            }
        ),
        "org/accelerator": Repository(
            {"config.json": b'{"model_type": "mlp_speculator"}', "model.safetensors": b"x"}
        ),
        "org/pipeline": Repository({"model_index.json": b"{}", "unet/model.safetensors": b"x"}),
        "org/whisper": Repository({**FILES, "config.json": WHISPER}),
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(repositories()) as running:
        yield running


def find(tmp_path: Path, endpoint: str, *names: str, **environ: str) -> tuple[list[Any], str]:
    """Resolve names in one process; return the outcome of each, and the log."""
    where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
    run = run_forked(["tests.formats.resolve_names", *names], {**where, **environ})
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return [_outcome(**each) for each in found], run.stderr


def _outcome(error: str | None = None, more: Sequence[str] = (), **found: Any) -> Any:
    """Return why a name has no model, or the model's name, kind, path and revision, and its other files."""
    return error or [*(found[name] for name in ("model_id", "kind", "path", "revision")), *more]


def snapshot(tmp_path: Path, repo_id: str) -> Path:
    return tmp_path / "hf" / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT


def test_a_gguf_file_is_fetched_with_its_projector_and_found_again_without_network(
    hub: Hub, tmp_path: Path
) -> None:
    folder = snapshot(tmp_path, "org/m-GGUF")
    (found,), log = find(tmp_path, hub.address, "org/m-GGUF", REVISION="v2")
    paths = [str(folder / "m-Q4_K_M.gguf"), COMMIT, str(folder / "mmproj-F16.gguf")]
    assert found == ["org/m-GGUF", "gguf", *paths]
    assert "org/m-GGUF: using Q4_K_M" in log
    assert sorted(hub.fetched()) == ["m-Q4_K_M.gguf", "mmproj-F16.gguf"]
    assert (folder / "m-Q4_K_M.gguf").read_bytes() == b"four"
    names = ("org/m-GGUF:q4_k_m", "org/m-GGUF", "org/m-GGUF:Q8_0", "org/other-GGUF:Q8_0")
    (named, unnamed, absent, unknown), _ = find(
        tmp_path, "http://127.0.0.1:9", *names, HF_HUB_OFFLINE="1", REVISION="v2"
    )
    assert named[1:] == unnamed[1:] == found[1:]
    assert absent == "the Hub's cache of org/m-GGUF has no 'Q8_0'; it has Q4_K_M"
    assert "nor in the Hub's cache" in unknown
    # An unreachable Hub is treated like working offline.
    (again,), _ = find(tmp_path, "http://127.0.0.1:9", "org/m-GGUF:Q4_K_M", REVISION="v2")
    assert again[1:] == found[1:]


@contextlib.contextmanager
def not_the_hub(answer: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """Answer every request with these bytes, or with silence; yield the address and the requests' starts."""
    requests: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            requests.append(self.request.recv(4096).partition(b"\r")[0])
            if answer is None:
                self.request.recv(1)  # until the client gives up
            else:
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()
        thread.join()


# It closes each connection and says so: otherwise the next request might be sent into a closed one.
PORTAL = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: 6\r\n\r\nlog in"


@pytest.mark.parametrize("answer", [None, b"", PORTAL], ids=["silence", "a closed connection", "a portal"])
def test_what_is_in_the_cache_is_served_although_something_stands_between_server_and_hub(
    hub: Hub, tmp_path: Path, answer: bytes | None
) -> None:
    """A firewall may drop what is sent, or a proxy answer in the Hub's place; the Hub is asked only once."""
    before, _ = find(tmp_path, hub.address, "org/sharded", "org/m-GGUF")
    with not_the_hub(answer) as (address, requests):
        names = ("org/sharded", "org/m-GGUF", "org/unknown")
        (*after, unknown), log = find(tmp_path, address, *names, HF_HUB_ETAG_TIMEOUT="1")
    assert after == before
    assert len([line for line in requests if b"/api/models/" in line]) == len(names)
    assert log.count("the Hub cannot be asked") == len(before)
    assert "org/unknown is neither a file or directory here nor in the Hub's cache" in unknown


def test_a_gguf_file_is_fetched_alone_if_it_is_to_read_texts_only(hub: Hub, tmp_path: Path) -> None:
    (found,), _ = find(tmp_path, hub.address, "org/m-GGUF", MMPROJ="none")
    assert found[2:] == [str(snapshot(tmp_path, "org/m-GGUF") / "m-Q4_K_M.gguf"), COMMIT]
    assert hub.fetched() == ["m-Q4_K_M.gguf"]


def test_names_behind_the_colon_choose_among_files_folders_and_parts(hub: Hub, tmp_path: Path) -> None:
    names = [f"org/m-GGUF:{name}" for name in ("q8_0", "m-Q8_0.gguf", "bf16", "Q2_K", "mmproj-F16.gguf")]
    (eight, by_file, parts, absent, eyes), _ = find(tmp_path, hub.address, *names)
    folder = snapshot(tmp_path, "org/m-GGUF")
    assert eight[2] == by_file[2] == str(folder / "m-Q8_0.gguf")
    assert parts[2] == str(folder / "big [x]" / "m-BF16-00001-of-00002.gguf")
    assert (folder / "big [x]" / "m-BF16-00002-of-00002.gguf").read_bytes() == b"second"
    assert absent == "org/m-GGUF has no 'Q2_K'; it has BF16, Q4_K_M, Q8_0"
    assert "org/m-GGUF has no 'mmproj-F16.gguf'" in eyes
    assert sorted(hub.fetched()) == sorted(
        name for name in GGUFS if any(each in name for each in ("BF16", "Q8_0", "mmproj"))
    )


def test_an_adapter_is_fetched_with_its_base_model(hub: Hub, tmp_path: Path) -> None:
    (dead, pickled), _ = find(tmp_path, hub.address, "org/dead", "org/pickled")
    assert "adapters with biases (lora_bias) are not served" in dead and "pickles are never read" in pickled
    assert "model.safetensors" not in hub.fetched()  # the base's
    (tuned, lost), log = find(tmp_path, hub.address, "org/tuned", "org/lost")
    folder, base = snapshot(tmp_path, "org/tuned"), snapshot(tmp_path, "org/both")
    assert tuned == ["org/tuned", "directory", str(base), COMMIT, str(folder)]
    assert "org/tuned is an adapter, and is merged into org/both" in log
    assert {"adapter_model.safetensors", "tokenizer_config.json", "model.safetensors"} < set(hub.fetched())
    assert not {"adapter_model.bin", "checkpoint-1/adapter_model.safetensors"} & set(hub.fetched())
    assert "the base model of org/lost" in lost and "no model 'org/gone'" in lost
    (again,), _ = find(tmp_path, "http://127.0.0.1:9", "org/tuned", HF_HUB_OFFLINE="1")
    assert again == tuned


def test_heads_that_draft_for_a_model_are_served_as_that_model(hub: Hub, tmp_path: Path) -> None:
    (medusa, accelerator), log = find(tmp_path, hub.address, "org/medusa", "org/accelerator")
    assert medusa == ["org/medusa", "directory", str(snapshot(tmp_path, "org/both")), COMMIT]
    assert "org/medusa has heads that draft tokens for org/both" in log
    assert "medusa_lm_head.safetensors" not in hub.fetched()
    assert "org/accelerator has draft heads, but its config.json names no model for them" in accelerator
    (tmp_path / "both").symlink_to(snapshot(tmp_path, "org/both"))
    (tmp_path / "heads").mkdir()
    config = {"medusa_num_heads": 3, "base_model_name_or_path": str(tmp_path / "both")}
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config))
    (local,), _ = find(tmp_path, "http://127.0.0.1:9", str(tmp_path / "heads"), HF_HUB_OFFLINE="1")
    assert local == ["heads", "directory", str(tmp_path / "both"), None]


def test_safetensors_go_before_gguf_unless_a_quantisation_is_named(hub: Hub, tmp_path: Path) -> None:
    (plain, named), _ = find(tmp_path, hub.address, "org/both", "org/both:Q4_K_M")
    assert (plain[1], named[1]) == ("directory", "gguf")
    assert {"model.safetensors", "tokenizer.json"} < set(hub.fetched())


def test_the_files_of_an_index_or_the_only_one_are_a_checkpoint_s_weights(hub: Hub, tmp_path: Path) -> None:
    (gptq, sharded, lacking, lacking_part), _ = find(
        tmp_path, hub.address, "org/gptq", "org/sharded", "org/lacking", "org/lacking-GGUF"
    )
    assert (Path(gptq[2]) / "gptq_model-4bit.safetensors").read_bytes() == b"x"
    assert sorted(path.name for path in Path(sharded[2]).glob("*.safetensors")) == [
        "part-1.safetensors",
        "part-2.safetensors",
    ]
    assert lacking == "org/lacking has no part-2.safetensors, which its model.safetensors.index.json names"
    assert lacking_part == "org/lacking-GGUF lacks 1 of the parts of m-Q8_0-00002-of-00002.gguf"


def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    (pipeline, whisper, no_gguf), _ = find(
        tmp_path, hub.address, "org/pipeline", "org/whisper", "org/whisper:Q4_K_M"
    )
    assert "org/pipeline is a diffusers pipeline" in pipeline
    assert "is an encoder-decoder of a kind that is not served" in whisper
    assert no_gguf == "org/whisper has no GGUF file that 'Q4_K_M' could name"
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_private_and_gated_repositories_say_what_they_want(hub: Hub, tmp_path: Path) -> None:
    (private, gated, none), _ = find(
        tmp_path, hub.address, "org/private-GGUF", "org/gated-GGUF:Q8_0", "org/none-GGUF"
    )
    assert "a private one needs HF_TOKEN" in private and "org/none-GGUF" in none
    assert "org/gated-GGUF is gated: accept its terms on the Hub" in gated
    (private,), _ = find(tmp_path, hub.address, "org/private-GGUF:Q8_0", HF_TOKEN="secret")
    assert private[1] == "gguf"


def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = bytes(range(256)) * (24 << 12)  # the client keeps whole pieces of 10 MB
    cut = Repository({"m-Q8_0.gguf": data}, cuts={"m-Q8_0.gguf": 1})
    with running_hub({"org/m-GGUF": cut}) as hub:
        (found,), _ = find(tmp_path, hub.address, "org/m-GGUF")
        asked = [asked for method, path, asked in hub.requests if method == "GET" and "/resolve/" in path]
    assert Path(found[2]).read_bytes() == data
    assert asked[0] == "" and asked[1] == "bytes=10485760-"


def test_a_file_that_is_here_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    find(tmp_path, hub.address, "org/m-GGUF:Q8_0", "org/m-GGUF:Q8_0")
    find(tmp_path, hub.address, "org/m-GGUF:Q8_0")
    assert sorted(hub.fetched()) == ["m-Q8_0.gguf", "mmproj-F16.gguf"]
