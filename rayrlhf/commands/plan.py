"""`rayrlhf plan CONFIG`: placement and memory of every role, whether it fits and what to change."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from rich.table import Table

from rayrlhf.capacity.advice import Fix, Suggestion, fixes, suggest
from rayrlhf.capacity.budget import PUBLICATIONS, Budget, WhatIf, budget_of
from rayrlhf.capacity.gpu_types import GIB, Gpu, parse_gpus
from rayrlhf.capacity.memory import KINDS
from rayrlhf.capacity.micro_batch import sized_for_gpu
from rayrlhf.capacity.model_shape import ShapeUnknown
from rayrlhf.capacity.throughput import step_time_of
from rayrlhf.config.base import ConfigError
from rayrlhf.config.job_kinds import load_any
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import SupervisedConfig
from rayrlhf.placement.plan import plan_job, slots_in_words
from rayrlhf.placement.preset import with_preset
from rayrlhf.terminal import make_console
from rayrlhf.untrusted_text import visible, write_line

FITS, DOES_NOT_FIT, BAD_INPUT = 0, 1, 2


# Returns lines about the architectures of a config's models; passed in by a layer above, as it needs torch.
Architectures: TypeAlias = Callable[[Any], Iterable[str]]


def main(words: Sequence[str], architectures: Architectures = lambda config: ()) -> int:
    """Returns 0 if everything fits or the GPUs are unknown, 1 if it does not fit, 2 for bad input."""
    options, argv = _parser().parse_known_args(list(words))
    try:
        if options.suggest and options.gpus is None:
            print("--suggest needs --gpus, for example --gpus 16xA100-80", file=sys.stderr)
            return BAD_INPUT
        gpus = parse_gpus(options.gpus) if options.gpus else None
        return _Plan(argv, options, gpus, architectures).show()
    except (ConfigError, ShapeUnknown) as error:
        write_line(str(error), sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayrlhf plan",
        usage="%(prog)s CONFIG.yaml [OTHER.yaml ...] [key.path=value ...] [--gpus 16xA100-80] [--suggest]",
        description="Placement and memory of every role, whether it fits and what to change. Starts nothing.",
    )
    parser.add_argument("--gpus", metavar="NxNAME", help="available GPUs, 16xA100-80 or 4x24GB")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="for bytes of host memory (default 8)")
    parser.add_argument(
        "--suggest", action="store_true", help="propose a placement of a policy run on --gpus"
    )
    parser.add_argument("--lora-rank", type=int, help="what if only LoRA adapters of this rank were trained")
    parser.add_argument("--qlora", action="store_true", help="what if the frozen weights were in 4 bits")
    parser.add_argument("--sequence-parallel", type=int, help="what if N ranks split every sequence")
    parser.add_argument("--json", action="store_true", help="numbers for a program, in bytes")
    return parser


class _Plan:
    def __init__(
        self, argv: list[str], options: Any, gpus: tuple[int, Gpu] | None, architectures: Architectures
    ) -> None:
        self.argv = argv
        self.architectures = architectures
        self.options = options
        self.num_gpus, self.gpu = gpus if gpus is not None else (None, None)
        self.what_if = WhatIf(options.lora_rank, options.qlora, options.sequence_parallel)
        self.console = make_console()

    def load(self, overrides: Sequence[str]) -> Any:
        return self._fitted(load_any([*self.argv, *overrides]))

    def _fitted(self, config: Any) -> Any:
        """The config with the values that a driver would fill in on these GPUs."""
        if self.num_gpus is None or self.gpu is None:
            return config
        if not isinstance(config, PolicyRunConfig | SupervisedConfig):
            return config
        num_gpus = self.num_gpus
        return sized_for_gpu(with_preset(config, plan_job, lambda spec: spec.num_slots <= num_gpus), self.gpu)

    def judge(self, config: Any) -> Budget:
        return budget_of(config, gpu=self.gpu, what_if=self.what_if)

    def show(self) -> int:
        stages = list(_stages(self.load([])))
        try:
            budgets = [(name, config, self.judge(config)) for name, config in stages]
        except ShapeUnknown:
            if not self.options.json:
                self._show_architectures(stages)
            raise
        if self.options.json:
            lines = {name: {"architectures": list(self.architectures(config))} for name, config, _ in budgets}
            print(json.dumps({name: _as_json(budget) | lines[name] for name, _, budget in budgets}, indent=2))
        else:
            for name, config, budget in budgets:
                self._show_stage(name, config, budget)
            self._show_architectures(stages)
        if self.options.suggest:
            self._show_suggestion(stages[0][1])
        fits = all(self._has_room(budget) for _, _, budget in budgets)
        return FITS if fits else DOES_NOT_FIT

    def _show_architectures(self, stages: Sequence[tuple[str, Any]]) -> None:
        for line in dict.fromkeys(line for _, config in stages for line in self.architectures(config)):
            self.console.print(visible(line))

    def _has_room(self, budget: Budget) -> bool:
        too_many = self.num_gpus is not None and budget.spec.num_slots > self.num_gpus
        return budget.fits is not False and not too_many

    def _show_stage(self, name: str, config: Any, budget: Budget) -> None:
        say = self.console.print
        say(self._table(name, budget))
        for line in self._slots(budget):
            say(line)
        for line in _what_if_lines(self.what_if):
            say(line)
        if budget.tokens_in_flight:
            say(f"An engine's cache holds {budget.tokens_in_flight:,} tokens of requests in flight.")
        if self.gpu is not None and isinstance(config, PolicyRunConfig) and budget.tokens_in_flight:
            step = step_time_of(config, budget, self.gpu)
            say(
                f"A step at full length: {step.rollout:.0f} s of rollout and {step.update:.0f} s of update, "
                f"by a roofline with assumed utilisations; {step.bottleneck} is the bottleneck."
            )
        say("\nWorking:")
        for line in dict.fromkeys(line for each in budget.roles.values() for line in each.working):
            say(f"  {visible(line)}")
        if not self._has_room(budget) and budget.fits is False:
            self._show_fixes(config)
        say("")

    def _table(self, name: str, budget: Budget) -> Table:
        on = f" on {self.num_gpus} x {self.gpu.name}" if self.gpu else ""
        spec = budget.spec
        title = f"{name}: placement.preset={spec.preset}, {slots_in_words(spec.num_slots)}{on}; GiB per slot"
        table = Table(title=title, title_justify="left")
        table.add_column("role")
        table.add_column("slots")
        kinds = [kind for kind in KINDS if any(kind in each.device for each in budget.roles.values())]
        for kind in (*kinds, "total", "host"):
            table.add_column(kind.replace("_", " "), justify="right")
        for plan in budget.spec.roles:
            each = budget.roles[plan.role]
            sizes = [each.device.get(kind, 0) for kind in kinds]
            table.add_row(
                plan.role,
                _ranges([slot for unit in plan.units for slot in unit]),
                *(_gib(size) if size else "" for size in (*sizes, each.total, each.host_total)),
            )
        return table

    def _slots(self, budget: Budget) -> Iterator[str]:
        """One line per pool: the fullest phase of its fullest slot, compared with a GPU's memory."""
        for pool in budget.spec.pools:
            slots = range(pool.slots[0], pool.slots[-1] + 1)
            worst = max(slots, key=lambda slot: budget.peak_bytes[slot])
            phases = {phase: sizes[worst] for phase, sizes in budget.phases.items()}
            peaks = ", ".join(
                _gib(size) + ("" if phase == "always" else f" {phase}") for phase, size in phases.items()
            )
            line = f"{_slots(list(slots))} ({pool.name}): {peaks} GiB at most"
            if budget.gpu is not None:
                usable = budget.gpu.usable_bytes
                left = usable - budget.peak_bytes[worst]
                line += f" of {_gib(usable)} usable: " + (
                    f"fits, {_gib(left)} to spare" if left >= 0 else f"does NOT fit, {_gib(-left)} too much"
                )
            yield line + "."
        if self.num_gpus is not None and budget.spec.num_slots > self.num_gpus:
            yield f"{slots_in_words(budget.spec.num_slots)} do NOT fit on {self.num_gpus} GPUs."
        node = self.options.gpus_per_node
        hosts = [sum(budget.host_bytes[i : i + node]) for i in range(0, len(budget.host_bytes), node)]
        if any(hosts):
            yield f"Host memory of the fullest node ({slots_in_words(node)} each): {_gib(max(hosts))} GiB."
        if budget.published_bytes:
            yield (
                f"Of it, on the first trainer's node: {PUBLICATIONS} x {_gib(budget.published_bytes)} GiB of "
                "weights on their way to the engines."
            )

    def _show_fixes(self, config: Any) -> None:
        found = fixes(config, self.load, self.judge)
        if not found:
            self.console.print(
                "\nNo change of up to three settings makes it fit: it needs more or larger GPUs."
            )
            return
        self.console.print("\nThe cheapest ways to make it fit:")
        for fix in found:
            self.console.print("  " + _fix_text(fix))

    def _show_suggestion(self, config: Any) -> None:
        if not isinstance(config, PolicyRunConfig):
            self.console.print(
                "--suggest is for policy runs; this job has only trainers: set train.num_workers."
            )
            return
        assert self.num_gpus is not None and self.gpu is not None
        found = suggest(config, self.num_gpus, self.gpu, self.load, self.judge)
        if found is None:
            self.console.print(f"No candidate placement fits on {self.num_gpus} x {self.gpu.name}.")
            return
        self.console.print(_suggestion_text(found))


