"""Number 24: secrets of a configuration stand in nothing that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf import secrets
from rayrlhf.commands.render.rendering import rendering_of
from rayrlhf.commands.render.targets import TARGETS
from rayrlhf.config.base import ConfigError
from rayrlhf.config.parse import dump_resolved, load_config, load_or_exit
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console
from rayrlhf.observe.sinks import make_sinks
from rayrlhf.runtime.run import start_folder
from tests.samples import make_config

SECRETS = ("hdr-secret-1", "user-secret-2", "query-secret-3", "argument-secret-4")
SOURCE: dict[str, Any] = {
    "type": "remote",
    "urls": [f"https://me:{SECRETS[1]}@judge.example/score?model=a&access_token={SECRETS[2]}"],
    "headers": {"X-Judge": f"Bearer {SECRETS[0]}", "Accept": "application/json"},
}


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process remembers is its own; here each test is one."""
    monkeypatch.setattr(secrets, "_known", set())


def config_with(**source: Any) -> PolicyRunConfig:
    return make_config(reward={"sources": [SOURCE | source]})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/x", "https://***@h/x"),
        ("https://h/?a=1&token=x;y&b=2", "https://h/?a=1&token=***&b=2"),
        ("https://h/?a=1;api_key=x", "https://h/?a=1;api_key=***"),
        ("https://h/?X-Amz-Signature=x'y#access_token=z", "https://h/?X-Amz-Signature=***#access_token=***"),
        ("https://h/?subscriptionKey=x&monkey=y", "https://h/?subscriptionKey=***&monkey=y"),
        ("https://${U}:${P}@h/?token=${T}", "https://${U}:${P}@h/?token=${T}"),
        ("sent Authorization: Bearer abc, x-api-key=def", "sent Authorization: Bearer ***, x-api-key=***"),
        ("{'Authorization': 'Bearer abc'}", "{'Authorization': 'Bearer ***'}"),
        ("https://h/?token=***: HTTP status 500", "https://h/?token=***: HTTP status 500"),
        ("data.label_key=answer, 3 tokens = 3", "data.label_key=answer, 3 tokens = 3"),
    ],
)
def test_masked(text: str, shown: str) -> None:
    assert secrets.masked(text) == shown and secrets.masked(shown) == shown


def test_what_is_remembered_is_masked_however_it_is_quoted() -> None:
    secrets.remember(["Bearer a/b+c d-e"])
    for quoted in ("Bearer a/b+c d-e", "a/b+c d-e", "Bearer%20a%2Fb%2Bc%20d-e", "Bearer+a%2Fb%2Bc+d-e"):
        assert secrets.masked(f"<{quoted}>") in ("<***>", "<Bearer ***>")
    secrets.remember(["7", "true"])
    assert secrets.masked("7 is true") == "7 is true", "too short to be looked for"


def test_a_tree_keeps_what_is_no_secret() -> None:
    tree = {
        "data": {"label_key": "answer", "step_token": "<s>"},
        "headers": {"Authorization": "Bearer x", "Accept": "a", "X-Ref": "env:NAME", "X-Two": "k ${NAME}"},
        "environment": {"arguments": {"api_key": "abc", "depth": 3, "token": "${T}"}},
        "urls": ["http://h/score?n=1"],
    }
    masked = secrets.masked_tree(tree)
    assert masked["data"] == tree["data"] and masked["urls"] == tree["urls"]
    assert masked["headers"] == tree["headers"] | {"Authorization": "***"}
    assert masked["environment"]["arguments"] == {"api_key": "***", "depth": 3, "token": "${T}"}


