"""A hundred and more bad inputs: each ends with exit code 2 and one clear error that names the key, within a
second, before anything heavy is imported. Some run as separate processes, which leave nothing running.

With `-s` it prints a table of case, error and milliseconds.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayrlhf.config.job_kinds import SCHEMAS
from rayrlhf.runtime.file_checks import load_job
from tests.checkpoint_files import write_checkpoint, write_shards

REPOSITORY = Path(__file__).parents[2]
MAX_CPU_SECONDS = 3.0  # milliseconds on an idle machine
Change = Callable[[Path], Sequence[str]]  # spoils the folder, and returns overrides


def base(folder: Path, job: str | None) -> list[str]:
    """A good configuration of any job, and the files that it names."""
    write_checkpoint(folder / "model")
    scorer = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write_checkpoint(folder / "scorer", **scorer)
    row = {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d", "label": True}
    row |= {"completions": ["e", "f"], "labels": [True, False]}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    tree: dict[str, Any] = {
        "run": {"name": "bad", "dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl")},
        "reward": {"sources": [{"type": "model", "path": str(folder / "scorer")}]},
        "train": {"num_steps": 2},
    }
    if job in ("generate", "rejection_sampling", "iterative_dpo", "conditional_sft"):
        del tree["train"]
    elif job == "serve_reward":
        tree = {"reward": tree["reward"]}
    elif job is not None:
        del tree["reward"]
    if job in ("rejection_sampling", "iterative_dpo"):
        tree["rollout"] = {"group_size": 2}
    if job is not None:
        tree["job"] = job
    if job == "kd":
        tree["teacher"] = {"path": str(folder / "model")}
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))  # which is YAML, too
    return [str(path)]


def given(*overrides: str) -> Change:
    return lambda folder: [override.replace("FOLDER", str(folder)) for override in overrides]


def rows(content: str | bytes, name: str = "rows.jsonl") -> Change:
    """Other data, in a file of this name."""

    def change(folder: Path) -> list[str]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [f"data.train={folder / name}"]

    return change


def file(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> list[str]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return []

    return change


def model(**config: Any) -> Change:
    return lambda folder: (write_checkpoint(folder / "model", **config), [])[1]


def second_file(content: str | bytes) -> Change:
    """Another YAML file behind the good one."""
    return lambda folder: (file("more.yaml", content)(folder), [str(folder / "more.yaml")])[1]


def cut(name: str, size: int) -> Change:
    return lambda folder: (os.truncate(folder / name, size), [])[1]


def gone(name: str) -> Change:
    return lambda folder: ((folder / name).unlink(), [])[1]


def another(name: str, key: str, spoil: Change) -> Change:
    """A second checkpoint, spoilt."""

    def change(folder: Path) -> list[str]:
        write_checkpoint(folder / name)
        spoil(folder)
        return [f"{key}={folder / name}"]

    return change


def a_shard_gone(folder: Path) -> list[str]:
    write_shards(folder / "model", 3)
    (folder / "model" / "model-00002-of-00003.safetensors").unlink()
    return []


ROW = '{"prompt": "a"}\n'
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MISSING_COLUMN = "no column 'prompt'"

# What is changed in a good configuration of the job, and what the error says.
CASES: dict[str, tuple[str | None, Change, str]] = {
    # keys and values
    "a key of nowhere": (None, given("train.zzz=1"), "train.zzz"),
    "a misspelt key": (None, given("train.lrr=1"), "did you mean train.lr?"),
    "a section misspelt": (None, given("trian.lr=1"), "trian"),
    "a text for a number": (None, given("train.lr=fast"), "a number >= 0"),
    "a number for a text": (None, given("run.name=7"), "put it in quotes"),
    "a negative count": (None, given("train.num_workers=-1"), "train.num_workers"),
    "zero steps": (None, given("train.num_steps=0"), "train.num_steps"),
    "a fraction of steps": (None, given("train.num_steps=1.5"), "an integer >= 1"),
    "a learning rate of nan": (None, given("train.lr=.nan"), "train.lr"),
    "an infinite learning rate": (None, given("train.lr=1e999"), "train.lr"),
    "an unknown estimator": (None, given("algorithm.advantage=gea"), "did you mean gae?"),
    "a group of one for GRPO": (
        None,
        given("algorithm.advantage=grpo", "rollout.group_size=1"),
        "no baseline",
    ),
    "greedy training samples": (None, given("rollout.sampling.temperature=0"), "temperature"),
    "prompts that workers cannot share": (None, given("train.num_workers=7"), "rollout.prompts_per_step"),
    "a null model": (None, given("model=null"), "model"),
    "a list of models": (None, given("model.path=[a, b]"), "model.path"),
    "no reward": (None, given("reward.sources=[]"), "reward.sources"),
    "a reward of no type": (None, given("reward.sources=[{path: x}]"), "reward.sources.0.type"),
    "two rewards of one name": (
        None,
        given("reward.sources=[{type: model, path: a/b, name: x}, {type: model, path: a/b, name: x}]"),
        "more than one source with the name x",
    ),
    "a run name with a slash": (None, given("run.name=a/b"), "run.name"),
    "a run name of two dots": (None, given("run.name=.."), "run.name"),
    "a seed below zero": (None, given("run.seed=-1"), "run.seed"),
    "a seed of 64 bits": (None, given("run.seed=9999999999"), "below 2147483648"),
    "a seed of 5000 digits": (None, given(f"run.seed={'9' * 5000}"), "run.seed"),
    "an index past the list": (None, given("reward.sources.5.weight=1"), "reward.sources.5.weight"),
    "a path through a number": (None, given("train.num_steps.x=1"), "train.num_steps"),
    "SFT with steps and epochs": ("sft", given("train.num_epochs=1"), "train.num_epochs"),
    "more workers than samples": ("sft", given("train.num_workers=100"), "train.samples_per_step"),
    "an unknown metric": ("dpo", given("eval.metric=wins"), "eval.metric"),
    "smoothing without cdpo": ("dpo", given("algorithm.label_smoothing=0.1"), "algorithm.label_smoothing"),
    "a reference for ORPO": ("dpo", given("algorithm.loss=orpo", "ref={}"), "no ref"),
    "a mixture of 1": ("kd", given("algorithm.jsd_beta=1"), "algorithm.jsd_beta"),
    "adapters in 4 bits without adapters": ("sft", given("model.quantization=nf4"), "model.quantization"),
    "offload without ZeRO-3": ("rm", given("train.offload_params=true"), "train.offload_params"),
    # the command line
    "an option of TRL": (None, given("--learning_rate", "1e-5"), "use train.lr"),
    "an option of OpenRLHF": ("dpo", given("--pretrain=x"), "use model.path"),
    "a key of verl": (None, given("actor_rollout_ref.rollout.n=5"), "use rollout.group_size"),
    "a switch": ("sft", given("--packing"), "leave it out"),
    "a word of Hydra": (None, given("+trainer.nnodes=1"), "use train.num_workers"),
    "a value alone": (None, given("train.lr"), "neither a YAML file nor an override"),
    "an equals sign alone": (None, given("=3"), "key.path=value"),
    "a file that is not there": (None, given("FOLDER/no.yaml"), "no such file"),
    "broken YAML in an override": (None, given("train.betas=[0.9"), "put quotes around it"),
    "a folder for a file": (None, given("FOLDER"), "directory"),
    # YAML files
    "an alias bomb": (None, second_file(BOMB), "aliases"),
    "an alias of itself": (None, second_file("run: &r {x: *r}"), "broken YAML"),
    "a Python object": (None, second_file("run: !!python/object/apply:os.system [ls]"), "remove the tag"),
    "a tag of a date": (None, second_file("run: {name: !!timestamp x}"), "remove the tag"),
    "a tag that does not fit": (None, second_file("run: {seed: !!int x}"), "remove the tag"),
    "sixty levels": (None, second_file("a: " + "[" * 60 + "]" * 60), "nested deeper"),
    "ten thousand levels": (None, second_file("[" * 10_000), "nested too deeply"),
    "a key twice": (None, second_file("train: {lr: 1}\ntrain: {lr: 2}"), "given twice"),
    "a number for a key": (None, second_file("3: x"), "no such key"),
    "a list for a key": (None, second_file("? [a]\n: x"), "more.yaml"),
    "a file of two documents": (None, second_file("a: 1\n---\nb: 2"), "more.yaml"),
    "a tab for blanks": (None, second_file("run:\n\tname: x"), "more.yaml"),
    "UTF-16": (None, second_file("run: {name: x}".encode("utf-16")), "save it as UTF-8"),
    "Latin-1": (None, second_file("# é".encode("latin-1")), "utf-8"),
    "a binary": (None, second_file(b"\x7fELF\0\0"), "a zero byte"),
    "a list of settings": (None, second_file("- a: 1"), "a list at the top level"),
    "a text": (None, second_file("hello"), "a text at the top level"),
    "two megabytes": (None, second_file("#" * 2**21), "more than"),
    "the file of another job": ("sft", second_file("job: dpo"), "this file is for jobs/dpo.py"),
    "a job of nowhere": ("rm", second_file("job: ppo2"), "job"),
    # the run's folder
    "run.dir is a file": (None, given("run.dir=FOLDER/rows.jsonl"), "rows.jsonl is a file"),
    "run.dir below a file": ("sft", given("run.dir=FOLDER/rows.jsonl/x"), "rows.jsonl is a file"),
    "the run's own folder is a file": ("rm", file("runs/bad", "x"), "runs/bad is a file"),
    "a name of 300 letters": (None, given(f"run.name={'n' * 300}"), "shorten run.name"),
    "a path of 5000 letters": (None, given(f"run.dir={'d/' * 2500}"), "shorten run.dir"),
    "run.dir where nothing can be written": (None, given("run.dir=/proc"), "run.dir"),
    "run.dir of a bucket": (None, given("run.dir=s3://bucket/runs"), "run.dir"),
    "run.dir with a tilde": ("kto", given("run.dir='~/runs'"), "~ is not expanded"),
    # the model
    "no such model": (None, given("model.path=FOLDER/none"), "no such folder"),
    "a file for a model": (None, given("model.path=FOLDER/rows.jsonl"), "no such folder"),
    "an empty folder": (None, given("model.path=FOLDER/runs"), "model.path"),
    "weights cut short": ("sft", cut("model/model.safetensors", 3000), "cut short"),
    "weights that are empty": ("dpo", cut("model/model.safetensors", 0), "it is empty"),
    "no weights": ("kto", gone("model/model.safetensors"), "no weights"),
    "a shard that is gone": (None, a_shard_gone, "model-00002-of-00003.safetensors is missing"),
    "a web page for weights": (
        "sft",
        file("model/model.safetensors", "<html>not found</html>"),
        "no safetensors",
    ),
    "config.json of another model": ("sft", model(hidden_size=16), "do not fit config.json"),
    "config.json with more layers": (None, model(num_hidden_layers=40), "weights lack"),
    "config.json cut short": (None, cut("model/config.json", 30), "config.json is no JSON"),
    "an unknown architecture": (None, model(model_type="gpt9"), "model_type 'gpt9'"),
    "an encoder": (None, model(model_type="roberta"), "an encoder"),
    "a translator": ("sft", model(model_type="t5", is_encoder_decoder=True), "encoder-decoder"),
    "no layers": ("rm", model(num_hidden_layers=0), "num_hidden_layers=0"),
    "seven heads": ("rm", model(num_attention_heads=7), "num_attention_heads=7"),
    "no tokenizer": ("sft", gone("model/tokenizer.json"), "no tokenizer"),
    "half a tokenizer": (None, cut("model/tokenizer.json", 40), "tokenizer.json is no JSON"),
    "no chat template": (
        None,
        file("model/tokenizer_config.json", '{"eos_token": "x"}'),
        "data.apply_chat_template",
    ),
    "a tokenizer without an end": (
        None,
        file("model/tokenizer_config.json", '{"eos_token": null}'),
        "eos_token",
    ),
    "a language model for a reward model": (
        None,
        given("reward.sources=[{type: model, path: FOLDER/model}]"),
        "reward.sources.0.path",
    ),
    "a reward server of a language model": (
        "serve_reward",
        given("reward.sources=[{type: model, path: FOLDER/model}]"),
        "reward.sources.0.path",
    ),
    "a teacher cut short": (
        "kd",
        another("teacher", "teacher.path", cut("teacher/model.safetensors", 99)),
        "teacher.path",
    ),
    "a critic without weights": (
        None,
        another("critic", "critic.path", gone("critic/model.safetensors")),
        "critic.path",
    ),
    # the data
    "no such data": (None, given("data.train=FOLDER/none.jsonl"), "no such file"),
    "data of no type": (None, rows(ROW, "rows.doc"), "rows.doc"),
    "empty data": (None, rows(""), "holds no rows"),
    "a row that is no JSON": (None, rows(ROW + "{"), "rows.jsonl:2: not valid JSON"),
    "a row that is a list": (None, rows(ROW + "[1]\n"), "rows.jsonl:2: an array, not an object"),
    "a row with a key twice": (None, rows(ROW + '{"prompt": "a", "prompt": "b"}\n'), "duplicate key"),
    "a row without a prompt": (None, rows(ROW + '{"question": "a"}\n'), MISSING_COLUMN),
    "a prompt of blanks": (None, rows(ROW + '{"prompt": "  "}\n'), "is empty"),
    "a prompt that is a number": (None, rows(ROW + '{"prompt": 3}\n'), "rows.jsonl:2"),
    "a prompt that ends with an answer": (
        None,
        rows('{"prompt": [{"role": "assistant", "content": "x"}]}\n'),
        "end with the assistant's answer",
    ),
    "half of a surrogate pair": (None, rows('{"prompt": "\\ud800"}\n'), "not valid Unicode"),
    "rows in UTF-16": (None, rows(ROW.encode("utf-16")), "save it as UTF-8"),
    "rows in Latin-1": (None, rows('{"prompt": "é"}\n'.encode("latin-1")), "not UTF-8"),
    "rows in gzip": (None, rows(gzip.compress(ROW.encode())), "compressed with gzip"),
    "Parquet that is none": (None, rows(b"nonsense", "rows.parquet"), "cannot be read as parquet"),
    "Parquet named JSON": (None, rows(b"PAR1nonsense"), "it is a Parquet file"),
    "Arrow that is none": (None, rows(b"nonsense", "rows.arrow"), "cannot be read as arrow"),
    "CSV with a column twice": (None, rows("prompt,prompt\na,b\n", "rows.csv"), "twice"),
    "CSV with semicolons": (None, rows("prompt;label\na;b\n", "rows.csv"), MISSING_COLUMN),
    "CSV with a row too long": (None, rows("prompt\na,b\n", "rows.csv"), "2 fields where the header has 1"),
    "no label": (None, given("data.label_key=answer"), "no column 'answer'"),
    "no template file": (None, given("data.chat_template=FOLDER/x.jinja"), "data.chat_template"),
    "pairs without a rejected one": ("rm", rows('{"prompt": "a", "chosen": "b"}\n'), "rejected"),
    "prompts for SFT": ("sft", rows(ROW), "rows.jsonl:1"),
    "labels that are no truth values": (
        "kto",
        rows('{"prompt": "a", "completion": "b", "label": "perhaps"}\n'),
        "rows.jsonl:1",
    ),
    "prompts of generate": ("generate", rows('{"question": "a"}\n'), MISSING_COLUMN),
    "prompts of a chain": ("rejection_sampling", rows('{"question": "a"}\n'), MISSING_COLUMN),
}

table: list[tuple[str, str, float]] = []


@pytest.fixture(scope="module", autouse=True)
def printed() -> Any:
    """The table, with `-s`."""
    yield
    for case, error, seconds in sorted(table, key=lambda row: row[2]):
        print(f"{1000 * seconds:7.1f} ms  {case:40} {error}")
    times = sorted(row[2] for row in table)
    if times:
        low, middle, high = (1000 * times[i] for i in (0, len(times) // 2, -1))
        print(f"{len(times)} cases: {low:.1f} / {middle:.1f} / {high:.1f} ms (min / median / max)")


def test_there_are_a_hundred() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("job", {job for job, _, _ in CASES.values()}, ids=str)
def test_what_the_cases_change_is_good(job: str | None, tmp_path: Path) -> None:
    assert load_job(SCHEMAS[job], base(tmp_path, job)) is not None


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_at_once(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, change, message = CASES[case]
    argv = base(tmp_path, job)
    argv += change(tmp_path)
    before = time.process_time()
    with pytest.raises(SystemExit) as caught:
        load_job(SCHEMAS[job], argv)
    seconds = time.process_time() - before
    shown = capsys.readouterr()
    assert caught.value.code == 2 and shown.out == ""
    assert message in shown.err and "Traceback" not in shown.err, shown.err
    assert len(re.findall(r"problems? in the configuration|^error ", shown.err, re.M)) == 1, shown.err
    assert seconds < MAX_CPU_SECONDS
    lines = [line.strip() for line in shown.err.splitlines() if line.strip()]
    first_lines = lines[1:3] if "in the configuration" in lines[0] else lines[:1]
    table.append((case, " ".join(first_lines).replace(str(tmp_path), "…")[:110], seconds))


PROCESSES = (
    "a key of nowhere",
    "an option of TRL",
    "an alias bomb",
    "the file of another job",
    "run.dir is a file",
    "weights cut short",
    "an encoder",
    "half a tokenizer",
    "a row with a key twice",
    "a reward server of a language model",
    "prompts of a chain",
)


@pytest.mark.parametrize("case", PROCESSES)
def test_a_job_ends_with_the_error_and_leaves_nothing_running(case: str, tmp_path: Path) -> None:
    job, change, message = CASES[case]
    argv = [*base(tmp_path, job), *change(tmp_path)]
    mark = f"bad-input-{uuid.uuid4().hex}"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, f"jobs/{job or 'ppo'}.py", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "BAD_INPUT_MARK": mark},
        capture_output=True,
        text=True,
        timeout=120,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert processes_with(mark) == []
    assert not (tmp_path / "runs" / "bad").is_dir(), "nothing is made for a run that does not begin"
    print(f"\n{seconds:5.2f} s  {case}")


def processes_with(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BAD_INPUT_MARK") == mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it has ended, or is another user's
    return found
