"""Chains of jobs: consecutive stages, each a separate run in its own folder. A chain that was killed resumes
with the stage that was running.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayrlhf.config.chains import CHOSEN_FILE, AnyChain
from rayrlhf.data.checks import check_sources
from rayrlhf.inference.driver import GENERATIONS, SUMMARY, run_generate
from rayrlhf.inference.select import Chosen
from rayrlhf.inference.shards import json_line, read_rows
from rayrlhf.observe.console import Console
from rayrlhf.runtime.fingerprint import check_identity, without_operational_keys
from rayrlhf.runtime.model_checks import check_adapters
from rayrlhf.runtime.preflight import (
    absolute,
    absolute_rewards,
    check_model,
    find_rewards,
    reward_model_paths,
)
from rayrlhf.runtime.run import DriverRun, RunFailed, StageFailed, start_folder
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.supervised.driver import run_supervised

Choose = Callable[[Iterable[dict[str, Any]]], Chosen]


@dataclass(frozen=True)
class Stage:
    """One stage of a chain. It is done when its summary exists, which is written last."""

    round: int
    name: str
    folder: Path
    run: Callable[[], int]  # starts or resumes it; returns an exit code

    @property
    def is_done(self) -> bool:
        return (self.folder / SUMMARY).is_file()

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / SUMMARY).read_text())


def run_stages(stages: Sequence[Stage], say: Callable[[str], None]) -> None:
    """Run the unfinished stages, in order. Raises `StageFailed` when a stage fails."""
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}, {stage.folder.name}"
        if stage.is_done:
            say(f"{title}: already done")
            continue
        say(f"{title}: {stage.folder}")
        code = stage.run()
        if code:
            raise StageFailed(code)


def run_chain(config: AnyChain, choose: Choose) -> int:
    """Rounds of generate, choose, train; returns the exit code of `DriverRun` or of a failed stage."""
    with DriverRun(config) as run:
        config = run.pinned(config)
        _check(config)
        run.check_models(config)
        with run.ray(config):
            config = with_absolute_paths(config)
            run.finished(_run(config, stages_of(config, choose), run.console))
    return run.exit_code


def _check(config: AnyChain) -> None:
    """Check the config of a chain. Raises one of `INPUT_ERRORS`."""
    check_model("model.path", config.model.path)
    for key, path in reward_model_paths(config.reward):
        check_model(key, path)
    check_sources(config.data)
    find_rewards(config.reward)
    check_adapters(config)


def with_absolute_paths(config: AnyChain) -> AnyChain:
    changes = {
        "run": config.run.absolute(),
        "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
        "reward": absolute_rewards(config.reward),
    }
    return config.model_copy(update=changes)


def stages_of(config: AnyChain, choose: Choose) -> list[Stage]:
    """All stages with their configs, which validates the configs before anything starts."""
    stages: list[Stage] = []
    model_path = config.model.path
    for round_ in range(1, config.num_rounds + 1):
        generating = config.generate_config(round_, model_path)
        training = config.training_config(round_, model_path)
        answers, folder = Path(generating.run.path), config.stage_folder(round_, "choose")
        stages += [
            Stage(round_, "generate", answers, partial(run_generate, generating)),
            Stage(round_, "choose", folder, partial(_choose, choose, answers / GENERATIONS, folder)),
            Stage(round_, "train", Path(training.run.path), partial(run_supervised, training)),
        ]
        model_path = str(Path(training.run.path) / "export")
    if config.score_last:
        # The same stage as the next round's first: it is reused if num_rounds is raised.
        generating = config.generate_config(config.num_rounds + 1, model_path)
        last = Stage(
            config.num_rounds + 1, "generate", Path(generating.run.path), partial(run_generate, generating)
        )
        stages.append(last)
    return stages


def _choose(choose: Choose, answers: Path, folder: Path) -> int:
    """Write the rows to train on. Raises `RunFailed` if there are none."""
    rows, counts = choose(read_rows(answers))
    if not rows:
        reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
        raise RunFailed(
            f"no row of {answers} can be trained on: {reasons}. Fix: more samples per prompt "
            "(rollout.group_size), a higher rollout.sampling.temperature, or weaker conditions in the "
            "section choose"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CHOSEN_FILE, "".join(map(json_line, rows)))
    write_atomically(folder / SUMMARY, json.dumps({"counts": counts}, indent=2) + "\n")
    return 0


def _run(config: AnyChain, stages: Sequence[Stage], console: Console) -> Path:
    run_path = Path(config.run.path)
    check_identity(run_path / "chain.json", _identity(config), resume=config.run.resume)
    start_folder(config)
    run_stages(stages, console.say)
    summary = chain_summary(config, stages)
    write_atomically(run_path / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return run_path


def _identity(config: AnyChain) -> dict[str, Any]:
    """All values that finished stages depend on; the number of rounds may be raised."""
    tree = config.model_dump(
        mode="json", exclude={"observe", "placement", "launch", "num_rounds", "score_last"}
    )
    tree["run"] = {"seed": config.run.seed}
    return without_operational_keys(tree)


def chain_summary(config: AnyChain, stages: Sequence[Stage]) -> dict[str, Any]:
    """Mean score and counts of every round, and the path of the last model."""
    rounds: list[dict[str, Any]] = []
    export = None
    for stage in stages:
        result = stage.summary
        if stage.name == "generate":
            scores = {key: result[key] for key in ("score_mean", "score_ci")}
            rounds.append({"round": stage.round, **scores, "counts": {}, "export": None})
        elif stage.name == "choose":
            rounds[-1]["counts"] = result["counts"]
        else:
            export = rounds[-1]["export"] = result["export"]
    last = rounds.pop() if config.score_last else None
    return {
        "job": config.job,
        "rounds": rounds,
        "last": {key: last[key] for key in ("score_mean", "score_ci")} if last else None,
        "export": export,
    }
