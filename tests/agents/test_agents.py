"""Codex CLI and Claude Code, as npm ships them, edit a file through the server: `make test-agents`."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agents.agent_server import CONTEXT
from tests.agents.clients import Run, claude, codex, codex_catalog, install
from tests.agents.player import call, play_of
from tests.support.server_process import ServerProcess

# 1 x 1 pixel
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PATCH = "*** Begin Patch\n*** Update File: fruit.txt\n@@\n-apples\n+pears\n*** End Patch\n"


@dataclass
class Workspace:
    """A server and a client's folders: a home, and a project with a text file and an image."""

    url: str
    home: Path
    project: Path
    record: Path

    @property
    def fruit(self) -> Path:
        return self.project / "fruit.txt"

    def seen(self) -> list[dict[str, Any]]:
        """Return every request that the server has received, with the status of its answer."""
        return [json.loads(path.read_text()) for path in sorted(self.record.iterdir())]

    def check(self, run: Run, result: str) -> None:
        """Check the file, the exit code, the answers' statuses, and the last result in the answer."""
        assert run.exit_code == 0, run.output
        answers = [(seen["request"], seen["status"]) for seen in self.seen()]
        assert answers and all(status == 200 for _, status in answers), answers
        assert self.fruit.read_text() == "pears\n"
        assert "The last result is: " in run.answer and result in run.answer


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    folders = [tmp_path / name for name in ("home", "project", "record")]
    for folder in folders:
        folder.mkdir()
    home, project, record = folders
    (project / "fruit.txt").write_text("apples\n")
    (project / "dot.png").write_bytes(PNG)
    command = ("tests.agents.agent_server", "--hostname", "127.0.0.1")
    with ServerProcess(*command, environ={"RECORD": str(record)}) as server:
        server.wait_until_healthy()
        yield Workspace(server.url, home, project, record)


