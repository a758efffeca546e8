"""`rayrlhf render --target TARGET CONFIG`: launcher script or manifest of a job. Starts nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rayrlhf.commands.render.anyscale import render_anyscale
from rayrlhf.commands.render.kuberay import render_kuberay
from rayrlhf.commands.render.rendering import Rendering, rendering_of
from rayrlhf.commands.render.scripts import render_local, render_ray_job, render_slurm
from rayrlhf.config.base import ConfigError
from rayrlhf.config.job_kinds import load_any
from rayrlhf.untrusted_text import write_line

TARGETS: dict[str, Callable[[Rendering], str]] = {
    "local": render_local,
    "ray-job": render_ray_job,
    "kuberay": render_kuberay,
    "anyscale": render_anyscale,
    "slurm": render_slurm,
}


def main(words: Sequence[str]) -> int:
    """Returns 0, or 2 for bad input."""
    options, argv = _parser().parse_known_args(list(words))
    try:
        text = TARGETS[options.target](rendering_of(load_any(argv), argv))
    except ConfigError as error:
        write_line(str(error), sys.stderr)
        return 2
    if options.out is None:
        print(text, end="")
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    if text.startswith("#!"):
        mode = options.out.stat().st_mode
        options.out.chmod(mode | (mode & 0o444) >> 2)  # executable for those who may read it
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayrlhf render",
        usage="%(prog)s --target TARGET CONFIG.yaml [OTHER.yaml ...] [key.path=value ...] [--out FILE]",
        description="Launcher script or manifest of a job. The config's section launch names the machines.",
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write this file instead of printing")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
