"""OpenAI's tools of `/v1/responses` that have a type instead of a schema, and that the client runs itself.

The model is shown them as functions. Their calls and outputs are items of their own types:
`{"type": "shell"}`, `shell_call` and `shell_call_output`, for example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tgi_asgi.api.openai.tool_search import KIND, ToolSearch, is_run_by_client
from tgi_asgi.api.parse import refuse
from tgi_asgi.api.tools import Tool, whole_arguments

Fields = dict[str, Any]

# The model is held to these bounds, but a history may have what OpenAI's types allow.
_NATURAL, _FILLED = {"minimum": 0}, {"minItems": 1}
_Milliseconds = Annotated[
    int, Meta(description="The most time that this may take, in ms.", extra_json_schema=_NATURAL)
]
_Characters = Annotated[
    int, Meta(description="The most characters of output to return.", extra_json_schema=_NATURAL)
]
_COMMAND = 'The program and its arguments, such as ["bash", "-lc", "ls | wc -l"].'
_DIFF = (
    "For `create_file`: the lines of the file, each after a `+`. For `update_file`: hunks without numbers. "
    "A hunk is a line `@@`, or `@@ ` and an earlier line of the file such as a function's header; then "
    "lines, each after a space (unchanged), a `-` (removed) or a `+` (added), with about three unchanged "
    "ones around the change. For `delete_file`: empty."
)


class _Shell(Struct):
    commands: Annotated[
        list[str], Meta(description="The commands, in their order.", extra_json_schema=_FILLED)
    ]
    timeout_ms: _Milliseconds | UnsetType = UNSET
    max_output_length: _Characters | UnsetType = UNSET


class _LocalShell(Struct):
    command: Annotated[list[str], Meta(description=_COMMAND, extra_json_schema=_FILLED)]
    working_directory: str | UnsetType = UNSET
    env: Annotated[dict[str, str], Meta(description="Variables to set.")] | UnsetType = UNSET
    timeout_ms: _Milliseconds | UnsetType = UNSET
    user: Annotated[str, Meta(description="The user to run it as.")] | UnsetType = UNSET


class _Patch(Struct):
    type: Literal["create_file", "update_file", "delete_file"]
    path: Annotated[str, Meta(description="The file, relative to the working directory.")]
    diff: Annotated[str, Meta(description=_DIFF)]


class _Outcome(Struct):
    type: str = "exit"
    exit_code: int | None = None


class _ShellOutput(Struct):
    """What one command wrote, and how it ended."""

    stdout: str = ""
    stderr: str = ""
    outcome: _Outcome = msgspec.field(default_factory=_Outcome)


class _ShellResult(Struct):
    output: str | list[_ShellOutput]

    def text(self) -> str:
        if isinstance(self.output, str):
            return self.output
        return "\n\n".join(map(_written, self.output))


class _LocalShellResult(Struct):
    output: str

    def text(self) -> str:
        return self.output


class _PatchResult(Struct):
    status: str = "completed"
    output: str | None = None

    def text(self) -> str:
        return self.output or f"[{self.status}]"


def _written(output: _ShellOutput) -> str:
    errors = output.stderr and f"stderr:\n{output.stderr}"
    code = output.outcome.exit_code
    end = "timed out" if output.outcome.type == "timeout" else code is not None and f"exit code: {code}"
    return "\n".join(part.removesuffix("\n") for part in (output.stdout, errors, end) if part)


@dataclass(frozen=True, slots=True)
class ClientTool:
    """A type of tool, and what its items contain.

    Attributes:
        kind: Its type, and the function's name. Calls have the type `{kind}_call`, and their outputs
            `{kind}_call_output`.
        prefix: Beginning of the ids of its calls' items.
        key: A call's field that contains the arguments.
        arguments: What the model is asked for.
        result: What an output contains.
        wrap: Returns the field of a call with these arguments.
        fields: What else its calls contain.
        defaults: Arguments that a call of the history may lack.
    """

    kind: str
    description: str
    prefix: str
    key: str
    arguments: type[Struct]
    result: type[_ShellResult | _LocalShellResult | _PatchResult]
    wrap: Callable[[Fields], Fields] = dict
    fields: Fields = field(default_factory=dict)
    defaults: Fields = field(default_factory=dict)

    def tool(self, index: int, given: Fields) -> Tool:
        """Return the function for an entry of `tools`; it mentions the skills of the client's environment."""
        _, components = msgspec.json.schema_components([self.arguments])
        (schema,) = components.values()
        parameters = {name: value for name, value in schema.items() if name != "title"}
        description = self.description + _skills(given.get("environment"))
        return Tool(index, self.kind, description, parameters, own_type=self.kind)

    def call(self, arguments: str) -> Fields | None:
        """Return a call's type and arguments as the item has them; None if they are cut off or malformed."""
        try:
            value = self.wrap(self._read(whole_arguments(arguments)))
        except msgspec.ValidationError:
            return None
        return {"type": f"{self.kind}_call", self.key: value, **self.fields}

    def arguments_of(self, item: Fields, path: str) -> Fields:
        """Return the arguments in a call of the history.

        Raises:
            InvalidRequest: if they are not what the type has.
        """
        try:
            return self._read(item.get(self.key))
        except msgspec.ValidationError as error:
            refuse(f"{path}.{self.key}", f"`{path}.{self.key}`: {error}")

    def result_of(self, item: Fields, path: str) -> str:
        """Return the text of an output in the history.

        Raises:
            InvalidRequest: if it is not what the type has.
        """
        try:
            return msgspec.convert(item, self.result).text()
        except msgspec.ValidationError as error:
            refuse(path, f"`{path}`: {error}")

    def _read(self, value: Any) -> Fields:
        """Return arguments in their order, without those that are absent: null, or an empty `env`."""
        if isinstance(value, dict):
            given = {name: each for name, each in value.items() if each not in (None, {})}
            value = self.defaults | given
        read: Fields = msgspec.to_builtins(msgspec.convert(value, self.arguments))
        return read


