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

from mtp_jax.analysis.gains import TOKENS, Analysis
from mtp_jax.analysis.ladders import NTP, size_text
from mtp_jax.analysis.statistics import interval

# A neighbour farther away than this factor says little about the optimum.
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
  methods = mtp_methods(ladder.gains)
  sizes = sorted(ladder.gains["size"].unique())
  reasons = [*_larger_is_better(ladder, sizes), *_untuned(ladder.rates, NTP, sizes)]
  own = {m: sorted(rows_of(ladder.gains, m)["size"].unique()) for m in methods}
  return Check(
    sizes=tuple(sizes),
    spans=tuple(m for m in methods if len(own[m]) > 1),
    ladder=tuple(reasons),
    methods={m: tuple(_untuned(ladder.rates, m, own[m])) for m in methods},
  )


def mtp_methods(gains: pd.DataFrame) -> list[str]:
  """Returns the methods that have gains, in their order."""
  return list(gains.sort_values("order")["method"].unique())


def rows_of(
  table: pd.DataFrame, method: str, comparison: str = TOKENS, metric: str = "main_loss"
) -> pd.DataFrame:
  """Returns the rows of one method in `gains` or `slopes`."""
  return table[
    (table["method"] == method)
    & (table["metric"] == metric)
    & (table["comparison"] == comparison)
  ]


def with_interval(row: pd.Series | dict, scale: float = 1, digits: int = 4) -> str:
  """Returns a signed mean with its interval, if it has one."""
  text = f"{scale * row['mean']:+.{digits}f}"
  if not math.isnan(row["low"]):
    low, high = scale * row["low"], scale * row["high"]
    text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
  return text


def _larger_is_better(ladder: Analysis, sizes: list[int]) -> Iterator[str]:
  trials = ladder.trials
  ntp = trials[trials["chosen"] & (trials["method"] == NTP)]
  losses = ladder.runs.metrics
  losses = losses[losses["metric"] == "main_loss"].set_index("trial")["mean"]
  ntp = ntp.assign(loss=ntp["trial"].map(losses))
  by_seed = ntp.pivot_table(
    index=["seed", "data_seed"], columns="size", values="loss", aggfunc="mean"
  )
  missing = [size_text(size) for size in sizes if size not in by_seed.columns]
  if missing:
    yield f"there is no finished NTP trial at {', '.join(missing)}"
    return
  for small, large in itertools.pairwise(sizes):
    both = by_seed[[small, large]].dropna()
    names = f"NTP at {size_text(large)}"
    smaller = size_text(small)
    if len(both) < 2:
      yield (
        f"{names} and {smaller} share {len(both)} seed(s), so whether the larger one "
        f"is better beyond seed noise is not known"
      )
      continue
    step = interval((both[small] - both[large]).to_numpy())
    if not step["low"] > 0:
      yield (
        f"{names} (loss {both[large].mean():.4f}) is not better than at {smaller} "
        f"({both[small].mean():.4f}) beyond seed noise: difference "
        f"{with_interval(step)} over {step['n']} seeds"
      )


def _untuned(rates: pd.DataFrame, method: str, sizes: list[int]) -> Iterator[str]:
  """Yields why the learning rate of a method does not pass, one line per kind of fault.

  NTP is the yardstick and has the strict rule; a method is only compared with it.
  """
  faults: dict[str, dict[str, list[str]]] = {}
  for size in sizes:
    tried = rates[(rates["method"] == method) & (rates["size"] == size)]
    for fault, detail in _faults_at_size(tried, is_strict=method == NTP):
      faults.setdefault(fault, {}).setdefault(detail, []).append(size_text(size))
  for fault, details in faults.items():
    places = (f"at {', '.join(where)} ({what})" for what, where in details.items())
    yield f"{method}: {fault} {'; '.join(places)}"


def _faults_at_size(
  tried: pd.DataFrame, is_strict: bool
) -> Iterator[tuple[str, str]]:
  """Yields (fault, numbers) for the rates that one method was tried with."""
  tried = tried.sort_values("learning_rate")
  if not len(tried):
    return
  used = tried[tried["chosen"]].iloc[0]
  rate = used["learning_rate"]
  others = tried[~tried["chosen"] & (tried["shared"] > 0)]
  below, above = (
    others[others["learning_rate"] < rate], others[others["learning_rate"] > rate]
  )
  grid = ", ".join(f"{x:g}" for x in sorted([rate, *others["learning_rate"]]))
  sides = [x for x, rows in (("lower", below), ("higher", above)) if not len(rows)]
  if sides:
    yield (
      f"no {' and no '.join(sides)} learning rate was tried",
      f"used {rate:g}" + (f", tried {grid}" if len(others) else ""),
    )
  neighbours = [*below["learning_rate"].tail(1), *above["learning_rate"].head(1)]
  far = [x for x in neighbours if max(x / rate, rate / x) > NEIGHBOUR_FACTOR * 1.001]
  if far:
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
      f"the loss at {best['learning_rate']:g} is lower than at {rate:g} by "
      f"{-best['excess']:.4f} on {best['shared']:.0f} shared seed(s){known}",
    )
