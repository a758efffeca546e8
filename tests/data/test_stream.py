"""The plan of a run, and that Ray Data and the workers follow it."""

from __future__ import annotations

import tracemalloc
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.batch_plan import PromptPlan
from rayrlhf.data.store import PROMPT_FIELDS, PROMPT_SCHEMA, ArrowRows, PromptStore, in_order, write_tables
from rayrlhf.data.stream import iter_prompts, prompt_dataset, step_ranges


def prompt_plan(
    num_rows: int, prompts_per_step: int, num_steps: int, world_size: int, seed: int, shuffle: bool = True
) -> np.ndarray:
    return PromptPlan(num_rows, prompts_per_step, num_steps, world_size, seed, shuffle).rows(0, num_steps)


@pytest.mark.parametrize(
    "num_rows, prompts_per_step, plan",
    [
        (4, 2, [[0, 1], [2, 3], [0, 1]]),  # epochs that end with a step
        (5, 2, [[0, 1], [2, 3], [4, 0], [1, 2]]),  # steps that run on into the next epoch
        (3, 2, [[0, 1], [2, 0], [1, 2]]),
        (4, 3, [[0, 1, 2], [3, 0, 1], [2, 3, 0]]),
        (2, 5, [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]),  # fewer rows than a step takes: they must repeat
    ],
)
def test_without_shuffle_rows_come_in_order(
    num_rows: int, prompts_per_step: int, plan: list[list[int]]
) -> None:
    found = prompt_plan(num_rows, prompts_per_step, len(plan), 1, seed=0, shuffle=False)
    assert found.tolist() == [[step] for step in plan]


def test_ranks_share_a_step_in_turn() -> None:
    plan = prompt_plan(8, 4, 2, 2, seed=0, shuffle=False)
    assert plan.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_the_seed_and_the_epoch_decide_the_order() -> None:
    first, second = prompt_plan(20, 20, 2, 1, seed=0)[:, 0].tolist()
    other = prompt_plan(20, 20, 1, 1, seed=1)[0, 0].tolist()
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(20))}) == 4
    assert first == np.random.default_rng([0, 0]).permutation(20).tolist()  # as documented
    assert second == np.random.default_rng([0, 1]).permutation(20).tolist()


