"""Paired gains over next-token prediction, their intervals and their trend with size.

A pair is an MTP trial and NTP with the same size, `seed` (hence the same initial trunk)
and `data.seed` (hence the same data order). A gain is positive where MTP is better: NTP
minus MTP for losses, MTP minus NTP for shares. Intervals are Student t intervals over
the pairs; they speak of seeds, not of the choice of held-out documents, which all
trials of a ladder share.

Equal budgets. An unfinished point of a longer run is not a finished run: its learning
rate has not come down yet. So the NTP side uses finished runs only: plain NTP, and the
longer NTP runs of arm `flops`, of the same size and seeds. An MTP trial's FLOPs or
seconds are turned into the tokens that NTP trains on with them, and the NTP metric at
that many tokens is interpolated, linearly in their logarithm, between the neighbouring
finished runs. Outside them nothing is extrapolated: the nearest run gives a bound.

A clock carries no verdict where equal runs differ more by it than the two methods do:
see `rough_clocks`.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.ladders import NTP, arrange
from mtp_jax.analysis.runs import Runs
from mtp_jax.analysis.statistics import LEVEL, interval

TOKENS, FLOPS, CLOCK = COMPARISONS = ("tokens", "FLOPs", "wall clock")
LOSSES = ("main_loss", "bits_per_byte")
SHARES = ("next_line_exact_match", "function_parses")
# Budgets this close are one budget (arm `flops` rounds to whole steps).
BUDGET_TOLERANCE = 0.01
UPPER, LOWER, EXACT = "at most", "at least", ""
# Verdicts.
BETTER, WORSE, NO_EFFECT = "better", "worse", "no effect found"
EQUAL = "equal within the margin"
ONE_PAIR, BOUND = "n/a (needs two pairs of seeds)", "n/a (a bound)"
NO_SPREAD, ROUGH_CLOCK = "n/a (all pairs are the same)", "n/a (rough clock)"
NO_TREND = "n/a (needs two seeds at every size)"
_CELL = ["ladder", "order", "method", "kind", "depth", "arm", "size"]
REPLICATE = ["seed", "data_seed"]


@dataclasses.dataclass(frozen=True)
class Analysis:
  """All tables that figures and words are made from.

  trials: see `ladders.arrange`. levels: see `levels`. pairs: see `paired_gains`.
  gains: see `gains`. slopes: see `slopes`. rates: see `learning_rates`.
  """

  runs: Runs
  trials: pd.DataFrame
  levels: pd.DataFrame
  pairs: pd.DataFrame
  gains: pd.DataFrame
  slopes: pd.DataFrame
  rates: pd.DataFrame

  def ladder(self, label: str) -> "Analysis":
    """Returns the rows of one ladder."""
    tables = {
      name: table[table["ladder"] == label].reset_index(drop=True)
      for name, table in vars(self).items() if name != "runs"
    }
    return dataclasses.replace(self, **tables)


def analyse(runs: Runs) -> Analysis:
  """Returns every table; see `Analysis`."""
  trials = arrange(runs)
  table = trials[trials["chosen"]].merge(runs.metrics, on="trial")
  pairs = paired_gains(table)
  return Analysis(
    runs=runs,
    trials=trials,
    levels=levels(table),
    pairs=pairs,
    gains=gains(pairs, rough_clocks(trials)),
    slopes=slopes(pairs),
    rates=learning_rates(trials, runs.metrics),
  )


def rows_of(
  table: pd.DataFrame, method: str, comparison: str = TOKENS, metric: str = "main_loss"
) -> pd.DataFrame:
  """Returns the rows of one method in `gains` or `slopes`."""
  return table[
    (table["method"] == method)
    & (table["metric"] == metric)
    & (table["comparison"] == comparison)
  ]


def levels(table: pd.DataFrame) -> pd.DataFrame:
  """Returns each metric's mean and interval over seeds, per method and size.

  `table` has one row per chosen trial, metric and `at_depth`. `stderr` is the mean
  standard error over held-out documents (or prompts) of one trial.
  """
  keys = [*_CELL, "metric", "at_depth"]
  rows = []
  for key, cell in table.groupby(keys):
    finite = cell.dropna(subset="mean")
    rows.append(
      dict(zip(keys, key, strict=True))
      | interval(finite["mean"].to_numpy())
      | {"stderr": finite["stderr"].mean()}
    )
  return pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high", "stderr"])


def paired_gains(table: pd.DataFrame) -> pd.DataFrame:
  """Returns one row per pair, metric and comparison, from the table of `levels`.

  `bound` is '' for a gain, 'at most' where all finished NTP runs had less than the MTP
  trial's budget (more training would help NTP), 'at least' where all had more.
  """
  columns = [*_CELL, *REPLICATE, "metric", "comparison", "gain", "bound", "budget"]
  rows = []
  wanted = table[table["metric"].isin([*LOSSES, *SHARES])].dropna(subset="mean")
  for _, cell in wanted.groupby(["ladder", "size"]):
    is_ntp = (cell["method"] == NTP) | (cell["arm"] == "flops")
    ntp = cell[is_ntp]
    if not (ntp["method"] == NTP).any():
      continue
    partners = dict(list(ntp.groupby([*REPLICATE, "metric"])))
    for _, group in cell[~is_ntp].groupby("method"):
      budgets = _budgets_in_ntp_tokens(group, ntp)
      for key, trial in group.groupby([*REPLICATE, "metric"]):
        partner = partners.get(key)
        if partner is None or not (partner["method"] == NTP).any():
          continue
        own = trial.iloc[0]
        for comparison, budget in budgets.items():
          value, bound = _at_budget(partner, budget, comparison)
          gain = (1 if key[-1] in LOSSES else -1) * (value - own["mean"])
          rows.append(
            own[[*_CELL, *REPLICATE, "metric"]].to_dict()
            | dict(comparison=comparison, gain=gain, bound=bound, budget=budget)
          )
  return pd.DataFrame(rows, columns=columns)


def rough_clocks(trials: pd.DataFrame) -> pd.DataFrame:
  """Returns how far the clock can be trusted, per ladder, method and size.

  spread: by how much the seconds per token of equal runs (one method and size) differ,
    largest over smallest minus 1, of this method or of NTP, whichever is more.
  difference: by how much the median seconds per token of the method and of NTP differ,
    larger over smaller minus 1.
  is_rough: equal runs differ by more than the two methods do, or there are no equal
    runs to compare.
  """
  used = trials[trials["chosen"]]
  pace = used["train_seconds"] / used["tokens"]
  model = used["method"].where(used["arm"] != "flops", NTP)
  cells = pace.groupby([used["ladder"], model, used["size"]])
  over = cells.agg(["max", "min", "median", "size"])
  over["spread"] = (over["max"] / over["min"] - 1).where(over["size"] > 1)
  rows = []
  for (ladder, method, size), own in over.iterrows():
    if method == NTP or (ladder, NTP, size) not in over.index:
      continue
    ntp = over.loc[(ladder, NTP, size)]
    spread = np.fmax(own["spread"], ntp["spread"])
    ratio = own["median"] / ntp["median"]
    difference = max(ratio, 1 / ratio) - 1
    rows.append({
      "ladder": ladder, "method": method, "size": size, "spread": spread,
      "difference": difference, "is_rough": not spread <= difference,
    })
  columns = ["ladder", "method", "size", "spread", "difference", "is_rough"]
  return pd.DataFrame(rows, columns=columns)


def gains(pairs: pd.DataFrame, clocks: pd.DataFrame | None = None) -> pd.DataFrame:
  """Returns the mean gain and its interval per method, size, metric and comparison.

  Where some pairs are gains and others bounds, the bounds are left out. `is_rough`
  marks gains at equal wall clock that the clock (`rough_clocks`) cannot carry.
  """
  keys = [*_CELL, "metric", "comparison"]
  rows = []
  for key, cell in pairs.groupby(keys):
    exact = cell[cell["bound"] == EXACT]
    used = exact if len(exact) else cell
    rows.append(
      dict(zip(keys, key, strict=True))
      | interval(used["gain"].to_numpy())
      | {"bound": used["bound"].iloc[0], "budget": used["budget"].iloc[0]}
    )
  columns = [*keys, "n", "mean", "low", "high", "bound", "budget"]
  table = pd.DataFrame(rows, columns=columns)
  if clocks is None or not len(table):
    return table.assign(is_rough=False)
  rough = clocks[clocks["is_rough"]][["ladder", "method", "size"]]
  where = pd.MultiIndex.from_frame(table[["ladder", "method", "size"]])
  is_rough = where.isin(pd.MultiIndex.from_frame(rough))
  return table.assign(is_rough=is_rough & (table["comparison"] == CLOCK))


def slopes(pairs: pd.DataFrame) -> pd.DataFrame:
  """Returns the gain per decade of size, per method, metric and comparison.

  See `statistics.slope`; n is the fewest seeds of a size. Bounds are left out.
  """
  keys = [c for c in _CELL if c != "size"] + ["metric", "comparison"]
  rows = []
  for key, cell in pairs[pairs["bound"] == EXACT].groupby(keys):
    by_size = {size: own.to_numpy() for size, own in cell.groupby("size")["gain"]}
    if len(by_size) > 1:
      over = statistics.slope(list(by_size), list(by_size.values()))
      rows.append(dict(zip(keys, key, strict=True)) | over)
  table = pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])
  return table.rename(columns={"mean": "slope"})


def learning_rates(trials: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
  """Returns every learning rate tried, per method and size, against the chosen one.

  excess: mean main loss minus the chosen rate's over the `shared` pairs of seeds;
    infinite where a loss was not finite, NaN where they share none.
  noise:  how large a difference chance explains at 95 %: t * sd / sqrt(shared), where
    sd is the spread over seeds of paired differences to NTP, pooled over the methods of
    this size; NaN if no method has two pairs.
  """
  columns = [
    *_CELL, "learning_rate", "chosen", "n", "mean", "shared", "excess", "noise",
  ]
  usable = trials[(trials["status"] == "finished") & (trials["copy"] == "")]
  losses = metrics[metrics["metric"] == "main_loss"].set_index("trial")["mean"]
  usable = usable.assign(loss=usable["trial"].map(losses).fillna(np.inf))
  rows = []
  for _, same_size in usable.groupby(["ladder", "size"]):
    spread, freedom = _paired_spread(same_size[same_size["chosen"]])
    critical = stats.t.ppf(0.5 + LEVEL / 2, freedom) * spread
    for key, cell in same_size.groupby(_CELL):
      # Other weight decays are no check of the rate.
      decays = cell.loc[cell["chosen"], "weight_decay"]
      cell = cell[cell["weight_decay"].isin(decays)]
      chosen = cell[cell["chosen"]].set_index(REPLICATE)["loss"]
      for rate, tried in cell.groupby("learning_rate"):
        loss = tried.set_index(REPLICATE)["loss"]
        shared = loss.index.intersection(chosen.index)
        rows.append(dict(zip(_CELL, key, strict=True)) | {
          "learning_rate": rate,
          "chosen": bool(tried["chosen"].any()),
          "n": len(loss),
          "mean": loss.mean(),
          "shared": len(shared),
          "excess": (loss[shared] - chosen[shared]).mean(),
          "noise": critical / np.sqrt(len(shared)) if len(shared) else np.nan,
        })
  return pd.DataFrame(rows, columns=columns)


def effect(gain: pd.Series, margin: float | None = None) -> str:
  """Returns the verdict on one row of `gains`; by default with its metric's margin."""
  if margin is None:
    margin = (claim.POINTS if gain["metric"] in SHARES else claim.NATS).value
  if math.isnan(gain["low"]):
    return ONE_PAIR
  if gain["is_rough"]:
    return ROUGH_CLOCK
  if gain["high"] - gain["low"] < 1e-12 and gain["mean"] != 0:  # Few prompts, say.
    return NO_SPREAD
  if not gain["bound"] and -margin < gain["low"] < gain["high"] < margin:
    return EQUAL
  if gain["low"] > 0 and gain["bound"] != UPPER:
    return BETTER
  if gain["high"] < 0 and gain["bound"] != LOWER:
    return WORSE
  return BOUND if gain["bound"] else NO_EFFECT


