"""Whether a ladder counts as evidence about size, and why not.

It does only if, at the steps and sizes chosen,

1. every larger NTP model is better than the next smaller one beyond seed noise, and
2. the learning rate was tuned for NTP at every size (the one used is the best of at
   least three, with worse neighbours on both sides), and checked for each MTP method
   at every size (neighbours on both sides were tried, and none beats it beyond noise).

Undertrained or untuned ladders show gains that are not there. The trials that check a
learning rate differ from the others in `optimizer.learning_rate` only, and share a
seed with them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pandas as pd

from mtp_jax.analysis.gains import REPLICATE, Analysis, rows_of
from mtp_jax.analysis.ladders import NTP, size_text
from mtp_jax.analysis.statistics import interval, text

# Beyond this factor a neighbour is no evidence about the optimum.
NEIGHBOUR_FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class Check:
  """Whether a ladder counts: reasons why not, for all methods and for each one.

  `spans` names the methods that have gains at two sizes or more.
  """

  sizes: tuple[int, ...]
  spans: tuple[str, ...]
  ladder: tuple[str, ...]
  methods: dict[str, tuple[str, ...]]

  def counts(self, method: str) -> bool:
    return method in self.spans and not self.ladder and not self.methods[method]


def check_ladder(ladder: Analysis) -> Check:
  """Applies the two rules of this module to one ladder."""
  gains = ladder.gains.sort_values(["order", "size"])
  sizes = sorted(gains["size"].unique())
  own = {m: rows_of(gains, m)["size"].tolist() for m in gains["method"].unique()}
  reasons = [*_larger_is_better(ladder, sizes), *_untuned(ladder.rates, NTP, sizes)]
  return Check(
    sizes=tuple(sizes),
    spans=tuple(m for m in own if len(own[m]) > 1),
    ladder=tuple(reasons),
    methods={m: tuple(_untuned(ladder.rates, m, own[m])) for m in own},
  )


def _larger_is_better(ladder: Analysis, sizes: list[int]) -> Iterator[str]:
  trials = ladder.trials
  ntp = trials[trials["chosen"] & (trials["method"] == NTP)]
  losses = ladder.runs.metrics
  losses = losses[losses["metric"] == "main_loss"].set_index("trial")["mean"]
  ntp = ntp.assign(loss=ntp["trial"].map(losses))
  by_seed = ntp.pivot_table(
    index=REPLICATE, columns="size", values="loss", aggfunc="mean"
  )
  missing = [size_text(size) for size in sizes if size not in by_seed.columns]
  if missing:
    yield f"there is no finished NTP trial at {', '.join(missing)}"
    return
  for small, large in itertools.pairwise(sizes):
    both = by_seed[[small, large]].dropna()
    smaller, larger = size_text(small), size_text(large)
    step = interval((both[small] - both[large]).to_numpy())
    if step["n"] < 2:
      yield (
        f"NTP at {larger} and {smaller} share {step['n']} seed(s), so whether the "
        f"larger one is better beyond seed noise is not known"
      )
    elif not step["low"] > 0:
      yield (
        f"NTP at {larger} (loss {both[large].mean():.4f}) is not better than at "
        f"{smaller} ({both[small].mean():.4f}) beyond seed noise: difference "
        f"{text(step)} over {step['n']} seeds"
      )


def _untuned(rates: pd.DataFrame, method: str, sizes: list[int]) -> Iterator[str]:
  """Yields why the learning rate of a method does not pass, one line per kind of fault.

  NTP is the yardstick and has the strict rule; a method is only compared with it.
  """
  faults: dict[str, dict[str, list[str]]] = {}
  for size in sizes:
    tried = rates[(rates["method"] == method) & (rates["size"] == size)]
    if len(tried):
      for fault, detail in _faults_at_size(tried, is_strict=method == NTP):
        faults.setdefault(fault, {}).setdefault(detail, []).append(size_text(size))
  for fault, details in faults.items():
    places = (f"at {', '.join(where)} ({what})" for what, where in details.items())
    yield f"{method}: {fault} {'; '.join(places)}"


def _faults_at_size(tried: pd.DataFrame, is_strict: bool) -> Iterator[tuple[str, str]]:
  """Yields (fault, numbers) for the rates that one method was tried with."""
  rate = tried.loc[tried["chosen"], "learning_rate"].iloc[0]
  others = tried[~tried["chosen"] & (tried["shared"] > 0)]
  others = others.set_index("learning_rate").sort_index()
  grid = ", ".join(f"{x:g}" for x in sorted([rate, *others.index]))
  # The nearest rate on either side.
  lower, higher = others.index[others.index < rate], others.index[others.index > rate]
  sides = {"lower": lower[-1:], "higher": higher[:1]}
  missing = [side for side, nearest in sides.items() if not len(nearest)]
  if missing:
    yield (
      f"no {' and no '.join(missing)} learning rate was tried",
      f"used {rate:g}" + (f", tried {grid}" if len(others) else ""),
    )
  nearest = [*sides["lower"], *sides["higher"]]
  if any(max(x / rate, rate / x) > NEIGHBOUR_FACTOR * 1.001 for x in nearest):
    yield (
      f"a neighbour of the learning rate used is more than {NEIGHBOUR_FACTOR:g} times "
      f"away",
      f"used {rate:g}, tried {grid}",
    )
  if not len(others):
    return
  best = others.loc[others["excess"].idxmin()]
  allowed = 0.0 if is_strict or math.isnan(best["noise"]) else best["noise"]
  if best["excess"] < -allowed or (is_strict and best["excess"] == 0):
    known = "" if is_strict or allowed else "; seed noise is not known"
    yield (
      "the learning rate used is not the best of those tried"
      if is_strict else "another learning rate is better beyond seed noise",
      f"the loss at {best.name:g} is lower than at {rate:g} by "
      f"{-best['excess']:.4f} on {best['shared']:.0f} shared seed(s){known}",
    )
