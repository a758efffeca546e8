"""Chooses the rows of each step such that they pack: pure functions of lengths, order and sizes.

The rows of an epoch are a permutation. Taken in its order, the last micro-batch of each rank is partly empty;
here a step takes some rows from a little further on, so that its micro-batches are full.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rayrlhf.data.packing import micro_batches

# A micro-batch takes its rows in order while this share of it is free, and is completed from the window.
CLOSING_SHARE = 0.3
MOST_SKIPPED = 24  # rows that do not fit before it is completed in any case
OLDEST_TRIED = 24  # rows that complete a micro-batch together with the best fit to what they leave
GOOD_GAP = 1 / 256  # of a micro-batch, with which the search ends
LOWEST_FILL = 0.975  # that steps of a given number of rows aim for
SLACKS = (0.006, 0.014, 0.022)  # shares of a step's room, left free so that a given number of rows packs
SWAP_OUT, SWAP_IN = 48, 384  # rows considered for an exchange: of the step, and after it
SWAP_STEPS = 4  # … and no more than these steps' rows after it
TOLERANCE = 0.002  # of a step's tokens
Packs = list[list[int]]  # row ids of each micro-batch
_LOW = (1 << 32) - 1  # of a key: the position in the epoch, inverted so that older rows are larger


@dataclass
class _Waiting:
    """The rows of an epoch that are in no step yet; those in the window can be chosen.

    The window has the positions from the oldest waiting row's to `look_ahead` - 1 after it.
    """

    order: np.ndarray  # rows of the epoch, by position
    lengths: np.ndarray  # [all rows]
    look_ahead: int
    window: OrderedDict[int, int] = field(default_factory=OrderedDict)  # length by position, oldest first
    keys: list[int] = field(default_factory=list)  # the same, ascending by length, then from new to old
    end: int = 0  # position after the window's last

    def refill(self) -> None:
        oldest = next(iter(self.window), self.end)
        stop = min(len(self.order), oldest + self.look_ahead)
        if stop <= self.end:
            return
        positions = range(self.end, stop)
        new = dict(zip(positions, self.lengths[self.order[self.end : stop]].tolist(), strict=True))
        self.window.update(new)
        self.keys += [_key(length, position) for position, length in new.items()]
        self.keys.sort()
        self.end = stop

    def best_fit(self, room: int) -> int | None:
        """Key of the longest row of at most `room` tokens, the oldest of these."""
        index = bisect_right(self.keys, (room << 32) | _LOW)
        return self.keys[index - 1] if index else None

    def take(self, position: int) -> int:
        """Removes a row from the window; returns its length."""
        length = self.window.pop(position)
        del self.keys[bisect_left(self.keys, _key(length, position))]
        return length

    def rows(self, positions: Sequence[int]) -> list[int]:
        return [int(self.order[position]) for position in positions]

    def left(self) -> np.ndarray:
        """All waiting rows, in their order."""
        return np.concatenate([self.order[list(self.window)], self.order[self.end :]])

    def __bool__(self) -> bool:
        return bool(self.window) or self.end < len(self.order)


def _key(length: int, position: int) -> int:
    return (length << 32) | (_LOW - position)


def _position(key: int) -> int:
    return _LOW - (key & _LOW)


def fill_one(waiting: _Waiting, room: int, budget_tokens: int) -> list[int]:
    """Takes rows for the `room` tokens that a micro-batch has left; returns their positions.

    The oldest row is first where it fits, as it always does into an empty micro-batch; then rows follow in
    order, and the last ones are chosen from the window to leave the least room.
    """
    taken: list[int] = []
    waiting.refill()
    closing = int(budget_tokens * CLOSING_SHARE)
    skipped = 0
    for position, length in list(waiting.window.items()):
        if length <= room and (room - length >= closing or (not taken and room == budget_tokens)):
            room -= waiting.take(position)
            taken.append(position)
        else:
            skipped += 1
        if room < closing or skipped == MOST_SKIPPED:
            break
    while room > 0:
        chosen = _completing(waiting, room, budget_tokens)
        if not chosen:
            break
        for position in chosen:
            room -= waiting.take(position)
        taken += chosen
    return taken


def _first(window: OrderedDict[int, int], count: int) -> Iterator[tuple[int, int]]:
    for item, _ in zip(window.items(), range(count), strict=False):
        yield item


def _completing(waiting: _Waiting, room: int, budget_tokens: int) -> list[int]:
    """One or two positions whose rows nearly fill `room`; none if no row fits."""
    best = waiting.best_fit(room)
    if best is None:
        return []
    chosen, gap = [_position(best)], room - (best >> 32)
    good = int(budget_tokens * GOOD_GAP)
    if gap <= good:
        return chosen
    for position, length in _first(waiting.window, OLDEST_TRIED):
        if length >= room:
            continue
        other = waiting.best_fit(room - length)
        if other is None or _position(other) == position:
            continue
        left = room - length - (other >> 32)
        if left < gap:
            chosen, gap = [position, _position(other)], left
            if gap <= good:
                break
    return chosen


def packed_steps(
    orders: Iterator[np.ndarray],
    lengths: np.ndarray,
    *,
    budget_tokens: int,
    packs_per_step: int,
    look_ahead: int,
) -> Iterator[Packs]:
    """Steps of `packs_per_step` micro-batches each, through the epochs' `orders` of row ids.

    `lengths` [all rows]. Every row occurs once per epoch, and an epoch begins when the one before it is used
    up. No row occurs twice within a step: in a step that spans two epochs, repeated rows wait for the next
    step. A step ends early where only such rows are left, and the last one where the data end.

    No row is taken before one that stands `look_ahead` or more places before it in its epoch, except for
    repeated ones. Every micro-batch begins with the oldest waiting row, so that a row in the window waits for
    at most `look_ahead` micro-batches.
    """
    waiting = _Waiting(next(orders), lengths, look_ahead)
    while waiting:
        packs: Packs = []
        repeated: np.ndarray | None = None  # rows of the next epoch that the step has from this one
        while len(packs) < packs_per_step and waiting:
            pack = waiting.rows(fill_one(waiting, budget_tokens, budget_tokens))
            if not waiting and repeated is None and (order := next(orders, None)) is not None:
                is_repeated = np.isin(order, [row for rows in [*packs, pack] for row in rows])
                repeated, waiting = order[is_repeated], _Waiting(order[~is_repeated], lengths, look_ahead)
                room = budget_tokens - int(lengths[pack].sum())
                pack += waiting.rows(fill_one(waiting, room, budget_tokens))
            packs.append(pack)
        if repeated is not None:
            waiting = _Waiting(np.concatenate([repeated, waiting.left()]), lengths, look_ahead)
        yield packs


def filling_sizes(mean: float, std: float, samples: int, unit_tokens: int) -> bool:
    """Whether steps of `samples` rows can have nearly a multiple of `unit_tokens` tokens without bias.

    That is so if the mean step has such a number, or if alternating between the multiples below and above it
    varies no more than random steps do: by one standard deviation, and by two at most. `mean` and `std` are
    those of the rows' lengths.
    """
    wanted, spread = samples * mean, std * math.sqrt(samples)
    below, above = _neighbours(wanted, unit_tokens)
    if below >= wanted or above <= wanted:
        return True
    under, over = wanted - below, above - wanted
    return below > 0 and under * over <= spread**2 and max(under, over) <= 2 * spread


def _neighbours(wanted: float, unit_tokens: int) -> tuple[float, float]:
    """The nearest numbers of tokens at most and at least `wanted` that fill a multiple of `unit_tokens`;
    both are `wanted` if it does so itself.
    """
    units = math.floor(wanted / unit_tokens)
    full, lowest = (1 - SLACKS[0]) * unit_tokens, LOWEST_FILL * unit_tokens
    if units and units * lowest <= wanted <= units * full:
        return wanted, wanted
    if wanted >= (units + 1) * lowest:
        return min(wanted, (units + 1) * full), max(wanted, (units + 1) * lowest)
    return units * full, (units + 1) * lowest


def counted_steps(
    order: np.ndarray, lengths: np.ndarray, *, samples_per_step: int, budget_tokens: int, world_size: int
) -> Iterator[tuple[list[int], Packs | None]]:
    """Steps of exactly `samples_per_step` rows whose micro-batches are full on every rank: (rows, packs).

    `order`: the row ids of some steps of one epoch, a multiple of `samples_per_step`; the result has the same
    rows. A step takes the next rows, and exchanges a few of them for others from the window, until its tokens
    are nearly a multiple of what all ranks' micro-batches hold. The multiples follow the window's mean: what
    a step has more or fewer tokens than usual there, the next ones have fewer or more. A row that was
    exchanged goes into the next step, so none is more than `SWAP_STEPS` steps early or `SWAP_STEPS` + 1 late.
    `packs` is None where the rows do not pack; all steps are in their order if `filling_sizes` says no.
    """
    unit = budget_tokens * world_size
    ours = lengths[order]
    mean, std = float(ours.mean()), float(ours.std())
    if not filling_sizes(mean, std, samples_per_step, unit):
        for start in range(0, len(order), samples_per_step):
            yield order[start : start + samples_per_step].tolist(), None
        return
    end, owed = samples_per_step + min(SWAP_IN, SWAP_STEPS * samples_per_step), 0.0
    window, deferred = order[:end], 0
    for _ in range(len(order) // samples_per_step):
        usual = samples_per_step * float(lengths[window].mean())
        desired = usual + owed
        below, above = _neighbours(desired, unit)
        target = below if below > 0 and desired - below <= above - desired else above
        units = math.ceil(target / unit)
        chosen = _Exchange(window, lengths, samples_per_step, deferred, std)
        packs = None
        for slack in SLACKS:
            chosen.bring_to(min(target, (1 - slack) * units * unit))
            rows = chosen.rows()
            found = micro_batches(lengths[rows].tolist(), budget_tokens)
            if len(found) <= units * world_size:
                packs = [[rows[index] for index in pack] for pack in found]
                break
        rows = chosen.rows()
        owed += usual - int(lengths[rows].sum())
        yield rows, packs
        left, deferred = chosen.left()
        window = np.concatenate([left, order[end : end + samples_per_step]])
        end += samples_per_step


class _Exchange:
    """A step's rows among those of a window: the first ones, with some exchanged for later ones."""

    def __init__(
        self, window: np.ndarray, lengths: np.ndarray, count: int, deferred: int, std: float
    ) -> None:
        """The first `deferred` rows of the window must be in the step."""
        self.window, self.count, self.std = window, count, std
        self.lengths = lengths[window]
        self.is_in = np.arange(len(window)) < count
        self.may_leave = np.arange(max(deferred, count - SWAP_OUT), min(count, len(window)))
        self.may_enter = np.arange(count, len(window))

    def bring_to(self, target: float) -> None:
        """Exchanges rows until the step has nearly `target` tokens, or no exchange brings it nearer."""
        swaps = 6 + math.isqrt(self.count)  # random sums differ by more where there are more rows
        for done in range(swaps):
            gap = target - float(self.lengths[self.is_in].sum())
            if abs(gap) <= max(1.0, TOLERANCE * target) or not len(self.may_leave) or not len(self.may_enter):
                return
            # Several exchanges of usual rows rather than one of the longest for the shortest.
            aim = gap / min(swaps - done, max(1, math.ceil(abs(gap) / max(1.0, self.std))))
            change = self.lengths[self.may_enter][None, :] - self.lengths[self.may_leave][:, None]
            leaving, entering = divmod(int(np.abs(change - aim).argmin()), len(self.may_enter))
            if abs(gap - float(change[leaving, entering])) >= abs(gap):
                return
            self.is_in[self.may_leave[leaving]] = False
            self.is_in[self.may_enter[entering]] = True
            self.may_leave = np.delete(self.may_leave, leaving)
            self.may_enter = np.delete(self.may_enter, entering)

    def rows(self) -> list[int]:
        return self.window[self.is_in].tolist()

    def left(self) -> tuple[np.ndarray, int]:
        """The window's other rows, and how many of them waited in vain for this step."""
        return self.window[~self.is_in], int((~self.is_in[: self.count]).sum())
