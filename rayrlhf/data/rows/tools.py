"""Normalises tool calls and tool definitions of different data set formats for chat templates.

The normal form is Hugging Face's: `{"type": "function", "function": {"name": …, "arguments": {…}}}` for a
call, its arguments an object, and `{"type": "function", "function": {"name": …, "parameters": {…}}}` for a
definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.data.rows.json_text import parsed
from rayrlhf.data.rows.row import BadRow, quoted, type_name

ARGUMENTS = ("arguments", "parameters", "input")  # OpenAI's name, Llama's, Anthropic's
PARAMETERS = ("parameters", "input_schema", "inputSchema")  # OpenAI's name, Anthropic's, MCP's
Tool = dict[str, Any]


def tool_calls_of(value: Any, where: str) -> list[Tool]:
    """The calls of a message: a list or a single one, also as JSON text; empty for null and [].

    Raises `BadRow` for a call without a name, and for arguments that are not an object.
    """
    calls = _listed(value, f"the tool calls of {where}")
    return [_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls, start=1)]


def _call(call: Any, where: str) -> Tool:
    if isinstance(call, str):
        call = parsed(call, where)
    if not isinstance(call, Mapping):
        raise BadRow(f"{where} is {type_name(call)}; wanted {{name, arguments}}")
    inner = call.get("function")
    if isinstance(inner, str) and inner.lstrip().startswith("{"):  # JSON text, not a function name
        inner = parsed(inner, f"the function of {where}")
    named = inner if isinstance(inner, Mapping) else call
    name = inner if isinstance(inner, str) else named.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow(f"{where} has no name; its keys are: {quoted(named)}")
    arguments = next((named[key] for key in ARGUMENTS if named.get(key) is not None), None)
    found: Tool = {"type": "function", "function": {"name": name, "arguments": _object(arguments, where)}}
    if call.get("id") is not None:
        found["id"] = call["id"]
    return found


def _object(arguments: Any, where: str) -> dict[str, Any]:
    """Arguments as an object; those of a function without parameters may be null or an empty text."""
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"the arguments of {where}") if arguments.strip() else None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise BadRow(f"the arguments of {where} are {type_name(arguments)}; wanted an object")
    return dict(arguments)


def tools_from(value: Any, where: str) -> list[Tool] | None:
    """Tool definitions: a list or a single one, also as JSON text, or a list of JSON texts; None for none.

    A definition without OpenAI's envelope gets it. Tools of other types than functions are kept unchanged.
    """
    tools = _listed(value, where, "tool definitions (objects)")
    return [_tool(tool, f"tool {number} in {where}") for number, tool in enumerate(tools, start=1)] or None


def _tool(tool: Any, where: str) -> Tool:
    if isinstance(tool, str):
        tool = parsed(tool, where)
    if not isinstance(tool, Mapping):
        raise BadRow(f"{where} is {type_name(tool)}; wanted a tool definition (an object)")
    inner = tool.get("function")
    if isinstance(inner, str):
        inner = parsed(inner, f"the function of {where}")
    if inner is None and "name" not in tool:
        if isinstance(tool.get("type"), str) and tool["type"] != "function":
            return dict(tool)  # such as {"type": "web_search"}
        raise BadRow(f"{where} has no name; its keys are: {quoted(tool)}")
    function = inner if inner is not None else {key: item for key, item in tool.items() if key != "type"}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has no name; its keys are: {quoted(tool)}")
    more = {key: item for key, item in tool.items() if inner is not None and key not in ("type", "function")}
    return {"type": "function", "function": _function(function, where), **more}


def _function(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in function.items():
        if key not in PARAMETERS:
            found[key] = item
            continue
        if isinstance(item, str):
            item = parsed(item, f"the parameters of {where}") if item.strip() else None
        if item is not None and not isinstance(item, Mapping):
            raise BadRow(f"the parameters of {where} are {type_name(item)}; wanted an object")
        if item is not None:
            found["parameters"] = dict(item)
    return found


def _listed(value: Any, where: str, wanted: str = "calls (objects)") -> list[Any]:
    if isinstance(value, str):
        value = parsed(value, where) if value.strip() else None
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise BadRow(f"{where} holds {type_name(value)}; wanted a list of {wanted}")
    return value


def names_of(tools_or_calls: list[Tool]) -> list[str]:
    """Names of the functions that are defined or called."""
    return [tool["function"]["name"] for tool in tools_or_calls if isinstance(tool.get("function"), Mapping)]