def test_the_server_plays_and_records(workspace: Workspace) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    messages = [{"role": "user", "content": play_of([call("look", at="fruit")])}]
    body = {"messages": messages, "tools": [tool]}
    answer = httpx.post(workspace.url + "/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "fruit"}'}
    assert httpx.get(workspace.url + "/v1/nothing?a=b").status_code == 404
    chat, nothing = workspace.seen()
    assert (chat["request"], chat["status"], chat["body"]) == ("POST /v1/chat/completions", 200, body)
    assert (nothing["request"], nothing["status"]) == ("GET /v1/nothing?a=b", 404)


@pytest.mark.agents
def test_codex_edits_with_its_shell_and_looks_at_an_image(workspace: Workspace) -> None:
    install()
    steps = [
        call("exec_command", cmd="sed -i s/apples/pears/ fruit.txt"),
        call("view_image", path="dot.png"),
        call("exec_command", cmd="cat fruit.txt"),
    ]
    run = codex(workspace.url, workspace.home, workspace.project, play_of(steps))
    workspace.check(run, "pears")
    assert [seen["request"] for seen in workspace.seen()] == ["POST /v1/responses"] * 4


@pytest.mark.agents
def test_codex_needs_no_settings_if_it_takes_the_server_for_ollama(workspace: Workspace) -> None:
    install()
    steps = [call("exec_command", cmd="sed -i s/apples/pears/ fruit.txt; cat fruit.txt")]
    prompt = play_of(steps)
    run = codex(workspace.url, workspace.home, workspace.project, prompt, takes_it_for_ollama=True)
    workspace.check(run, "pears")
    assert [seen["request"] for seen in workspace.seen()][-2:] == ["POST /v1/responses"] * 2


@pytest.mark.agents
def test_codex_edits_with_a_custom_tool(workspace: Workspace) -> None:
    install()
    catalog = codex_catalog(workspace.home)
    steps = [call("apply_patch", input=PATCH), call("exec_command", cmd="cat fruit.txt")]
    option = f"model_catalog_json={json.dumps(str(catalog))}"
    run = codex(workspace.url, workspace.home, workspace.project, play_of(steps), "-c", option)
    workspace.check(run, "pears")
    first = workspace.seen()[0]["body"]
    assert "custom" in [tool["type"] for tool in first["tools"]]


@pytest.mark.agents
def test_codex_finds_a_tool_of_an_mcp_server(workspace: Workspace) -> None:
    install()
    catalog = codex_catalog(workspace.home)
    program, script = json.dumps(sys.executable), json.dumps(str(Path(__file__).parent / "mcp_server.py"))
    steps = [
        call("tool_search", query="count fruit"),
        call("count_fruit", path="fruit.txt"),
        call("exec_command", cmd="sed -i s/apples/pears/ fruit.txt; cat fruit.txt"),
    ]
    options = (
        "-c", f"model_catalog_json={json.dumps(str(catalog))}",
        "-c", f"mcp_servers.fruit={{command={program}, args=[{script}]}}",
    )  # fmt: skip
    run = codex(workspace.url, workspace.home, workspace.project, play_of(steps), *options)
    workspace.check(run, "pears")
    items = workspace.seen()[-1]["body"]["input"]
    assert any(item["type"] == "tool_search_output" for item in items)
    assert "7 in fruit.txt" in json.dumps(items)


@pytest.mark.agents
def test_codex_gives_a_task_to_another_agent(workspace: Workspace) -> None:
    install()
    steps = [
        call("spawn_agent", task_name="other", message="Count the apples."),
        call("exec_command", cmd="sed -i s/apples/pears/ fruit.txt; cat fruit.txt"),
    ]
    options = ("-c", "features.multi_agent_v2=true")
    run = codex(workspace.url, workspace.home, workspace.project, play_of(steps), *options)
    workspace.check(run, "pears")
    kinds = {item.get("type") for seen in workspace.seen() for item in seen["body"]["input"]}
    assert "agent_message" in kinds


@pytest.mark.agents
@pytest.mark.parametrize("provider", ["local", "OpenAI"])  # the latter shall summarise itself
def test_codex_summarises_before_its_history_fills_the_context(workspace: Workspace, provider: str) -> None:
    """After the summary it begins the list of calls again, and finds the parts gone."""
    install()
    for number in range(8):  # each shorter than the tenth of the context that Codex keeps free
        (workspace.project / f"part{number}").write_text("number\n" * 700)
    steps = [call("exec_command", cmd=f"cat part{number}; unlink part{number}") for number in range(8)]
    steps += [call("exec_command", cmd="sed -i s/apples/pears/ fruit.txt; cat fruit.txt")]
    option = f"model_context_window={CONTEXT}"
    play = play_of(steps)
    run = codex(workspace.url, workspace.home, workspace.project, play, "-c", option, provider_name=provider)
    workspace.check(run, "pears")
    bodies = [seen["body"] for seen in workspace.seen() if seen["body"]]
    assert len(bodies) > len(steps) + 1
    triggers = [body for body in bodies if body["input"][-1]["type"] == "compaction_trigger"]
    assert bool(triggers) == (provider == "OpenAI")


@pytest.mark.agents
@pytest.mark.parametrize("context", [CONTEXT, None], ids=["known", "unknown"])
def test_claude_summarises_when_its_history_fills_the_context(
    workspace: Workspace, context: int | None
) -> None:
    install()
    steps = [call("Bash", command=f"seq {number}000 {number}999") for number in range(1, 9)]
    prompt = play_of(steps)
    run = claude(workspace.url, workspace.home, workspace.project, prompt, context=context)
    assert (run.exit_code, run.answer) == (0, "Nothing to play."), run.output  # it has only the summary
    statuses = [seen["status"] for seen in workspace.seen()]
    assert statuses[-1] == 200
    assert (400 in statuses) == (context is None)


@pytest.mark.agents
def test_claude_edits_and_uses_what_only_its_own_models_know(workspace: Workspace) -> None:
    install()
    fruit = str(workspace.fruit)
    steps = [
        call("Read", file_path=fruit),
        call("Read", file_path=str(workspace.project / "dot.png")),
        call("ToolSearch", query="select:WebSearch", max_results=1),
        call("WebSearch", query="pears"),  # makes a separate request with a hosted tool
        call("Edit", file_path=fruit, old_string="apples", new_string="pears"),
        call("Bash", command="cat fruit.txt"),
    ]
    run = claude(workspace.url, workspace.home, workspace.project, play_of(steps))
    workspace.check(run, "pears")
    kinds = [tool.get("type") for seen in workspace.seen() for tool in seen["body"]["tools"]]
    assert any(str(kind).startswith("web_search") for kind in kinds)


@pytest.mark.agents
def test_claude_counts_its_tokens(workspace: Workspace) -> None:
    install()
    run = claude(workspace.url, workspace.home, workspace.project, "/context")
    assert run.exit_code == 0, run.output
    seen = workspace.seen()
    assert {one["request"].partition("?")[0] for one in seen} == {"POST /v1/messages/count_tokens"}
    assert {one["status"] for one in seen} == {200}
