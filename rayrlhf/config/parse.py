"""Loads and validates a configuration from the command line; reports all problems at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import ValidationError

from rayrlhf.config.base import ConfigError, Problem, Section
from rayrlhf.config.errors import explain
from rayrlhf.config.help import help_text
from rayrlhf.config.other_job import other_job
from rayrlhf.config.yaml_tree import COMMAND_LINE, read_tree, write_tree
from rayrlhf.migration.other_keys import option_problem
from rayrlhf.secrets import masked_tree, remember_all
from rayrlhf.untrusted_text import write_line

S = TypeVar("S", bound=Section)


def load_config(schema: type[S], argv: Sequence[str]) -> S:
    """The configuration of `argv`: YAML files merged from left to right, then `key.path=value` overrides.

    `--help` prints the key reference and raises `SystemExit(0)`. Raises `ConfigError` with all problems.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(schema, _program()))
        raise SystemExit(0)
    if not argv:
        fix = f"{_program()} CONFIG.yaml [key.path=value ...]; --help lists the keys"
        raise ConfigError([Problem("the command line", "nothing", "at least one YAML file", fix)])
    tree = read_tree(argv)
    problems = [option_problem(schema, *option, COMMAND_LINE) for option in tree.options] + tree.problems
    wrong_job = None if tree.unreadable else other_job(schema, tree.values)
    if wrong_job is not None:
        problems.append(wrong_job)  # instead of a problem per key that the two jobs do not share
    elif not tree.unreadable:
        try:
            config = schema.model_validate(tree.values)
            if not problems:
                remember_all(config.model_dump(mode="json"))
                return config
        except ValidationError as error:
            reported = {problem.path for problem in problems}
            problems += [p for p in explain(error, schema, tree.values) if p.path not in reported]
    remember_all(tree.values)  # problems quote values, which may be secrets
    placed = [replace(p, where=p.where or tree.places.get(p.path, "")) for p in problems]
    raise ConfigError(placed, tree.source)


def load_or_exit(schema: type[S], argv: Sequence[str]) -> S:
    """`load_config`, for a job: problems go to stderr and the process ends with exit code 2."""
    try:
        return load_config(schema, argv)
    except ConfigError as error:
        write_line(str(error), sys.stderr)
        sys.exit(2)


def dump_resolved(config: Section, *, without: Iterable[str] = ()) -> str:
    """The whole configuration as YAML, defaults included; loading it gives an equal one. Literal secrets are
    `***`, with which it cannot be loaded; `${VARIABLE}` stays.

    Args:
        without: keys to leave out, such as train.max_tokens_per_micro_batch.
    """
    tree = masked_tree(config.model_dump(mode="json"))
    for key in without:
        section, _, name = key.rpartition(".")
        del tree[section][name]
    return write_tree(tree)


def _program() -> str:
    return f"python {os.path.relpath(sys.argv[0])}" if sys.argv[0] else "python job.py"
