"""Images in prepared rows: their tokens, the loss mask, limits, and images that cannot be used."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.example_data import KtoDataConfig, PairDataConfig, SftDataConfig
from rayrlhf.data.images import opened
from rayrlhf.data.prepare import ExampleRows, PromptRows, RenderStage
from rayrlhf.data.row_filter import Tally
from rayrlhf.data.rows.images import with_bytes_as_text
from rayrlhf.data.rows.row import columns_to_json
from rayrlhf.data.store import EXAMPLE_SCHEMA, examples_of
from rayrlhf.data.stream import step_ranges
from tests.tiny_model import make_tiny_model
from tests.tiny_vision import IMAGE_PAD, VISION_END, VISION_START, make_tiny_vision, png

USER, ASSISTANT, BOS, EOS, FIRST_BYTE = 4, 5, 1, 2, 8
SOURCES: Any = [{"path": "a.jsonl"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_vision(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wide.png").write_bytes(png(width=40, height=16, seed=1))  # 5 x 2 tokens
    (tmp_path / "small.png").write_bytes(png(width=16, height=16, seed=2))  # 2 x 2 tokens
    (tmp_path / "broken.png").write_bytes(png(width=40, height=40, seed=3)[:600])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def render(rows: Any, model: str, folder: Path, *columns: dict[str, Any]) -> list[dict[str, Any]]:
    """As the Ray Data stage does; the rows are in a file of `folder`."""
    table = [
        {
            "source": 0,
            "_file": str(folder / "a.jsonl"),
            "_row": number,
            "columns_json": columns_to_json(with_bytes_as_text(each, None))[0],
            "problem": "",
            "padded": "[]",
            "left_out": "[]",
        }
        for number, each in enumerate(columns, start=1)
    ]
    return RenderStage(rows, model, False, None)(pa.Table.from_pylist(table)).to_pylist()


def sft(**settings: Any) -> ExampleRows:
    return ExampleRows(SftDataConfig(train=SOURCES, **settings), "train", 0)


def ids_of(text: str, model: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False).input_ids


def test_a_placeholder_becomes_the_tokens_of_its_image(model: str, folder: Path) -> None:
    row = {"prompt": "<image>or<image>?", "response": "red", "images": ["wide.png", "small.png"]}
    [found] = render(sft(), model, folder, row)
    wide, small = [VISION_START, *[IMAGE_PAD] * 10, VISION_END], [VISION_START, *[IMAGE_PAD] * 4, VISION_END]
    prompt = [BOS, USER, *wide, *ids_of("or", model), *small, *ids_of("?", model), EOS, ASSISTANT]
    answer = [*ids_of("red", model), EOS]
    assert found["problem"] == ""
    assert found["input_ids"] == [[*prompt, *answer]]
    assert found["loss_mask"] == [[0] * len(prompt) + [1] * len(answer)]
    assert (found["prompt_tokens"], found["num_tokens"]) == (len(prompt), len(prompt) + len(answer))
    assert found["image_tokens"] == [10, 4]
    assert found["images"] == [(folder / name).read_bytes() for name in ("wide.png", "small.png")]


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (17, 30), (64, 64), (90, 8)])
def test_the_number_of_tokens_is_the_processors(model: str, folder: Path, size: tuple[int, int]) -> None:
    """Small and large images are resized, and to multiples of a token's pixels."""
    content = png(width=size[0], height=size[1], seed=4)
    [found] = render(sft(), model, folder, {"prompt": "<image>?", "response": "red", "image": content})
    grid = AutoImageProcessor.from_pretrained(model)(images=[opened(content)])["image_grid_thw"][0]
    assert found["image_tokens"] == [int(grid[0] * grid[1] * grid[2]) // 4]
    assert found["input_ids"][0].count(IMAGE_PAD) == found["image_tokens"][0]


def test_images_and_their_markers_never_have_a_loss(model: str, folder: Path) -> None:
    [found] = render(
        sft(learn="all"), model, folder, {"prompt": "<image>?", "response": "red", "image": "small.png"}
    )
    vision = (VISION_START, VISION_END, IMAGE_PAD)
    [ids], [mask] = found["input_ids"], found["loss_mask"]
    assert mask == [0, *(int(token not in vision) for token in ids[1:])]


def test_marker_texts_of_a_user_are_no_placeholders(model: str, folder: Path) -> None:
    asked = [{"type": "image"}, {"type": "text", "text": "<|image_pad|><|vision_end|>?"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]}
    [found] = render(sft(), model, folder, {**row, "images": ["small.png"]})
    assert found["problem"] == ""
    [ids] = found["input_ids"]
    assert (ids.count(IMAGE_PAD), ids.count(VISION_END)) == (4, 1)


def test_both_answers_of_a_pair_follow_the_image(model: str, folder: Path) -> None:
    rows = ExampleRows(PairDataConfig(train=SOURCES), "train", 0)
    row = {"prompt": "<image>?", "chosen": "red", "rejected": "blue", "image": "small.png"}
    [found] = render(rows, model, folder, row)
    first, second = found["input_ids"]
    assert first[: found["prompt_tokens"]] == second[: found["prompt_tokens"]]
    assert first.count(IMAGE_PAD) == second.count(IMAGE_PAD) == 4
    columns = {name: [found[name]] for name in EXAMPLE_SCHEMA.names if name not in ("row_id",)}
    [example] = examples_of(pa.table({"row_id": [0], **columns}))
    assert [(len(each.content), each.num_tokens) for each in example.images] == [
        ((folder / "small.png").stat().st_size, 4)
    ]


def test_kto_rows_have_images(model: str, folder: Path) -> None:
    rows = ExampleRows(KtoDataConfig(train=SOURCES), "train", 0)
    [found] = render(
        rows, model, folder, {"prompt": "<image>?", "completion": "red", "label": True, "image": "small.png"}
    )
    assert found["problem"] == "" and found["image_tokens"] == [4]


def test_a_prompt_has_its_images_as_tokens(model: str, folder: Path) -> None:
    rows = PromptRows(PromptDataConfig(train=SOURCES, max_prompt_tokens=40))
    content = png(width=16, height=16, seed=2)
    [found] = render(rows, model, folder, {"prompt": "<image>?", "image": content, "label": "red"})
    assert found["problem"] == "" and found["prompt_ids"].count(IMAGE_PAD) == found["image_tokens"][0] == 4
    assert found["prompt"].count("<|image_pad|>") == 1, "the text is for people"
    assert json.loads(found["columns_json"]) == {"prompt": "<image>?", "image": None, "label": "red"}
    assert found["images"] == [content]


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("missing.png", r"image 1 \(missing\.png\) cannot be read: .*No such file.*paths are relative to"),
        ("broken.png", r"image 1 \(broken\.png\) is not a usable image: .*truncated"),
        ("text.png", r"image 1 \(text\.png\) is not a usable image: cannot identify"),
        ("data:image/png;base64,!!", "is a broken data: URL"),
        ("data:image/png,abc", "is a broken data: URL: wanted data:<type>;base64"),
        (b"abc", "is not a usable image"),
        ("http://127.0.0.1:9/a.png", r"cannot be read: .*refused"),
    ],
)
def test_unusable_images_are_bad_rows(model: str, folder: Path, image: Any, problem: str) -> None:
    import re

    [found] = render(sft(), model, folder, {"prompt": "<image>?", "response": "red", "images": [image]})
    assert re.search(problem, found["problem"]), found["problem"]
    assert found["input_ids"] == [] and found["images"] == []


