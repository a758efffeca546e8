"""One grader at work: `python -m rayrlhf.reward.grader_process KIND`.

It says `ready`, then answers each line on stdin, a request, with a line on stdout: {"reward": …} or
{"failure": why}. It ends with its stdin, and by a signal when a request takes longer than its
`deadline_seconds`: whoever asked has given it up by then, and may be gone itself.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys

from rayrlhf.reward.graders import GRADERS, UnusableRow

MAX_MEMORY_BYTES = 4 << 30
SPARE_SECONDS = 5  # beyond the deadline that the one who asked keeps himself


def main(kind: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    grade = GRADERS[kind]()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(math.ceil(request["deadline_seconds"]) + SPARE_SECONDS)
        try:
            answer = {"reward": grade(request)}
        except UnusableRow as error:
            answer = {"failure": str(error)}
        except Exception as error:
            answer = {"failure": f"{type(error).__name__}: {error}"}
        signal.alarm(0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