def trend(slope: pd.Series, gains: pd.DataFrame) -> str:
  """Returns the verdict on one row of `slopes`, fitted to the rows `gains`."""
  if math.isnan(slope["low"]):
    return NO_TREND
  if gains["is_rough"].any():
    return ROUGH_CLOCK
  if slope["low"] <= 0 <= slope["high"]:
    return "no trend found"
  is_up, is_loss = slope["low"] > 0, (gains["mean"] < 0).all()
  words = f"{'disadvantage' if is_loss else 'gain'} "
  return words + ("grows" if is_up != is_loss else "shrinks")


def _budgets_in_ntp_tokens(
  group: pd.DataFrame, ntp: pd.DataFrame
) -> dict[str, float]:
  """What the trials of one method cost, in tokens that NTP trains on with it.

  Medians over seeds: the clock of a shared machine is noisy, and FLOPs are the same.
  """
  ntp = ntp.drop_duplicates("trial")
  flops_per_token = ntp["flops_per_token"].iloc[0]
  tokens_per_second = (ntp["tokens"] / ntp["train_seconds"]).median()
  return {
    TOKENS: float(group["tokens"].median()),
    FLOPS: float(group["train_flops"].median() / flops_per_token),
    CLOCK: float(group["train_seconds"].median() * tokens_per_second),
  }


