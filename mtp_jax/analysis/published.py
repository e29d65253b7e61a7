"""Published figures, to set beside what is measured here.

Gains with size: Gloeckle et al. 2024, "Better & Faster Large Language Models via
Multi-token Prediction" (arXiv 2404.19737), table S7, the data of their figure 3: pass@k
in percent of models that predict n = 1, 2 or 4 tokens (D = n - 1 extra ones), at equal
total parameters (the trunk is shortened). Two things to keep in mind when reading it:
0.3B to 3B saw 91.0 billion tokens, 6.7B and 13B saw 209.7 billion (tables S13 and S14),
and one model was trained per point, so that there is no spread over seeds.

Star graphs: "TOP" (arXiv 2508.19228), table 5: exact path in percent, 30 labels,
300,000 training graphs, 8 layers of width 384; one training run a cell.

Text losses: MTP minus NTP in next-token loss of the deployed model, in nats of the
source's own unit (a token, or a byte where the source has bits per byte); only figures
read in the source, of models whose size is stated.
"""

import math
from pathlib import Path

import pandas as pd

# {(arms, length): {(kind, D): exact path in %}}
STAR_GRAPHS = {
  (3, 3): {("none", 0): 33.8, ("parallel", 1): 100.0, ("parallel", 3): 100.0,
           ("sequential", 1): 100.0, ("sequential", 3): 100.0},
  (3, 5): {("none", 0): 32.5, ("parallel", 1): 59.0, ("parallel", 3): 100.0,
           ("sequential", 1): 32.5, ("sequential", 3): 33.6},
  (5, 3): {("none", 0): 19.5, ("parallel", 1): 19.6, ("parallel", 3): 100.0,
           ("sequential", 1): 100.0, ("sequential", 3): 100.0},
  (5, 5): {("none", 0): 0.1, ("parallel", 1): 0.1, ("parallel", 3): 19.5,
           ("sequential", 1): 19.2, ("sequential", 3): 19.3},
}


def published_taxes() -> pd.DataFrame:
  """Returns what extra losses cost in published text losses, in nats, a row a point."""
  rows = _read("published_taxes.csv")
  in_bits, ends = rows["unit"] == "bits", ["mean", "low", "high"]
  rows.loc[in_bits, ends] *= math.log(2)
  return rows[["source", "method", "size", *ends]]


def published_gains() -> pd.DataFrame:
  """Returns n = 2 and n = 4 minus n = 1 in percentage points, one row a point."""
  rates = _read("published_pass_rates.csv")
  parts = [
    rates.assign(n=n, depth=n - 1, pass_rate=rates[f"n={n}"]) for n in (2, 4)
  ]
  rows = pd.concat(parts).sort_index(kind="stable", ignore_index=True)
  rows = rows.rename(columns={"n=1": "pass_rate_ntp"}).drop(columns=["n=2", "n=4"])
  return rows.assign(gain=(rows["pass_rate"] - rows["pass_rate_ntp"]).round(1))


def _read(name: str) -> pd.DataFrame:
  return pd.read_csv(Path(__file__).with_name(name), dtype={"size": float})
