"""Images of a row: which placeholders there are, and which image belongs to each."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.example_data import PairDataConfig, SftDataConfig
from rayrlhf.data.rows.formats import normal_form
from rayrlhf.data.rows.images import with_bytes_as_text, without_contents
from rayrlhf.data.rows.messages import Conversation
from rayrlhf.data.rows.preferences import Pair
from rayrlhf.data.rows.prompt_rows import prompt_of
from rayrlhf.data.rows.row import BadRow, columns_to_json

IMAGE = {"type": "image"}
PROMPTS = PromptDataConfig(train=[{"path": "a.jsonl"}])  # pyright: ignore[reportArgumentType]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def prompt(content: Any, **columns: Any) -> Conversation:
    asked = content if isinstance(content, str) else [{"role": "user", "content": content}]
    found = prompt_of({"prompt": asked, **columns}, PROMPTS)
    assert isinstance(found, Conversation)
    return found


def test_parts_take_the_images_of_the_column_in_order() -> None:
    found = prompt([IMAGE, text("or"), IMAGE, text("?")], images=["a.png", "b.png"])
    assert found.messages == [{"role": "user", "content": [IMAGE, text("or"), IMAGE, text("?")]}]
    assert found.images == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image_url", "image_url": {"url": "http://host/a.png"}}, "http://host/a.png"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "image": {"bytes": b"abc", "path": None}}, b"abc"),
        ({"type": "input_image", "image_url": "a.png"}, "a.png"),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            "data:image/png;base64,AAAA",
        ),
    ],
)
def test_a_part_may_have_its_own_image(part: dict[str, Any], image: Any) -> None:
    found = prompt([part, text("and"), IMAGE], images=["b.png"])
    assert found.images == [image, "b.png"]
    assert found.messages[0]["content"] == [IMAGE, text("and"), IMAGE]


def test_marks_in_a_text_are_placeholders_if_the_row_has_images() -> None:
    found = prompt("<image>Which is it, <image>?", images=["a.png", "b.png"])
    assert found.messages[0]["content"] == [IMAGE, text("Which is it, "), IMAGE, text("?")]
    assert prompt("What does <image> mean?").messages[0]["content"] == "What does <image> mean?"


def test_one_image_need_not_be_a_list() -> None:
    assert prompt("<image>?", image={"bytes": b"abc", "path": "a.png"}).images == [b"abc"]


@pytest.mark.parametrize(
    ("content", "images", "problem"),
    [
        ([IMAGE, IMAGE, text("?")], ["a.png"], "2 image placeholders, but 1 images in column 'images'"),
        ([IMAGE, text("?")], ["a.png", "b.png"], "1 image placeholders, but 2 images in column 'images'"),
        ([IMAGE, text("?")], [], r"1 image placeholders, but 0 images in column 'images'"),
        ([IMAGE, text("?")], None, r"1 image placeholders, but 0 images \(no column images or image\)"),
        ("<image>?", [], "1 image placeholders, but 0 images in column 'images'"),
        ("<image>?", ["a.png", "b.png"], "1 image placeholders, but 2 images"),
        (
            [{"type": "image_url", "image_url": {}}],
            None,
            "message 1 .* is an object; wanted a path",
        ),
        ("<image>?", ["a.png", 3][1:], "image 1 of column 'images' is a value of type int"),
        ("<image>?", [""], "image 1 of column 'images' is an empty text"),
        ("<image>?", [{"bytes": None, "path": None}], "image 1 of column 'images' is an object"),
    ],
)
def test_images_without_placeholders_and_the_reverse(content: Any, images: Any, problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        prompt(content, images=images)


def test_images_are_the_users() -> None:
    config = SftDataConfig(train=[{"path": "a.jsonl"}])  # pyright: ignore[reportArgumentType]
    messages = [
        {"role": "user", "content": "Draw."},
        {"role": "assistant", "content": [IMAGE]},
    ]
    with pytest.raises(BadRow, match=r"message 2 .*\(assistant\) has images; wanted them in messages of the"):
        normal_form({"messages": messages, "images": ["a.png"]}, config)


def test_the_column_can_be_named() -> None:
    config = PROMPTS.model_copy(update={"images_key": "photos"})
    found = prompt_of({"prompt": "<image>?", "photos": ["a.png"]}, config)
    assert isinstance(found, Conversation) and found.images == ["a.png"]
    with pytest.raises(BadRow, match=r"no column 'photos' \(data\.images_key\)"):
        prompt_of({"prompt": "?"}, config)


def test_images_need_the_chat_template() -> None:
    config = SftDataConfig(train=[{"path": "a.jsonl"}], apply_chat_template=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadRow, match=r"images, which need data\.apply_chat_template=true"):
        normal_form({"prompt": "<image>?", "response": "red", "image": "a.png"}, config)


def test_pairs_and_conversations_have_the_images_of_their_prompt() -> None:
    config = PairDataConfig(train=[{"path": "a.jsonl"}])  # pyright: ignore[reportArgumentType]
    found = normal_form(
        {"prompt": "<image>?", "chosen": "red", "rejected": "blue", "images": ["a.png"]}, config
    )
    assert isinstance(found, Pair)
    assert (found.images, found.prompt[0]["content"]) == (["a.png"], [IMAGE, text("?")])
    sft = SftDataConfig(  # pyright: ignore[reportCallIssue]
        train=[{"path": "a.jsonl"}],  # pyright: ignore[reportArgumentType]
        reward_key="score",
        reward_template="({}) ",
    )
    row = {"prompt": "<image>?", "response": "red", "images": ["a.png"], "score": 2}
    conversation = normal_form(row, sft)
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0]["content"] == [text("(2) "), IMAGE, text("?")]


def test_bytes_travel_as_text() -> None:
    columns = {"prompt": "?", "images": [{"bytes": b"abc", "path": "a.png"}, b"d"], "other": b"e"}
    written, left_out = columns_to_json(with_bytes_as_text(columns, None))
    assert "YWJj" in written and left_out == ["'other' (bytes)"]
    found = with_bytes_as_text({"photo": b"abc"}, "photo")
    assert found == {"photo": "data:;base64,YWJj"}
    assert without_contents({"photo": [found["photo"], "a.png"]}) == {"photo": [None, "a.png"]}
