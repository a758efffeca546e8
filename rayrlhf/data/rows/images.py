"""Images of a row: placeholders in its messages, and the column that they refer to. No file is opened here.

A placeholder is a content part of OpenAI's API, or of Anthropic's or Hugging Face's, or `<image>` in a user's
text if the row has the column. Parts may have their own image; the others take those of the column, in order.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.config.data import DataConfig
from rayrlhf.data.rows.row import BadRow, quoted, type_name

ImageRef = str | bytes  # a path, a URL, a data: URL, or the content of a file
COLUMNS = ("images", "image")
PARTS = ("image", "image_url", "input_image")
MARK = "<image>"
SOURCES = ("image", "image_url", "url", "path", "source", "bytes", "base64", "data")


def images_column(columns: Mapping[str, Any], config: DataConfig) -> str | None:
    """The column with the row's images; None without one. Raises `BadRow` if `data.images_key` is missing."""
    if config.images_key is not None:
        if config.images_key not in columns:
            raise BadRow(
                f"no column {config.images_key!r} (data.images_key); the columns are: {quoted(columns)}"
            )
        return config.images_key
    return next((name for name in COLUMNS if columns.get(name) is not None), None)


def column_images(columns: Mapping[str, Any], config: DataConfig) -> list[ImageRef]:
    """The images of the column, in order; a single one need not be a list. Raises `BadRow`."""
    key = images_column(columns, config)
    value = None if key is None else columns[key]
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [image_of(item, f"image {i} of column {key!r}") for i, item in enumerate(items, start=1)]


def image_of(value: Any, where: str) -> ImageRef:
    """The image that a cell or a content part refers to. Raises `BadRow`."""
    if isinstance(value, str | bytes) and value:
        return value
    if isinstance(value, Mapping):
        if value.get("type") == "base64" or value.get("base64"):
            return f"data:{value.get('media_type', '')};base64,{value.get('base64') or value.get('data', '')}"
        for key in ("bytes", "image", "url", "image_url", "path", "source"):
            if value.get(key):
                return image_of(value[key], where)
    raise BadRow(
        f"{where} is {'an empty text' if value in ('', b'') else type_name(value)}; wanted a path, a URL, a "
        "data: URL, or the bytes of an image"
    )


def is_image_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in PARTS


def image_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A placeholder in the one form that this module gives it, with its own image if it has one.

    Raises `BadRow`, also for `image_url` without a URL.
    """
    if part["type"] == "image" and not any(part.get(key) for key in SOURCES):
        return {"type": "image"}
    return {"type": "image", "image": image_of(part, f"an image of {where}")}


def text_of(content: Any) -> str:
    """A content as text, with a mark for each image."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", MARK) for part in content)


def prefixed(content: Any, text: str) -> Any:
    """A content with `text` put before it."""
    return text + content if isinstance(content, str) else [{"type": "text", "text": text}, *content]


def with_images(
    messages: Sequence[Mapping[str, Any]], columns: Mapping[str, Any], config: DataConfig
) -> tuple[list[dict[str, Any]], list[ImageRef]]:
    """The messages with bare placeholders, and the image of each, in order.

    Images without any placeholder are returned, too: a model without vision is trained without them. Raises
    `BadRow` if there are more or fewer images than placeholders.
    """
    given = column_images(columns, config)
    column = images_column(columns, config)
    if column is not None and columns[column] is not None and not has_placeholders(messages):
        messages = [_split_at_marks(message) for message in messages]
    images: list[ImageRef] = []
    left = iter(given)
    bare, num_placeholders, num_without = [], 0, 0
    for message in messages:
        content = message.get("content", "")
        if isinstance(content, str):
            bare.append(dict(message))
            continue
        parts = []
        for part in content:
            if part["type"] == "image":
                num_placeholders += 1
                num_without += "image" not in part
                images.append(part.get("image") or next(left, ""))
                part = {"type": "image"}
            parts.append(part)
        bare.append({**message, "content": parts})
    if given and not num_placeholders:
        return bare, given
    if num_without != len(given):
        place = f"in column {column!r}" if column else f"(no column {' or '.join(COLUMNS)})"
        raise BadRow(
            f"{num_without} image placeholders, but {len(given)} images {place}; wanted one image for each: "
            f'a content part {{"type": "image"}}, or {MARK} in a text of the user'
        )
    if num_placeholders and not config.apply_chat_template:
        raise BadRow("it has images, which need data.apply_chat_template=true")
    return bare, images


def has_placeholders(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(not isinstance(message.get("content", ""), str) for message in messages)


def _split_at_marks(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content", "")
    if message["role"] != "user" or MARK not in content:
        return message
    first, *rest = content.split(MARK)
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return {**message, "content": [part for part in parts if part.get("text") != ""]}


def with_bytes_as_text(columns: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """The columns with the bytes of images as data: URLs, for JSON. `key`: data.images_key."""
    names = COLUMNS if key is None else (key,)
    found = [name for name in names if columns.get(name) is not None]
    return {**columns, **{name: _as_text(columns[name]) for name in found}} if found else columns


def _as_text(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return f"data:;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Mapping):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return value


def without_contents(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns without the bytes of images, which travel with the prompt and not as text."""
    return {name: _without_contents(value) for name, value in columns.items()}


def _without_contents(value: Any) -> Any:
    if isinstance(value, str):
        return None if value.startswith("data:") and ";base64," in value[:100] else value
    if isinstance(value, Mapping):
        return {key: _without_contents(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_contents(item) for item in value]
    return value
