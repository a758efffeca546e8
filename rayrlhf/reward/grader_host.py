"""Host of a grader in its subprocess: grades one answer at a time."""

from __future__ import annotations

import resource
from typing import Any

from rayrlhf.isolation.frames import described
from rayrlhf.reward.graders import GRADERS, UnusableRow

MAX_MEMORY_BYTES = 4 << 30


class GraderHost:
    """Run by `rayrlhf.isolation.host`; `kind` is a key of `GRADERS`."""

    max_calls = 1

    def __init__(self, kind: str) -> None:
        self._grade = GRADERS[kind]()
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))

    async def grade(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"reward": …}, {"failure": reason} if the row or the grader is at fault, or {"unverified": reason}
        if grading the answer needs too many resources.
        """
        try:
            return {"reward": self._grade(request)}
        except UnusableRow as error:
            return {"failure": str(error)}
        except (MemoryError, RecursionError) as error:
            return {"unverified": f"grading it ended in {type(error).__name__}"}
        except Exception as error:
            return {"failure": described(error, (__file__,))}
