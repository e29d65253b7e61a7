"""How long a sweep still takes: what its trials took so far, laid out over workers."""

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple


class Work(NamedTuple):
  """What a trial has to do.

  cost: training FLOPs per token. flops: left to train. evaluation: FLOPs of that.
  is_first: no trial of its shape has begun, so that its programs must be compiled.
  """

  cost: float
  flops: float
  evaluation: float
  is_first: bool


class Seen(NamedTuple):
  """What a trial has taken in this pass, in seconds; a pack shares them.

  startup: until its first step, None before that. training: for `flops`, validations
  among them. evaluation: None before it has ended. waited: in the part it is at.
  """

  startup: float | None = None
  training: float = 0.0
  flops: float = 0.0
  evaluation: float | None = None
  waited: float = 0.0


class Pace:
  """Seconds of the parts of a trial, by those that have been seen.

  The nearest cost counts. Smaller models are slower for their FLOPs, between not at all
  and as their cost: the root of it is assumed. Nothing is known before the first steps:
  NaN.
  """

  def __init__(self, trials: Iterable[tuple[Work, Seen]]):
    self._seconds: dict[str, dict[tuple[float, bool], list[float]]] = {}
    for work, seen in trials:
      self._add("startup", work, seen.startup, 1.0)
      self._add("training", work, seen.training if seen.flops else None, seen.flops)
      self._add("evaluation", work, seen.evaluation, 1.0)

  def _add(
    self, part: str, work: Work, seconds: float | None, amount: float
  ) -> None:
    if seconds is not None:
      key = work.cost, work.is_first and part != "training"
      sums = self._seconds.setdefault(part, {}).setdefault(key, [0.0, 0.0])
      sums[0] += seconds
      sums[1] += amount

  def _per(self, part: str, work: Work) -> float | None:
    """Returns seconds for one, of trials that compile like this one if any do."""
    known = self._seconds.get(part)
    if not known:
      return None
    is_first = work.is_first and part != "training"
    nearest = min(
      known, key=lambda key: (key[1] != is_first, abs(math.log(key[0] / work.cost)))
    )
    seconds, amount = known[nearest]
    slower = math.sqrt(nearest[0] / work.cost) if part == "training" else 1.0
    return slower * seconds / amount

  def left(self, work: Work, seen: Seen | None = None) -> float:
    """Returns the seconds that a trial still takes; `seen` is None if it waits."""
    seen = seen or Seen()
    per_flop = self._per("training", work)
    if per_flop is None:
      return math.nan
    evaluation = self._per("evaluation", work)
    if evaluation is None:
      evaluation = work.evaluation * per_flop
    training = work.flops * per_flop
    if seen.startup is None:
      return max(0.0, (self._per("startup", work) or 0.0) - seen.waited) + (
        training + evaluation
      )
    if work.flops > 0:
      return max(0.0, training - seen.waited) + evaluation
    return max(0.0, evaluation - seen.waited)


def makespan(busy: Iterable[float], waiting: Iterable[float]) -> float:
  """Returns when the last worker is done.

  Each of the waiting trials, the longest first, goes to the worker that is free first.
  `busy` are the seconds until each worker is free.
  """
  free = list(busy)
  heapq.heapify(free)
  for seconds in sorted(waiting, reverse=True):
    heapq.heappush(free, heapq.heappop(free) + seconds)
  return max(free, default=0.0)
