"""Anthropic's tools that have a type instead of a schema, and that the client runs itself.

Their names and arguments are published; Claude was trained on them. Other models are shown them as functions.
Types end in a date, as `bash_20250124`. https://platform.claude.com/docs/en/agents-and-tools/tool-use
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_LINES = {
    "type": "array",
    "items": {"type": "integer"},
    "description": "For `view` of a file: the first and the last line, counted from 1; -1 is the end.",
}
_FILE_TEXT = {**_TEXT, "description": "For `create`: the file's whole content."}
_OLD = {**_TEXT, "description": "For `str_replace`: the text to be replaced, which must occur exactly once."}
_NEW = {**_TEXT, "description": "For `str_replace`: the text that replaces it."}
_LINE = {
    "type": "integer",
    "description": "For `insert`: the line after which the text goes; 0 is the start.",
}
_INSERTED = {**_TEXT, "description": "For `insert`: the text to be inserted."}
_NEWER_EDITOR = "20250429"  # editors of earlier dates can undo, and `insert` has `new_str`

Definition = tuple[str, dict[str, Any]]  # description, schema of the arguments


def definition_of(kind: str) -> Definition | None:
    """Return a type's description and arguments; None if another server runs it, or it is unknown."""
    name, _, date = kind.rpartition("_")
    if name == "text_editor":
        return _editor(can_undo=date < _NEWER_EDITOR)
    return {"bash": _BASH, "memory": _MEMORY}.get(name)


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _commands(*names: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(names)}


def _editor(*, can_undo: bool) -> Definition:
    names = ("view", "create", "str_replace", "insert", *(("undo_edit",) if can_undo else ()))
    new = {**_NEW, "description": f"{_NEW['description']} For `insert`: the text to be inserted."}
    inserted = {"new_str": new} if can_undo else {"new_str": _NEW, "insert_text": _INSERTED}
    return "View, create and edit text files.", _object(
        ["command", "path"], command=_commands(*names), path=_TEXT, view_range=_LINES, file_text=_FILE_TEXT,
        old_str=_OLD, insert_line=_LINE, **inserted,
    )  # fmt: skip


_BASH: Definition = (
    "Run a command in a bash shell that stays open between calls.",
    _object(
        [],
        command={**_TEXT, "description": "The command to run; not needed with `restart`."},
        restart={"type": "boolean", "description": "Whether to restart the shell instead."},
    ),
)
_MEMORY: Definition = (
    "Keep notes between conversations, as files in the directory /memories.",
    _object(
        ["command"],
        command=_commands("view", "create", "str_replace", "insert", "delete", "rename"),
        path={**_TEXT, "description": "The file or directory; of all commands but `rename`."},
        view_range=_LINES,
        file_text=_FILE_TEXT,
        old_str=_OLD,
        new_str=_NEW,
        insert_line=_LINE,
        insert_text=_INSERTED,
        old_path={**_TEXT, "description": "For `rename`: the path before."},
        new_path={**_TEXT, "description": "For `rename`: the path after."},
    ),
)
