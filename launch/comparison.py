"""The report of launch.generate on drafts: how many were kept, and what they saved."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.decode.provenance import Generation

# Time is taken three times or more: a second in all if it takes no longer; less often
# where it takes more than ten.
_TIMINGS, _SHORT_SECONDS, _LONG_SECONDS = 3, 1.0, 10.0


def describe(generation: Generation) -> str:
  """Returns in words how much of what was drafted was kept."""
  figures = generation.acceptance
  words = f"{figures['tokens']} tokens, the first by the prefill, the others in "
  words += f"{figures['rounds']} rounds"
  if figures["tau"]["mean"] is not None:
    words += f": tau = {figures['tau']['mean']:.2f} tokens per round"
  kept = [
    f"draft {k} never" if x["mean"] is None else f"draft {k} {x['mean']:.0%}"
    for k, x in enumerate(figures["conditional"], start=1)
  ]
  return words + ("\naccepted where reached: " + ", ".join(kept) if kept else "")


class Comparison(NamedTuple):
  """Seconds of decoding with drafts and without, and whether the texts are the same."""

  drafted: float
  plain: float
  same: str

  @property
  def speed_up(self) -> float:
    return self.plain / self.drafted

  def words(self) -> str:
    return (
      f"{self.drafted:.3f} s, plain decoding {self.plain:.3f} s: {self.speed_up:.2f} "
      f"times as fast\n{self.same}"
    )


def compare(complete: Callable[..., Generation], how: dict[str, Any]) -> Comparison:
  """Returns the times, and whether the text equals plain decoding's.

  Both ways are compiled first, then take turns; times are medians, prefill included.
  """
  plain = how | {"num_drafts": 0, "proposal": "auto", "recurse": False, "tree": None}
  if how["rule"] != "greedy":
    plain["rule"] = "match"  # With nothing to match: plain sampling.
  ways = (how, plain)
  ours, theirs = (complete(**way).tokens for way in ways)
  seconds: tuple[list[float], list[float]] = ([], [])
  total = 0.0
  while total < _SHORT_SECONDS or (
    len(seconds[0]) < _TIMINGS and total < _LONG_SECONDS
  ):
    for way, times in zip(ways, seconds, strict=True):
      start = time.perf_counter()
      complete(**way)
      times.append(time.perf_counter() - start)
      total += times[-1]
  if how["rule"] not in ("greedy", "match"):
    same = "equal to plain sampling in distribution"
  elif np.array_equal(ours, theirs):
    same = "identical to plain decoding: yes"
  else:
    shorter = min(len(ours), len(theirs))
    differs = np.append(ours[:shorter] != theirs[:shorter], True)
    same = f"identical to plain decoding: no, from new token {1 + differs.argmax()} on"
  return Comparison(*map(statistics.median, seconds), same)
