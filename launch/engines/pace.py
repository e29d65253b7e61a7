"""Time that a sweep still takes: from what its trials took, laid out over workers."""

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple


class Work(NamedTuple):
  """A trial of this pass; of a pack, each has its part of the seconds.

  cost:      training FLOPs per token.
  flops:     from the step at which it was given out to the last one.
  done:      FLOPs of these that are done, in `training` seconds.
  seconds:   since it was given out, with start-up and evaluation.
  is_first:  no trial of its program came before: the program is compiled.
  has_ended: it is evaluated.
  """

  cost: float
  flops: float
  done: float = 0.0
  training: float = 0.0
  seconds: float = 0.0
  is_first: bool = False
  has_ended: bool = False


class Pace:
  """Seconds of training per FLOP by the cost of a trial, and seconds of all else.

  The nearest known cost counts. Smaller models take longer for their FLOPs, between not
  at all and as their cost: the root of it is assumed.
  """

  def __init__(self, works: Iterable[Work]):
    sums: dict[float, list[float]] = {}
    rest: dict[bool, list[float]] = {}
    for work in works:
      if work.done:
        entry = sums.setdefault(work.cost, [0.0, 0.0])
        entry[0] += work.training
        entry[1] += work.done
      if work.has_ended:
        rest.setdefault(work.is_first, []).append(work.seconds - work.training)
    self._per_flop = {cost: seconds / flops for cost, (seconds, flops) in sums.items()}
    self._rest = {is_first: sum(x) / len(x) for is_first, x in rest.items()}

  def left(self, work: Work) -> float:
    """Returns the seconds that a trial still takes; NaN before the first steps."""
    if not self._per_flop:
      return math.nan
    nearest = min(self._per_flop, key=lambda cost: abs(math.log(cost / work.cost)))
    per_flop = self._per_flop[nearest] * math.sqrt(nearest / work.cost)
    of_others = self._rest.get(not work.is_first, 0.0)
    rest = self._rest.get(work.is_first, of_others) - (work.seconds - work.training)
    return per_flop * (work.flops - work.done) + max(0.0, rest)


def makespan(busy: Iterable[float], waiting: Iterable[float]) -> float:
  """Returns when the last worker is done, in seconds.

  Each of the waiting trials, the longest first, goes to the worker that is free first.
  `busy` are the seconds until each worker is free.
  """
  free = list(busy)
  heapq.heapify(free)
  for seconds in sorted(waiting, reverse=True):
    heapq.heappush(free, heapq.heappop(free) + seconds)
  return max(free, default=0.0)


def duration(seconds: float) -> str:
  """Returns a time in words, as exact as an estimate is."""
  if seconds < 100:
    return f"{seconds:.0f} s"
  if seconds < 6000:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"