def _wrap_commands(arguments: Fields) -> Fields:
    return {"timeout_ms": None, "max_output_length": None, **arguments}


def _wrap_command(arguments: Fields) -> Fields:
    return {"type": "exec", "env": {}, **arguments}


def _wrap_patch(arguments: Fields) -> Fields:
    is_delete = arguments["type"] == "delete_file"
    return {name: value for name, value in arguments.items() if not (is_delete and name == "diff")}


def _skills(environment: Any) -> str:
    """Return what a local environment says about its skills, for the model."""
    skills = environment.get("skills") if isinstance(environment, dict) else None
    if not isinstance(skills, list) or not skills:
        return ""
    lines = [
        f"- {skill.get('name')} ({skill.get('path')}): {skill.get('description')}"
        for skill in skills
        if isinstance(skill, dict)
    ]
    return "\n".join(("", "Skills are folders whose SKILL.md says how to use them:", *lines))


_TABLE = (
    ClientTool(
        kind="shell",
        description="Run shell commands on the user's machine.",
        prefix="sh",
        key="action",
        arguments=_Shell,
        result=_ShellResult,
        wrap=_wrap_commands,
        fields={"environment": {"type": "local"}},
    ),
    ClientTool(
        kind="local_shell",
        description="Run a program on the user's machine.",
        prefix="lsh",
        key="action",
        arguments=_LocalShell,
        result=_LocalShellResult,
        wrap=_wrap_command,
    ),
    ClientTool(
        kind="apply_patch",
        description="Create, update or delete one of the user's files.",
        prefix="apc",
        key="operation",
        arguments=_Patch,
        result=_PatchResult,
        wrap=_wrap_patch,
        defaults={"diff": ""},
    ),
)
CLIENT_TOOLS: dict[str, ClientTool | ToolSearch] = {tool.kind: tool for tool in (*_TABLE, ToolSearch())}
CALLS = {f"{tool.kind}_call": tool for tool in CLIENT_TOOLS.values()}
OUTPUTS = {f"{tool.kind}_call_output": tool for tool in _TABLE}


def client_tool(given: Fields) -> ClientTool | ToolSearch | None:
    """Return what an entry of `tools` is, or None: containers and a hosted search run elsewhere."""
    environment = given.get("environment")
    if isinstance(environment, dict) and environment.get("type", "local") != "local":
        return None
    if given["type"] == KIND and not is_run_by_client(given):
        return None
    return CLIENT_TOOLS.get(given["type"])
