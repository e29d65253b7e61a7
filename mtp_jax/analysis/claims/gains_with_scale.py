"""Gains with size on text: the ladder that `launch.report` left."""

import functools

import pandas as pd

from mtp_jax.analysis import drawing
from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis.claims import arms, by_size, claim
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.published import published_gains
from mtp_jax.analysis.results import REPLICATE, LadderResults
from mtp_jax.analysis.runs import RunsError


def experiment(preset: str) -> claim.Experiment:
  late = " (a rule that was written after this run)" if preset == "cpu" else ""
  lambada = "LAMBADA perplexity, 340M / 1.8B / 7B: NTP 30.34 / 11.38 / 7.97"
  return claim.Experiment(
    "gains_with_scale", preset, "Gains with size",
    "Gain over NTP at equal tokens in nats per token, mean and 95 % t interval over "
    "seeds.",
    (
      claim.Claim(
        "heads_cost", "Parallel heads of weight 1 cost next-token loss",
        f"{claim.TOP}, table 2", f"{lambada}, parallel n = 4 35.31 / 13.69 / 8.99",
        "gain at equal tokens of D = 1 and D = 3, paired by seed, t interval over "
        f"seeds, below 0 at every size{late}",
        claim.NATS, heads_cost_loss,
      ),
      claim.Claim(
        "more_heads_cost_more", "More parallel heads cost more next-token loss",
        "NextLat, arXiv 2511.05963, table 2", claim.NO_FIGURE,
        "gain of D = 3 minus gain of D = 1, paired by seed, t interval over seeds, "
        f"below 0 at every size{late}",
        claim.NATS, more_heads_cost_more,
      ),
      *(
        claim.Claim(
          f"{kind}{depth}_grows", f"Gains grow with size: {kind} D={depth}",
          source, published,
          "slope of the gain (NTP minus MTP main loss at equal tokens) per decade of "
          f"parameters, one line a seed, t interval over seeds, above 0{late}",
          claim.NATS_PER_DECADE,
          functools.partial(gain_grows_with_size, kind=kind, depth=depth),
        )
        for kind, depth, source, published in (
          ("parallel", 1, f"{claim.GLOECKLE}, table S7", _pass_rates(2)),
          ("parallel", 3, f"{claim.GLOECKLE}, table S7", _pass_rates(4)),
          ("sequential", 1, f"{claim.DEEPSEEK}, table 4",
           "bits per byte on the Pile, without and with D = 1: 0.729 and 0.729 (15.7B "
           "parameters), 0.658 and 0.657 (228.7B)"),
          ("sequential", 3, f"{claim.TOP}, table 2",
           f"{lambada}, sequential D = 3 of weight 1 40.99 / 13.32 / 8.52"),
        )
      ),
    ),
    draw,
    results_lib.read_ladder,
  )


def _pass_rates(n: int) -> str:
  """The ends of the published ladder."""
  rows = published_gains()
  rows = rows[(rows["n"] == n) & (rows["benchmark"] == "MBPP@1")].set_index("size")
  ends = ", ".join(
    f"{rows['gain'][size]:+.1f} at {size / 1e9:g}B"
    for size in (rows.index.min(), rows.index.max())
  )
  return f"pass rates only, gain of n = {n} in points of MBPP pass@1: {ends}"


def heads_cost_loss(results: LadderResults) -> claim.Finding:
  return claim.Finding(tuple(
    claim.over_seeds(gains, f"D={depth}, {size_text(size)}", side="below")
    for depth in (1, 3)
    for size, gains in _gains(results, "parallel", depth).items()
  ))


def more_heads_cost_more(results: LadderResults) -> claim.Finding:
  three, one = (_gains(results, "parallel", depth) for depth in (3, 1))
  return claim.Finding(tuple(
    claim.over_seeds(
      three[size] - one[size], f"D=3 minus D=1, {size_text(size)}", side="below"
    )
    for size in sorted(three.keys() & one.keys())
  ))


def gain_grows_with_size(
  results: LadderResults, kind: str, depth: int
) -> claim.Finding:
  """Tests the slope of the gain at equal tokens, per decade of parameters."""
  fits = _at_equal_tokens(results.slopes, kind, depth)
  if len(fits) > 1:
    raise RunsError(
      f"{results.folder / 'all_slopes.csv'}: {kind} with depth {depth} must have one "
      f"row for main_loss at equal tokens, got {len(fits)}."
    )
  fits = fits.rename(columns={"slope": "mean"})
  rows = (row for _, row in fits.iterrows())
  return claim.Finding(tuple(claim.estimate(row, "per decade") for row in rows))


def _at_equal_tokens(table: pd.DataFrame, kind: str, depth: int) -> pd.DataFrame:
  """Returns the rows of a ladder's table for the main loss of one kind and depth."""
  return table[
    (table["metric"] == "main_loss") & (table["comparison"] == "tokens")
    & (table["kind"] == kind) & (table["depth"] == depth) & (table["arm"] == "added")
  ]


def pairs_of(results: LadderResults, kind: str, depth: int) -> pd.DataFrame:
  """Returns the gains a seed of methods that more than one size was trained with."""
  methods = _at_equal_tokens(results.slopes, kind, depth)["method"]
  pairs = _at_equal_tokens(results.pairs, kind, depth)
  return pairs[pairs["method"].isin(methods)].rename(columns={"data_seed": "data.seed"})


def _gains(results: LadderResults, kind: str, depth: int) -> dict[float, pd.Series]:
  """Returns {size: gain a seed}, the smallest size first."""
  return {
    size: cell.set_index(list(REPLICATE))["gain"]
    for size, cell in pairs_of(results, kind, depth).groupby("size")
  }


def draw(results: LadderResults) -> claim.Drawing:
  """Draws the gain at equal tokens against size."""
  methods = {
    arms.label(kind, depth): pairs_of(results, kind, depth)
    for kind in ("parallel", "sequential") for depth in (1, 3)
  }
  styles = {name: drawing.series_style(i) for i, name in enumerate(methods, start=1)}
  rows = pd.concat([own.assign(series=name) for name, own in methods.items()])
  figure, axes = drawing.panels(1, 1, width=5.5)
  table = by_size.draw(axes[0, 0], rows, styles, "gain over NTP, nats per token")
  drawing.legend_below(figure, axes.flat)
  return figure, table