def test_images_without_a_placeholder_are_bad_rows(model: str, folder: Path) -> None:
    [found] = render(sft(), model, folder, {"prompt": "?", "response": "red", "images": ["small.png"]})
    assert found["problem"].startswith("1 images without a placeholder; wanted one for each")


def test_a_cut_through_an_image_is_a_bad_row(model: str, folder: Path) -> None:
    rows = sft(max_tokens=10, on_long="truncate_head")
    [found] = render(rows, model, folder, {"prompt": "<image>?", "response": "red", "image": "wide.png"})
    assert found["problem"].startswith("data.max_tokens=10 would cut 8 of the 10 tokens of its images")
    prompts = PromptRows(PromptDataConfig(train=SOURCES, max_prompt_tokens=8, on_long_prompt="truncate"))
    [found] = render(prompts, model, folder, {"prompt": "<image>?", "image": "wide.png"})
    assert "data.max_prompt_tokens=8 would cut" in found["problem"]


def test_a_model_without_vision(folder: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "text-model")
    [blind] = render(sft(), model, folder, {"prompt": "?", "response": "red", "images": ["missing.png"]})
    assert blind["problem"] == "" and blind["notes"] == ["images left out, which the model cannot see"]
    [asked] = render(sft(), model, folder, {"prompt": "<image>?", "response": "red", "image": "small.png"})
    assert "images, which only models of type qwen2_5_vl see here" in asked["problem"]


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        content = png(width=16, height=16, seed=2)
        if self.path == "/slow.png":
            for byte in content[:50]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_images_from_urls_have_a_deadline(model: str, folder: Path, address: str) -> None:
    inline = f"data:image/png;base64,{base64.b64encode(png(width=16, height=16, seed=2)).decode()}"
    rows = [
        {"prompt": "<image>?", "response": "red", "image": image}
        for image in (f"{address}/a.png", f"{address}/slow.png", inline)
    ]
    start = time.monotonic()
    good, slow, same = render(sft(image_timeout_seconds=0.5), model, folder, *rows)
    assert time.monotonic() - start < 4, "each byte arrives in time, the whole does not"
    assert good["images"] == same["images"] == [png(width=16, height=16, seed=2)]
    assert "not complete after 0.5 s (data.image_timeout_seconds)" in slow["problem"]


