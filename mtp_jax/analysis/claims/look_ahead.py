"""Look-ahead on star graphs: how much sooner it is learnt, by width and by depth.

The gain of an arm is NTP's minus the arm's restricted mean of ln(tokens) until the path
is solved (`solving`), paired by seed: 0.26 is a factor of 1.3 fewer tokens. `added`
puts the extra heads on the whole trunk, `shortened` takes their layers from it. Only
trials on fresh graphs count here: trials that repeat a fixed set learn another task.
"""

from collections.abc import Iterator

import pandas as pd

from mtp_jax.analysis import drawing, statistics
from mtp_jax.analysis.claims import arms, by_size, claim, solving
from mtp_jax.analysis.claims.arms import WIDTH
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import REPLICATE, Results, Where

LAYERS, ARM, EXAMPLES = "trunk.num_layers", "mtp.arm", "task.num_train"
NTP = {**arms.NTP, ARM: "added"}  # Arm `flops` is of longer runs.
GRAPH = ["task.star_graph.arms", "task.star_graph.length"]
# {name: (config values, words)}
ARMS = {
  "n2": ({**arms.parallel(2), ARM: "added"}, "n = 2"),
  "n4": ({**arms.parallel(4), ARM: "added"}, "n = 4"),
  "d1": ({**arms.sequential(1), ARM: "added"}, "sequential D = 1"),
  "n2_shortened": ({**arms.parallel(2), ARM: "shortened"}, "n = 2, shortened"),
  "n4_shortened": ({**arms.parallel(4), ARM: "shortened"}, "n = 4, shortened"),
}


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "look_ahead", preset, "Look-ahead: when a star graph is learnt, by size",
    "First: tokens saved until 95 % of paths are right, in ln, mean and 95 % t "
    "interval over seeds. Then, size by size, the share of seeds that have solved it "
    "(Kaplan-Meier).",
    tuple(_claims()), draw, table=table,
  )


def _claims() -> Iterator[claim.Claim]:
  published = "14M, G(3,3): NTP 33.8 %, n = 2 and n = 4 100 % exact paths (one run)"

  def own(key, statement, rule, margin, test, *how):
    return claim.Claim(
      key, statement, f"{claim.TOP}, table 5, has one size", published, rule, margin,
      lambda results: test(results, *how),
    )

  for arm in ("n2", "n4"):
    words = ARMS[arm][1]
    yield own(
      f"{arm}_sooner", f"{words} learns star graphs in fewer tokens than NTP",
      f"width ladder; {solving.RULE}, averaged over sizes with seeds resampled within "
      "size (BCa), above 0",
      claim.FACTOR, sooner, arm,
    )
    yield own(
      f"{arm}_grows", f"The tokens that {words} saves grow with size",
      "width ladder; slope per decade of parameters of this gain, seeds resampled "
      "within size (BCa), above 0; sizes where no seed of either solves it left out",
      claim.FACTOR_PER_DECADE, grows, arm,
    )
    yield own(
      f"{arm}_crosses", f"{words} costs tokens at the smallest size, saves at the last",
      "width ladder; gain at the smallest size below 0 and at the largest above 0",
      claim.FACTOR, crosses, arm,
    )
  yield own(
    "shallow_none", "With one or two layers n = 2 makes no difference",
    f"depth ladder, at most 2 layers; {solving.RULE}, within the margin",
    claim.FACTOR, at_depths, "n2", 2, "within",
  )
  yield own(
    "shortened_costs", "n = 2 with a shortened trunk of up to 4 layers costs tokens",
    f"at most 4 layers, averaged within a seed; {solving.RULE}, below 0",
    claim.FACTOR, at_depths, "n2_shortened", 4, "below",
  )


def ladder(results: Results, by: str = "width") -> pd.DataFrame:
  """Returns the trials of a ladder with tokens_to and solved.

  The width ladder has the layers that most widths have; the depth ladder the width
  that most numbers of layers have. The easiest graph (fewest arms, then shortest path).
  """
  fresh = {EXAMPLES: 0} if EXAMPLES in results.trials else {}
  rows = solving.solve_times(results, fresh)
  for key in (WIDTH, LAYERS, *GRAPH):
    results.key(key)
  if rows.empty:
    return rows
  first = rows[GRAPH].drop_duplicates().sort_values(GRAPH).iloc[0]
  rows = rows[(rows[GRAPH] == first).all(axis="columns")]
  varied, fixed = (WIDTH, LAYERS) if by == "width" else (LAYERS, WIDTH)
  most = rows.groupby(fixed)[varied].nunique().idxmax()
  rows = rows[rows[fixed] == most]
  arm = ["size", "mtp.kind", "mtp.depth", *([ARM] if ARM in rows else [])]
  return arms.reported(rows, arm)


def _of(rows: pd.DataFrame, where: Where) -> pd.DataFrame:
  for key, value in where.items():
    if key != ARM or ARM in rows:
      rows = rows[rows[key] == value]
  return rows


