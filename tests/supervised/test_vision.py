"""SFT and DPO on rows with images, in one process: the first loss is transformers' own, and the colour of an
image is learned.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.tiny_vision import IMAGE_PAD, make_tiny_vision, png

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NUM_STEPS = 40


def rows() -> list[dict[str, Any]]:
    """Images of two sizes; the wrong answer of each is the next colour."""
    names = [*COLOURS, *COLOURS]
    found = []
    for number, name in enumerate(names):
        content = png(width=16 + 8 * (number % 2), height=16, colour=COLOURS[name])
        wrong = names[(number + 1) % len(names)]
        found.append({"prompt": "<image>?", "response": name, "wrong": wrong, "image": content})
    return found


def examples_of_rows(job: str, model: str) -> list[Any]:
    import pyarrow as pa

    from rayrlhf.data.prepare import ExampleRows, RenderStage
    from rayrlhf.data.rows.images import with_bytes_as_text
    from rayrlhf.data.store import examples_of

    data = config_of(job, model, "nowhere").data
    table = [
        {
            "source": 0,
            "_file": "a.jsonl",
            "_row": number,
            "columns_json": json.dumps(with_bytes_as_text(row, None)),
            "problem": "",
            "padded": "[]",
            "left_out": "[]",
        }
        for number, row in enumerate(rows(), start=1)
    ]
    rendered = RenderStage(ExampleRows(data, "train", 0), model, False, None)(pa.Table.from_pylist(table))
    assert set(rendered.column("problem").to_pylist()) == {""}
    return examples_of(rendered.append_column("row_id", pa.array(range(len(table)))))


def config_of(job: str, model: str, folder: str) -> Any:
    from tests.integration.supervised_runs import job as job_of

    keys = {"chosen_key": "response", "rejected_key": "wrong"} if job == "dpo" else {}
    data = {"eval": [], **keys}
    train = {"num_steps": NUM_STEPS, "lr": 1e-3, "share_prefixes": False}  # as the driver sets it for images
    return job_of(Path(folder), model, job, data=data, train=train)


def run_all(_: int, model: str, folder: str) -> None:
    """In a separate process, whose process group DeepSpeed uses: the loss of each step, and an export."""
    from rayrlhf.supervised.setup import TASKS
    from rayrlhf.supervised.task import Objective, TaskSetting, total_weight
    from rayrlhf.train.collectives import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    found: dict[str, Any] = {}
    for job in ("sft", "dpo"):
        ranks, examples = Ranks(), examples_of_rows(job, model)
        task = TASKS[job](TaskSetting(config_of(job, model, folder), ranks))
        steps = []
        for step in range(NUM_STEPS):
            batches = task.prepare([examples[:4], examples[4:], []], "train")  # the last is padding
            objective = Objective(task, total_weight(task, batches, ranks))
            steps.append(task.learner.update(objective.term(batches), step=step).results())
        task.export(Path(folder, job))
        found[job] = steps
    (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_vision(tmp_path_factory.mktemp("vision-sft") / "model")


@pytest.fixture(scope="module")
def runs(model: str) -> dict[str, Any]:
    folder = Path(model).parent
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        spawn(run_all, args=(model, str(folder)), nprocs=1)
    return json.loads((folder / "found.json").read_text())


def own_sums(folder: str | Path, answer: str) -> list[float]:
    """Of each row the log-probability of an answer, by transformers alone; 4 tokens of letters and an end."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    from rayrlhf.data.images import opened

    causal_lm = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sums = []
    for row in rows():
        pixels = processor(images=[opened(row["image"])], return_tensors="pt")
        pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
        prompt = f"<s><|user|><|vision_start|>{pads}<|vision_end|>?</s><|assistant|>"
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = torch.tensor([[*before, *tokenizer(f"{row[answer]}</s>", add_special_tokens=False).input_ids]])
        with torch.no_grad():
            kinds = (ids == IMAGE_PAD).int()
            logits = causal_lm(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **pixels).logits[0]
        logprobs = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        sums.append(float(logprobs[len(before) - 1 :].sum()))
    return sums


def test_the_first_loss_of_sft_is_transformers_own(runs: dict[str, Any], model: str) -> None:
    num_tokens = sum(len(row["response"]) + 1 for row in rows())
    wanted = -sum(own_sums(model, "response")) / num_tokens
    assert runs["sft"][0]["loss/model"] == pytest.approx(wanted, abs=1e-5)


def test_sft_learns_colours_and_its_export_opens(runs: dict[str, Any], model: str) -> None:
    assert runs["sft"][-1]["loss/model"] < 0.2
    export = Path(model).parent / "sft"
    right, wrong = own_sums(export, "response"), own_sums(export, "wrong")
    assert all(math.exp(a) > 0.5 and a > b for a, b in zip(right, wrong, strict=True))
    saved, source = export / "preprocessor_config.json", Path(model, "preprocessor_config.json")
    assert saved.read_text() == source.read_text()


def test_dpo_prefers_the_right_colour(runs: dict[str, Any], model: str) -> None:
    assert runs["dpo"][0]["loss/model"] == pytest.approx(math.log(2), abs=1e-5), "the policy is the reference"
    assert runs["dpo"][-1]["loss/model"] < 0.3
    export = Path(model).parent / "dpo"
    before, after = (
        [a - b for a, b in zip(own_sums(f, "response"), own_sums(f, "wrong"), strict=True)]
        for f in (model, export)
    )
    assert all(new > old for old, new in zip(before, after, strict=True))
