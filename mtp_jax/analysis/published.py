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

import itertools
import math

import pandas as pd

SOURCE = (
  "Gloeckle et al. 2024, arXiv 2404.19737, table S7; parallel heads, trunk shortened, "
  "one training run a point"
)
BENCHMARKS = (
  "MBPP@1", "MBPP@10", "MBPP@100", "HumanEval@1", "HumanEval@10", "HumanEval@100",
)
TOKENS = {0.3e9: 91.0e9, 0.6e9: 91.0e9, 1.3e9: 91.0e9, 3e9: 91.0e9,
          6.7e9: 209.7e9, 13e9: 209.7e9}

# {parameters: one (n = 1, n = 2, n = 4) per benchmark}
_PASS_RATES = {
  0.3e9: ((1.8, 1.7, 1.0), (10.4, 10.1, 6.3), (29.9, 27.2, 20.1),
          (1.9, 1.5, 1.2), (5.0, 4.4, 4.0), (10.9, 10.3, 8.6)),
  0.6e9: ((4.7, 4.6, 3.0), (21.0, 21.0, 15.6), (45.2, 44.7, 38.0),
          (2.9, 3.2, 2.7), (8.5, 8.9, 7.7), (16.7, 16.2, 15.5)),
  1.3e9: ((6.8, 7.3, 7.4), (27.0, 27.5, 27.6), (51.0, 51.7, 50.1),
          (4.6, 5.4, 4.8), (13.1, 13.6, 12.3), (24.3, 23.3, 22.5)),
  3e9: ((11.1, 11.8, 12.7), (36.4, 37.2, 37.6), (60.4, 60.5, 61.1),
        (7.2, 8.0, 7.2), (17.2, 18.2, 18.5), (29.8, 31.2, 33.3)),
  6.7e9: ((23.9, 24.7, 26.0), (54.2, 54.8, 55.8), (74.7, 76.4, 76.0),
          (12.8, 13.2, 13.8), (29.3, 32.2, 33.2), (51.7, 53.9, 58.5)),
  13e9: ((26.0, 30.5, 30.5), (57.1, 60.5, 61.0), (77.0, 79.4, 79.2),
         (14.1, 15.2, 15.8), (33.6, 36.9, 38.6), (56.0, 60.0, 63.5)),
}


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


_TOP = "TOP, table 2 (log LAMBADA perplexity)"
_GOLF = "parameter-golf notes (no seeds)"
# (source, method, parameters, MTP minus NTP, low, high); NaN: no interval.
_TEXT_LOSSES = (
  (_GOLF, "n = 2, weight 0.1", 27e6, 0.006 * math.log(2), math.nan, math.nan),
  (_GOLF, "n = 2, weight 0.3", 27e6, 0.014 * math.log(2), math.nan, math.nan),
  (_GOLF, "n = 2, weight 1", 27e6, 0.033 * math.log(2), math.nan, math.nan),
  (_GOLF, "n = 4, weight 0.3", 27e6, 0.018 * math.log(2), math.nan, math.nan),
  ("parameter-golf PR 1031 (unreviewed)", "2 heads, weight 0.1", 27e6,
   -0.0037 * math.log(2), math.nan, math.nan),
  ("mmiovski/deepseek-reimplementation (10 seeds)", "offsets 2 and 3, weight 0.3",
   121e6, -0.040, -0.069, -0.011),
  (_TOP, "parallel n = 4", 340e6, 0.15, math.nan, math.nan),
  (_TOP, "parallel n = 4", 1.8e9, 0.19, math.nan, math.nan),
  (_TOP, "parallel n = 4", 7e9, 0.12, math.nan, math.nan),
  (_TOP, "sequential D = 3", 340e6, 0.30, math.nan, math.nan),
  (_TOP, "sequential D = 3", 1.8e9, 0.16, math.nan, math.nan),
  (_TOP, "sequential D = 3", 7e9, 0.07, math.nan, math.nan),
  ("DeepSeek-V3, table 4", "D = 1", 15.7e9, 0.0, math.nan, math.nan),
  ("DeepSeek-V3, table 4", "D = 1", 228.7e9, -0.001 * math.log(2), math.nan, math.nan),
)


def published_taxes() -> pd.DataFrame:
  """Returns what extra losses cost in published text losses, one row a point."""
  columns = ["source", "method", "size", "mean", "low", "high"]
  return pd.DataFrame(_TEXT_LOSSES, columns=columns)


def published_gains() -> pd.DataFrame:
  """Returns n = 2 and n = 4 minus n = 1 in percentage points, one row a point."""
  rows = []
  for size, rates in _PASS_RATES.items():
    triples = zip(BENCHMARKS, rates, strict=True)
    for (benchmark, triple), index in itertools.product(triples, (1, 2)):
      rows.append({
        "benchmark": benchmark,
        "size": size,
        "tokens": TOKENS[size],
        "n": 2 * index,
        "depth": 2 * index - 1,
        "pass_rate": triple[index],
        "pass_rate_ntp": triple[0],
        "gain": round(triple[index] - triple[0], 1),
      })
  return pd.DataFrame(rows)
