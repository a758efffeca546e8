"""The process of one step: `python -m benchmarks.gpu_check.child MODULE:FUNCTION --device cpu --answer FILE`.

The last line of the answer says whether the step reached its end or cannot run here. On SIGTERM, which the
runner sends at the deadline, the stacks of all threads are printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import signal
from pathlib import Path

from benchmarks.gpu_check.step import Context, Skip


def main() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--answer", type=Path, required=True)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--cumem", type=Path)
    options = parser.parse_args()
    module, _, name = options.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        function(Context(options.device, options.answer, options.traces, options.cumem))
        end = {"end": "ok"}
    except Skip as skip:
        end = {"end": "skipped", "reason": str(skip)}
    with options.answer.open("a") as file:
        file.write(json.dumps(end) + "\n")


if __name__ == "__main__":
    main()