def gains(rows: pd.DataFrame, arm: str) -> pd.DataFrame:
  """Returns the gains of an arm: columns size, REPLICATE and gain.

  Sizes at which no seed of either solves are left out: where nobody solves the
  restricted means are equal by construction.
  """
  cells = [pd.DataFrame(columns=["size", *REPLICATE, "gain"])]
  for size, cell in rows.groupby("size"):
    ntp, own = _of(cell, NTP), _of(cell, ARMS[arm][0])
    if len(ntp) and len(own) and (ntp["solved"].any() or own["solved"].any()):
      cells.append(solving.gains(ntp, own).assign(size=size))
  return pd.concat(cells[1:] or cells, ignore_index=True)


def sooner(results: Results, arm: str) -> claim.Finding:
  """Tests the gain, averaged over sizes."""
  rows = ladder(results)
  return by_size.average(gains(rows, arm), "ln(tokens) saved", _shares(rows, arm))


def grows(results: Results, arm: str) -> claim.Finding:
  """Tests the slope of the gain with size."""
  rows = ladder(results)
  over = by_size.slope(gains(rows, arm))
  if over is None:
    return claim.Finding()
  return claim.Finding((claim.estimate(over, "per decade"),), _shares(rows, arm))


def crosses(results: Results, arm: str) -> claim.Finding:
  """Tests whether the sign of the gain turns between the ends of the ladder."""
  pairs = gains(ladder(results), arm)
  if pairs["size"].nunique() < 2:
    return claim.Finding()
  ends = ((pairs["size"].min(), "below"), (pairs["size"].max(), "above"))
  return claim.Finding(tuple(
    claim.over_seeds(
      pairs[pairs["size"] == size].set_index(list(REPLICATE))["gain"], size_text(size),
      side=side,
    )
    for size, side in ends
  ))


def at_depths(results: Results, arm: str, most: int, side: claim.Side) -> claim.Finding:
  """Tests the gain at few layers, averaged within a seed."""
  rows = ladder(results, "depth")
  pairs = gains(rows[rows[LAYERS] <= most], arm)
  values = pairs.set_index(["size", *REPLICATE])["gain"]
  return claim.found(values, f"at most {most} layers", side=side)


def _shares(rows: pd.DataFrame, arm: str) -> str:
  """Returns how many seeds solve the task at each size, in words."""
  parts = []
  for size, cell in rows.groupby("size"):
    own, ntp = _of(cell, ARMS[arm][0]), _of(cell, NTP)
    counts = [f"{int(x['solved'].sum())}/{len(x)}" for x in (ntp, own)]
    parts.append(f"{size_text(size)} {' and '.join(counts)}")
  return f"solved by NTP and by {ARMS[arm][1]}: {', '.join(parts)}"


def table(results: Results) -> pd.DataFrame:
  """Returns the gain of every arm and size on either ladder, with its verdict."""
  rows = []
  for by in ("width", "depth"):
    trials = ladder(results, by)
    for arm, (where, words) in ARMS.items():
      for row in by_size.rows(gains(trials, arm), {"method": words}, claim.FACTOR):
        cell = trials[trials["size"] == row["size"]]
        rows.append({
          "ladder": by, "width": cell[WIDTH].iloc[0], "layers": cell[LAYERS].iloc[0],
          **row, "solved": _of(cell, where)["solved"].mean(),
          "solved by NTP": _of(cell, NTP)["solved"].mean(),
        })
  return pd.DataFrame(rows)


def draw(results: Results) -> claim.Drawing:
  """Draws the gain against size, and size by size the share that solved the task."""
  rows = ladder(results)
  sizes = sorted(rows["size"].unique())
  columns = min(1 + len(sizes), 3)
  num_rows = -(-(1 + len(sizes)) // columns)
  figure, axes = drawing.panels(num_rows, columns, height=0.8 + 2.8 * num_rows)
  first, *others = axes.flat
  for ax in others[len(sizes) :]:
    ax.remove()
  gain = by_size.draw(first, *series(results), "ln(tokens) saved until solved")
  tables = [gain.assign(shown="gain")]
  shown = {"NTP": NTP} | {words: where for where, words in ARMS.values()}
  for ax, size in zip(others, sizes, strict=False):
    for index, (words, where) in enumerate(shown.items()):
      own = _of(rows[rows["size"] == size], where)
      if own.empty:
        continue
      curve = statistics.kaplan_meier(own["tokens_to"], own["solved"])
      style = drawing.series_style(index) | {"marker": "", "label": words}
      ax.step(*([0, *curve[key]] for key in ("time", "share")), where="post", **style)
      tables.append(curve.assign(size=size, method=words, shown="solved"))
    ax.set(title=f"{size_text(size)} parameters", xlabel="tokens")
    ax.xaxis.set_major_formatter(lambda x, _: size_text(x) if x else "0")
    ax.locator_params(axis="x", nbins=3)
    drawing.share_axis(ax)
  if sizes:
    others[0].set_ylabel("share of seeds that solved it")
  drawing.legend_below(figure, figure.axes)
  return figure, pd.concat(tables, ignore_index=True)


def series(results: Results) -> by_size.Series:
  """Returns the gains with the line that shows each, and the look of the lines."""
  rows = ladder(results)
  pairs = [gains(rows, arm).assign(series=words) for arm, (_, words) in ARMS.items()]
  styles = {
    words: drawing.series_style(index)
    for index, (_, words) in enumerate(ARMS.values(), start=1)
  }
  return pd.concat([x for x in pairs if len(x)] or pairs[:1]), styles