def everything_written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_24_no_file_of_a_run_and_nothing_printed_holds_a_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: config.yaml, W&B's config and its metadata (the command line), and errors held all of them."""
    path = tmp_path / "job.json.yaml"
    config = make_config(
        run={"dir": str(tmp_path / "runs"), "name": "r"},
        reward={"sources": [SOURCE]},
        observe={"wandb": {"project": "tests", "mode": "offline"}},
    )
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    headers = json.dumps({**SOURCE["headers"], "X-Own": SECRETS[3]})
    argv = [str(path), f"reward.sources.0.headers={headers}"]
    monkeypatch.setattr("sys.argv", ["jobs/ppo.py", *argv])
    loaded = load_config(PolicyRunConfig, argv)
    run_path = start_folder(loaded)
    console = Console("lines")
    with make_sinks(loaded, run_path, console) as sinks:
        sinks.write(Report("step", 1, metrics={"reward/mean": 0.5}))
        sinks.write(Report("warning", 1, f"{SECRETS[0]} {SOURCE['urls'][0]} {SECRETS[3]}"))
    console.error(f"crashed with {loaded!r} {SECRETS[0]}")
    written = everything_written(run_path)
    assert list(run_path.rglob("*.wandb")) and b"judge.example/score?model=a&access_token=***" in written
    printed = "".join(capfd.readouterr())
    assert "crashed with PolicyRunConfig(" in printed
    for secret in SECRETS:
        assert secret not in printed and secret.encode() not in written


def test_24_a_masked_config_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_resolved(config_with()))
    with pytest.raises(ConfigError, match=r"reward\.sources\.0\.urls\.0 .*(?s:.*)write \$\{VARIABLE\}"):
        load_config(PolicyRunConfig, [str(path)])


def test_a_user_in_the_address_and_a_header_exclude_each_other() -> None:
    """Before, each request of the run failed: the client refuses both."""
    with pytest.raises(ValueError, match=r"one of the two: a request has one Authorization"):
        config_with(headers={"authorization": "Bearer ${JUDGE}"})


def test_references_survive_the_resolved_config(tmp_path: Path) -> None:
    config = config_with(urls=["https://h/?token=${JUDGE}"], headers={"Authorization": "Bearer ${JUDGE}"})
    path = tmp_path / "config.yaml"
    path.write_text(dump_resolved(config))
    assert load_config(PolicyRunConfig, [str(path)]) == config
    assert secrets.secrets_in(config.model_dump(mode="json")) == {}


@pytest.mark.parametrize(
    "problem",
    [
        f"reward.sources.0.headers=[Bearer {SECRETS[0]}]",
        f"reward.sources.0.header={{Authorization: Bearer {SECRETS[0]}}}",
        f"reward.sources.0.urls=[ftp://me:{SECRETS[0]}@h/]",
        f"reward.sources.0.urls=http://h/?token={SECRETS[0]}",
        f"reward.api_key={SECRETS[0]}",
    ],
)
def test_24_a_problem_with_a_secret_is_told_without_it(
    problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(config_with().model_dump(mode="json", exclude_unset=True)))
    with pytest.raises(SystemExit):
        load_or_exit(PolicyRunConfig, [str(path), problem])
    told = capsys.readouterr().err
    assert "problem" in told and not any(secret in told for secret in SECRETS)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_24_a_secret_is_not_rendered(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: it stood in the ConfigMap, in the script, and in the comment at its top."""
    for config, key in (
        (config_with(), "reward.sources.0.headers.X-Judge"),
        (make_config(launch={"slurm": {"setup": [f"export HF_TOKEN={SECRETS[0]}"]}}), "launch.slurm.setup.0"),
    ):
        with pytest.raises(ConfigError, match="a secret") as refused:
            TARGETS[target](rendering_of(config, ["job.yaml"]))
        assert key in str(refused.value) and not any(secret in str(refused.value) for secret in SECRETS)
    monkeypatch.setenv("JUDGE", SECRETS[0])
    config = config_with(urls=["https://h/"], headers={"Authorization": "Bearer ${JUDGE}"})
    text = TARGETS[target](rendering_of(config, ["job.yaml"]))
    assert SECRETS[0] not in text
    if target == "kuberay":
        assert "Bearer ${JUDGE}" in text
