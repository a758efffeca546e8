"""Runs the critic's TorchTrainer in a thread of the driver, concurrently with the actor's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rayrlhf.placement.trainer import SlotTorchTrainer
from rayrlhf.runtime.run import RunFailed, fit

JOIN_SECONDS = 60.0  # for a trainer whose loop was asked to end


@contextmanager
def train_concurrently(
    trainer: SlotTorchTrainer, *, role: str, give_up: Callable[[], None]
) -> Iterator[None]:
    """Run `trainer` in a thread while the body trains. When either fails for good, the other is ended too.

    Args:
        role: of the trainer's workers, for messages.
        give_up: called when `trainer` fails; must end the body.

    Raises:
        RunFailed: with the reason of the trainer that failed first.
    """
    failure: list[Exception] = []
    leaving = threading.Event()

    def run() -> None:
        try:
            fit(trainer)
        except Exception as error:
            if not leaving.is_set():  # otherwise it was aborted here
                failure.append(error)
                give_up()

    thread = threading.Thread(target=run, daemon=True, name=f"{role}-trainer")
    thread.start()
    try:
        yield
        thread.join(JOIN_SECONDS)
    except Exception:
        if failure:
            raise RunFailed(f"the {role}'s {failure[0]}") from failure[0]
        raise
    finally:
        leaving.set()
        if thread.is_alive():
            trainer.abort()
            thread.join(JOIN_SECONDS)
