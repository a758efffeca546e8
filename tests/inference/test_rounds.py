"""Stages in order: what is done is not done again, and what fails ends the chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayrlhf.config.chains import ConditionalSftConfig, IterativeDpoConfig
from rayrlhf.inference.rounds import Stage, chain_summary, run_stages, stages_of
from rayrlhf.runtime.run import StageFailed
from tests.config.test_chains import chain


class Plan:
    """Three stages that note when they run; `ends` is the exit code of one of them."""

    def __init__(self, folder: Path, **ends: int) -> None:
        self.ran: list[str] = []
        self.stages = [Stage(1, name, folder / name, self.end(folder / name, ends)) for name in "abc"]

    def end(self, folder: Path, ends: dict[str, int]) -> Callable[[], int]:
        def run() -> int:
            self.ran.append(folder.name)
            folder.mkdir(exist_ok=True)
            if code := ends.get(folder.name, 0):
                return code
            (folder / "summary.json").write_text("{}")
            return 0

        return run


def test_a_killed_chain_goes_on_with_the_stage_that_it_was_in(tmp_path: Path) -> None:
    first, said = Plan(tmp_path, b=143), []
    with pytest.raises(StageFailed) as failed:
        run_stages(first.stages, said.append)
    assert failed.value.code == 143 and first.ran == ["a", "b"]

    second = Plan(tmp_path)
    run_stages(second.stages, said.append)
    assert second.ran == ["b", "c"]
    third = Plan(tmp_path)
    run_stages(third.stages, said.append)
    assert third.ran == [] and said[-1] == "stage 3 of 3, c: already done"


def nothing(_rows: object) -> tuple[list[dict[str, object]], dict[str, int]]:
    return [], {}


def test_each_round_starts_from_the_last_export(tmp_path: Path) -> None:
    config = chain(IterativeDpoConfig, run={"name": "c", "dir": str(tmp_path)}, num_rounds=2)
    stages = stages_of(config, nothing)
    assert [stage.folder.relative_to(tmp_path / "c").as_posix() for stage in stages] == [
        "1-generate",
        "1-choose",
        "1-dpo",
        "2-generate",
        "2-choose",
        "2-dpo",
        "3-generate",
    ]
    longer = stages_of(config.model_copy(update={"num_rounds": 3}), nothing)
    assert [s.folder for s in longer[:7]] == [s.folder for s in stages], "more rounds repeat nothing"


def test_conditional_sft_has_one_round(tmp_path: Path) -> None:
    config = chain(ConditionalSftConfig, run={"name": "c", "dir": str(tmp_path)})
    assert [stage.folder.name for stage in stages_of(config, nothing)] == ["1-generate", "1-choose", "1-sft"]


def test_the_summary_has_a_line_per_round(tmp_path: Path) -> None:
    config = chain(IterativeDpoConfig, run={"name": "c", "dir": str(tmp_path)}, num_rounds=2)
    stages = stages_of(config, nothing)
    for number, stage in enumerate(stages):
        stage.folder.mkdir(parents=True)
        summaries = {
            "generate": {"score_mean": float(number), "score_ci": [0.0, 9.0]},
            "choose": {"counts": {"pairs": number}},
            "train": {"export": f"export{number}"},
        }
        (stage.folder / "summary.json").write_text(json.dumps(summaries[stage.name]))
    assert chain_summary(config, stages) == {
        "job": "iterative_dpo",
        "rounds": [
            {
                "round": 1,
                "score_mean": 0.0,
                "score_ci": [0.0, 9.0],
                "counts": {"pairs": 1},
                "export": "export2",
            },
            {
                "round": 2,
                "score_mean": 3.0,
                "score_ci": [0.0, 9.0],
                "counts": {"pairs": 4},
                "export": "export5",
            },
        ],
        "last": {"score_mean": 6.0, "score_ci": [0.0, 9.0]},
        "export": "export5",
    }
