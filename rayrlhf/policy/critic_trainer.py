"""A second TorchTrainer, the critic's, on a thread of the driver while the actor's runs."""

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
    """While the body trains, so does `trainer`. Whichever fails for good ends the other: `give_up` must end
    the body. Raises `RunFailed` with the reason of the one that failed first.
    """
    failure: list[Exception] = []
    leaving = threading.Event()

    def run() -> None:
        try:
            fit(trainer)
        except Exception as error:
            if not leaving.is_set():  # else we have ended it
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