def test_image_features_of_a_saved_data_set(model: str, folder: Path, tmp_path: Path) -> None:
    import datasets

    from rayrlhf.data.sources.readers import Chunk, read_chunk

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "response": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    content = png(width=16, height=16, seed=2)
    rows = {"prompt": ["<image>?"], "response": ["red"], "images": [[{"bytes": content, "path": None}]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    [row] = read_chunk(Chunk("dataset", str(tmp_path / "saved"), 0, 1))
    [found] = render(sft(), model, folder, row.columns)
    assert found["problem"] == "" and found["images"] == [content]


def test_the_fingerprint_covers_the_images(model: str, folder: Path) -> None:
    """Two images of one size have the same tokens."""

    def fingerprint(seed: int) -> str:
        content = png(width=16, height=16, seed=seed)
        rows = sft()
        found = render(rows, model, folder, {"prompt": "<image>?", "response": "red", "image": content})
        tally = Tally(rows.policy, [0], rows.contents)
        tally.usable_rows(pa.Table.from_pylist(found, rows.schema))
        return tally.fingerprint(np.arange(1))

    assert fingerprint(2) == fingerprint(2) != fingerprint(3)


def test_blocks_of_rows_with_images_are_short() -> None:
    """40,960 steps of 8 rows: 10 steps per block of short rows, 8 where these would be more than 64 MiB."""
    assert len(step_ranges(0, 40_960, 1, 8)) == 4096
    assert len(step_ranges(0, 40_960, 1, 8, row_bytes=1 << 20)) == 5120


def test_photos_are_upright(tmp_path: Path) -> None:
    """Orientation 6: the camera was turned; the file has the picture on its side."""
    picture = Image.new("RGB", (40, 16), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=exif)
    found = opened(stream.getvalue())
    assert (found.size, found.mode) == ((16, 40), "RGB")
    assert (
        found.size
        == load_image(f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}").size
    )
