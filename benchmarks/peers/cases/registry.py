"""All cases, in the order of the table."""

from __future__ import annotations

from benchmarks.peers.cases import engines, policy, preference, sft
from benchmarks.peers.cases.case import Case

CASES: dict[str, Case] = {
    case.name: case for module in (sft, preference, policy, engines) for case in module.CASES
}