@given(
    num_rows=st.integers(1, 40),
    per_rank=st.integers(1, 6),
    world_size=st.integers(1, 4),
    num_steps=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_properties_of_a_plan(
    num_rows: int, per_rank: int, world_size: int, num_steps: int, seed: int, shuffle: bool
) -> None:
    prompts_per_step = per_rank * world_size
    plan = prompt_plan(num_rows, prompts_per_step, num_steps, world_size, seed, shuffle)
    assert plan.shape == (num_steps, world_size, per_rank)
    flat = plan.reshape(-1)
    for start in range(0, len(flat) - num_rows + 1, num_rows):
        assert sorted(flat[start : start + num_rows]) == list(range(num_rows)), "an epoch has every row once"
    if num_rows >= prompts_per_step:
        assert all(len(set(step.tolist())) == prompts_per_step for step in plan.reshape(num_steps, -1))
    one_worker = prompt_plan(num_rows, prompts_per_step, num_steps, 1, seed, shuffle)
    assert one_worker.reshape(-1).tolist() == flat.tolist()
    longer = prompt_plan(num_rows, prompts_per_step, num_steps + 3, world_size, seed, shuffle)
    assert longer[:num_steps].tolist() == plan.tolist()
    lazy = PromptPlan(num_rows, prompts_per_step, num_steps, world_size, seed, shuffle)
    for start in range(num_steps):  # wherever it is looked into
        assert lazy.rows(start, num_steps).tolist() == plan[start:].tolist()


def test_19_a_plan_of_hundreds_of_millions_of_steps_takes_no_memory() -> None:
    PromptPlan(1000, 64, 40, 8, seed=0).rows(0, 40)  # what numpy imports is no part of it
    tracemalloc.start()
    plan = PromptPlan(1000, 64, 500_000_000, 8, seed=0)
    late = plan.rows(499_999_990, 500_000_000)
    few = PromptPlan(100, 64, 500_000_000, 8, seed=0).rows(499_999_999, 500_000_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert late.shape == (10, 8, 8) and len(set(few.reshape(-1).tolist())) == 64
    assert most < 1 << 20


def test_19_blocks_of_a_long_run_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In numbers that are easy to follow: 10 blocks, of 64 rows at most, up to 100 blocks, then 256 rows."""
    limits = {"MAX_BLOCKS": 10, "BLOCK_ROWS": 64, "MAX_LONG_BLOCKS": 100, "MAX_BLOCK_ROWS": 256}
    for name, limit in limits.items():
        monkeypatch.setattr(f"rayrlhf.data.stream.{name}", limit)

    def found(num_steps: int, world_size: int = 1) -> tuple[int, int]:
        blocks = [block.to_pylist()[0] for block in step_ranges(5, 5 + num_steps, world_size, 8)]
        steps = [block["last"] - block["first"] for block in blocks if block["rank"] == world_size - 1]
        assert sum(steps) == num_steps
        return len(blocks), max(steps) * 8 // world_size

    assert found(5) == (5, 8)
    assert found(80) == (10, 64)
    assert found(81) == (11, 64)
    assert found(80, world_size=2) == (10, 64)
    assert found(800) == (100, 64)
    assert found(3200) == (100, 256)
    with pytest.raises(ValueError, match=r"3201 steps of 8 rows are more than a stream .*train.num_steps"):
        found(3201)


@pytest.mark.parametrize(
    "num_rows, prompts_per_step, world_size, message",
    [(0, 2, 1, "at least one row"), (9, 3, 2, "is not divisible by 2"), (9, 0, 1, "prompts_per_step=0")],
)
def test_plans_that_cannot_be_made(
    num_rows: int, prompts_per_step: int, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_plan(num_rows, prompts_per_step, 1, world_size, seed=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PromptStore:
    """Fifty rows; row i is i + 1 times the token i and the text "row i"."""
    folder = tmp_path_factory.mktemp("store")
    rows = [
        {"prompt_ids": [i] * (i + 1), "prompt": f"row {i}", "columns_json": f'{{"label": {i}}}'}
        for i in range(50)
    ]
    table = pa.Table.from_pylist(rows, pa.schema(PROMPT_FIELDS))
    with pa.OSFile(str(folder / "spool"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    tables = in_order(ArrowRows(folder / "spool"), np.arange(50))
    write_tables(tables, PROMPT_SCHEMA, {"rows": 50}, "", folder / "store.arrow")
    return PromptStore.open(folder / "store.arrow")


class FakeShard:
    """What a worker reads from, without Ray: gives tables of `batch_size` rows of one."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, *, batch_size: int, **_: Any) -> Any:
        return (self.table.slice(start, batch_size) for start in range(0, len(self.table), batch_size))


def planned_table(store: PromptStore, step: list[int], rank: list[int], slot: list[int]) -> Any:
    table = store.take(range(len(step)))
    for name, values in {"step": step, "rank": rank, "slot": slot}.items():
        table = table.append_column(name, pa.array(values))
    return cast(Any, FakeShard(table))


def test_a_worker_gets_its_prompts_step_by_step(store: PromptStore) -> None:
    shard = planned_table(store, step=[7, 7, 8, 8], rank=[1] * 4, slot=[2, 3, 2, 3])
    steps = list(iter_prompts(shard, rank=1, per_rank=2, start_step=7))
    assert [(step, [prompt.row_id for prompt in prompts]) for step, prompts in steps] == [
        (7, [0, 1]),
        (8, [2, 3]),
    ]
    assert steps[1][1][0] == store[2]


@pytest.mark.parametrize(
    "step, rank, slot, name",
    [
        ([7, 8], [1, 1], [2, 3], "step"),
        ([8, 8], [1, 1], [2, 3], "step"),
        ([7, 7], [1, 0], [2, 3], "rank"),
        ([7, 7], [1, 1], [3, 2], "slot"),
        ([7], [1], [2], "step"),  # a row is missing
    ],
)
def test_a_worker_notices_what_is_not_as_planned(
    store: PromptStore, step: list[int], rank: list[int], slot: list[int], name: str
) -> None:
    shard = planned_table(store, step, rank, slot)
    with pytest.raises(AssertionError, match=f"rank 1 at step 7: planned {name}"):
        list(iter_prompts(shard, rank=1, per_rank=2, start_step=7))


def test_there_must_be_a_step_left(store: PromptStore) -> None:
    with pytest.raises(ValueError, match="start_step=2 of a plan with 2 steps"):
        prompt_dataset(store.file, PromptPlan(50, 4, 2, 2, seed=0), start_step=2)


@pytest.mark.ray
@pytest.mark.parametrize("start_step, max_blocks", [pytest.param(0, 4096, marks=pytest.mark.long), (9, 10)])
@pytest.mark.usefixtures("ray_session")
def test_two_workers_get_the_plan(
    store: PromptStore, start_step: int, max_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a later step, with several steps in a block (18 in 10 blocks), and with no CPU left."""
    import ray

    monkeypatch.setattr("rayrlhf.data.stream.MAX_BLOCKS", max_blocks)
    plan = PromptPlan(50, 6, 18, 2, seed=3)  # 108 rows: two epochs and a bit
    planned = plan.rows(0, 18)

    @ray.remote(num_cpus=2)  # of 4: the workers take them all, and the prompts must come nevertheless
    class Worker:
        def read(self, shard: Any, rank: int) -> list[tuple[int, list[tuple[int, list[int], str, dict]]]]:
            return [
                (step, [(p.row_id, p.prompt_ids, p.prompt, p.columns) for p in prompts])
                for step, prompts in iter_prompts(shard, rank, 3, start_step)
            ]

    shards = prompt_dataset(store.file, plan, start_step).streaming_split(2, equal=True)
    workers = [Worker.remote() for _ in shards]
    reads = [
        worker.read.remote(shard, rank)
        for rank, (worker, shard) in enumerate(zip(workers, shards, strict=True))
    ]
    for rank, steps in enumerate(ray.get(reads, timeout=240)):
        assert steps == [
            (
                step,
                [
                    (row, [row] * (row + 1), f"row {row}", {"label": row})
                    for row in planned[step, rank].tolist()
                ],
            )
            for step in range(start_step, 18)
        ]
