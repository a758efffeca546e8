"""What the demo prints at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayrlhf.observe.summary import show_summary, verdict


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "reward_before": -0.1,
        "reward_before_ci": [-0.2, 0.0],
        "reward_after": 0.5,
        "reward_after_ci": [0.4, 0.6],
        "steps": 12,
        "seconds_total": 100.0,
        "seconds_per_phase": {"update_actor": 30.0, "rollout": 60.0},
        "export": "/runs/demo/export",
        "samples": [
            {
                "prompt": "Describe a cold soup.",
                "before": "It is [bold]cold[/bold].",
                "after": "Lovely\n\n soup!",
                "reward_before": -0.3,
                "reward_after": 0.8,
            }
        ],
        **changes,
    }


def shown(tmp_path: Path, contents: dict[str, Any]) -> str:
    (tmp_path / "summary.json").write_text(json.dumps(contents))
    console = Console(width=110, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    show_summary(tmp_path, console)
    return console.export_text()


def test_rewards_samples_phases_and_export_are_there(tmp_path: Path) -> None:
    text = shown(tmp_path, summary())
    assert "-0.100" in text and "-0.200 to +0.000" in text
    assert "+0.500" in text and "+0.400 to +0.600" in text
    assert "before -0.30  It is [bold]cold[/bold]." in text  # a response is never read as markup
    assert "after  +0.80  Lovely soup!" in text  # one line per response
    assert text.index("rollout") < text.index("update_actor") < text.index("other")
    assert "60 %" in text and "10 %" in text  # 60 of 100 seconds; 100 - 60 - 30 are in no phase
    assert "/runs/demo/export" in text


def test_a_chat_prompt_shows_its_last_message(tmp_path: Path) -> None:
    contents = summary()
    contents["samples"][0]["prompt"] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Say hello."},
    ]
    text = shown(tmp_path, contents)
    assert "Say hello." in text and "Be kind." not in text


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([-0.2, 0.0], [0.1, 0.2], "rose"),
        ([0.1, 0.2], [-0.2, 0.0], "fell"),
        ([-0.2, 0.1], [0.0, 0.2], "overlap"),
        (None, None, "without held-out prompts"),
    ],
)
def test_verdict(before: list[float] | None, after: list[float] | None, says: str) -> None:
    assert says in verdict({"reward_before_ci": before, "reward_after_ci": after}).plain


def test_a_run_without_evaluation_says_so(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("reward_before", "reward_before_ci", "reward_after", "reward_after_ci"))
    text = shown(tmp_path, summary(**nothing, samples=[], export=None))
    assert text.count("not measured") == 2