def _at_budget(
  finished: pd.DataFrame, budget: float, comparison: str
) -> tuple[float, str]:
  """Returns the NTP metric at a budget in tokens, and what kind of bound it makes."""
  if comparison == TOKENS:
    return float(finished.loc[finished["method"] == NTP, "mean"].iloc[0]), EXACT
  curve = finished.groupby("tokens")["mean"].mean()
  tokens, values = curve.index.to_numpy(float), curve.to_numpy()
  nearest = int(np.argmin(np.abs(np.log(tokens / budget))))
  if abs(tokens[nearest] / budget - 1) <= BUDGET_TOLERANCE:
    return float(values[nearest]), EXACT
  if budget > tokens[-1]:
    return float(values[-1]), UPPER
  if budget < tokens[0]:
    return float(values[0]), LOWER
  return float(np.interp(np.log(budget), np.log(tokens), values)), EXACT


def _paired_spread(chosen: pd.DataFrame) -> tuple[float, int]:
  """Standard deviation over seeds of a difference between two trials of one seed.

  Pooled over the differences of all methods to NTP; with its degrees of freedom.
  """
  finite = chosen[np.isfinite(chosen["loss"])]
  by_seed = finite.pivot_table(index=REPLICATE, columns="method", values="loss")
  if NTP not in by_seed:
    return np.nan, 1
  differences = by_seed.drop(columns=NTP).sub(by_seed[NTP], axis=0)
  freedom = int((differences.count() - 1).clip(lower=0).sum())
  if freedom == 0:
    return np.nan, 1
  squares = np.nansum((differences - differences.mean()).to_numpy() ** 2)
  return float(np.sqrt(squares / freedom)), freedom
