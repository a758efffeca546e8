"""One line for what Ray Train says in pages: who failed, why, and what is done."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from rayrlhf.runtime import worker_failures
from rayrlhf.runtime.worker_failures import WorkerFailures


def failures(**options: int) -> WorkerFailures:
    return WorkerFailures("board", role="actor", **{"max_failures": 2, "saved_step": 4, **options})


def died(text: str = "The actor died unexpectedly before finishing this task.") -> Exception:
    error = ActorDiedError()
    error.error_msg = text
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: …", error)


def raised(error: BaseException) -> Exception:
    return UserExceptionWithTraceback(
        error, "Traceback (most recent call last):\n  File …\n\x1b[36mmore\x1b[39m"
    )


def test_a_killed_worker_is_named_and_those_that_fail_for_want_of_it_are_not() -> None:
    both = {0: raised(RuntimeError("Connection closed by peer [127.0.0.1]:4242")), 1: died()}
    assert failures().failed_workers(both) == (
        "actor worker 1 died (its process was killed or crashed; out of host memory is the usual reason)"
    )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("The actor died because its node has died. Node Id: 4f", "its node was lost"),
        ("Task was killed due to the node running low on memory.", "the node was running low on memory"),
    ],
)
def test_how_a_worker_died(text: str, cause: str) -> None:
    assert cause in failures().failed_workers({0: died(text)})


class Board:
    """Stands for the reporter; keeps what is said."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str, str]] = []

    def __call__(self, board: str, rank: int) -> Board:
        return self

    def failure(self, step: int, what: str, then: str) -> None:
        self.said.append((step, what, then))

    def flush(self) -> None: ...


def test_a_node_that_was_taken_away_is_reported_once_and_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray Train finds the dead worker at every look until the deadline, ten times a second."""
    board = Board()
    monkeypatch.setattr(worker_failures, "Reporter", board)

    def taken_away(actor: str) -> Exception:
        error = ActorDiedError()
        error.actor_id, error._preempted = actor, True
        return WorkerHealthCheckFailedError("A worker health check failed.", error)

    reports = failures(max_failures=1)
    for _ in range(3):
        others = raised(RuntimeError("Connection closed by peer [127.0.0.1]:4242"))
        reports.after_exception(None, {0: others, 1: taken_away("a")})
    assert board.said == [
        (
            4,
            "actor worker 1 died (its node was taken away)",
            "after the deadline of its notice the workers start again from step 4 (train.max_failures counts "
            "only other failures)",
        )
    ]
    reports.after_exception(None, {1: taken_away("b")})
    assert len(board.said) == 2, "its successor's node, too"
    reports.after_exception(None, {0: died()})
    assert board.said[-1][2].endswith("(restart 1 of train.max_failures=1)")


def test_an_exception_is_its_last_line_without_traceback_or_escape_codes() -> None:
    error = ValueError("\x1b[36mray::remote()\x1b[39m\nTraceback …\nValueError: bad shape")
    assert failures().failed_workers({2: raised(error), 3: raised(error)}) == (
        "actor worker 2 failed (ValueError: bad shape)"
    )
    assert failures().failed_workers({0: raised(ZeroDivisionError())}) == (
        "actor worker 0 failed (ZeroDivisionError())"
    )


def test_a_worker_that_does_not_answer() -> None:
    text = failures().failed_workers(
        {0: WorkerHealthCheckTimeoutError("A worker health check has been hanging")}
    )
    assert text.startswith("actor worker 0 failed (WorkerHealthCheckTimeoutError: ")
    assert "\n" not in text


def test_what_is_done_about_it() -> None:
    reports = failures(max_failures=1)
    reports.num_failures = 1
    assert reports.reaction() == ("the workers start again from step 4 (restart 1 of train.max_failures=1)")
    reports.after_report(None, [{"step": 6}], checkpoint=object())
    assert "from step 6 " in reports.reaction()
    reports.num_failures = 2
    assert reports.reaction() == "the run ends: train.max_failures=1 restarts are used up"
    fresh = failures(saved_step=0)
    fresh.num_failures = 1
    assert "from the beginning, nothing was saved" in fresh.reaction()