def _stages(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, config) of a chain's two kinds of stages, or of the job itself."""
    if hasattr(config, "generate_config"):
        yield "generate", config.generate_config(1, config.model.path)
        yield "train", config.training_config(1, config.model.path)
    else:
        yield getattr(config, "job", None) or "ppo", config


def _what_if_lines(what_if: WhatIf) -> Iterator[str]:
    if what_if.lora_rank is not None:
        yield f"What if: only LoRA adapters of rank {what_if.lora_rank} are trained."
    if what_if.quantized:
        yield "What if: only adapters are trained, on weights in 4 bits."
    if what_if.sequence_parallel is not None:
        yield f"What if: {what_if.sequence_parallel} ranks split every sequence."


def _fix_text(fix: Fix) -> str:
    return (
        f"{' '.join(fix.overrides)}  ({_gib(max(fix.budget.peak_bytes))} GiB at most; "
        f"a step takes about {fix.slowdown:.2f} times as long)"
    )


def _suggestion_text(found: Suggestion) -> str:
    tree: dict[str, dict[str, str]] = {}
    for override in found.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    size, seconds = _gib(max(found.budget.peak_bytes)), f"{found.seconds:.0f}"
    lines = [f"# Suggested: {size} GiB at most, a step of about {seconds} s (a roofline)"]
    for section, values in tree.items():
        lines.append(f"{section}:")
        lines += [f"  {name}: {value}" for name, value in values.items()]
    return "\n".join(lines)


def _as_json(budget: Budget) -> dict[str, Any]:
    return {
        "preset": budget.spec.preset,
        "roles": {
            plan.role: {
                "units": plan.units,
                "device_bytes": dict(budget.roles[plan.role].device),
                "host_bytes": dict(budget.roles[plan.role].host),
            }
            for plan in budget.spec.roles
        },
        "phases": budget.phases,
        "usable_bytes": budget.gpu.usable_bytes if budget.gpu else None,
        "fits": budget.fits,
        "tokens_in_flight": budget.tokens_in_flight,
        "published_bytes": budget.published_bytes,
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 20 or size == 0 else f"{size / GIB:.3f}"


def _slots(slots: Sequence[int]) -> str:
    return f"Slot{'s' if len(slots) > 1 else ''} {_ranges(slots)}"


def _ranges(slots: Sequence[int]) -> str:
    """`0-3, 6`."""
    parts: list[list[int]] = []
    for slot in sorted(set(slots)):
        if parts and slot == parts[-1][-1] + 1:
            parts[-1].append(slot)
        else:
            parts.append([slot])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
