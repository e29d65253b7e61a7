"""The frame of a page: style, tables, figures, and how the numbers are defined."""

import base64
import html
import io
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin-bottom: .3rem; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0 2rem; }
figcaption { color: #444; font-size: .9rem; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1.5rem; }
th, td { padding: .2rem .7rem; text-align: left; vertical-align: top;
         border-bottom: 1px solid #e3e3e3; font-variant-numeric: tabular-nums; }
dt { font-weight: 600; margin-top: .5rem; }
.verdict { background: #f4f6f8; padding: .5rem 1.2rem; border-left: 4px solid #0072B2; }
.wide { overflow-x: auto; }
code { background: #f2f2f2; padding: 0 .2rem; }
"""
_DEFINITIONS = {
  "Size": """Parameters of the plain next-token model with the trial's trunk settings,
    embeddings included. A trial with a shortened trunk stands at the size of the NTP
    model that it is compared with.""",
  "Gain": """NTP minus MTP for losses, MTP minus NTP for shares; positive is better.
    Always between trials of the same size, model seed (the same initial values of the
    layers that both have) and data seed (the same order of the text).""",
  "Interval": """Student's t at 95 % over pairs of seeds. It speaks of seeds, not of the
    choice of held-out documents, which all trials share. One pair has no interval.""",
  "Equal tokens": "Both were trained on the same number of tokens.",
  "Equal FLOPs, equal wall clock": """The MTP trial's model FLOPs, or its training
    seconds (median over seeds) at the median speed of NTP at this size, are turned into
    the tokens that NTP trains on with them. NTP's metric at that many tokens is
    interpolated, linearly in their logarithm, between finished NTP runs of the same
    size and seeds: the plain one and the longer ones of arm "flops". A point in the
    middle of a longer run is not used: its learning rate has not come down yet, which
    would flatter MTP. Beyond the finished runs only a bound is given. Budgets within
    1 % count as equal. The clock runs while training steps run; compilation and
    evaluation are left out. It has no verdict where the seconds per token of equal
    runs differ by more than the method's and NTP's do.""",
  "Slope": """Gain per factor of ten in size: every seed's gains are regressed on log10
    of the size; mean and t interval over the seeds that have every size. The interval
    accounts for seeds, not for a trend that is not a straight line.""",
  "Learning rate": """Where a method was trained with several at one size, the one with
    the most seeds is used, the lowest mean loss among equals.""",
  "Ladder counts": """Every larger NTP model is better than the next smaller one beyond
    seed noise; NTP's learning rate is the best of at least three at every size, with
    worse neighbours on both sides, at most 4 times away; each method's neighbours were
    tried at every size and none is better beyond seed noise (95 %, from the spread of
    paired differences at that size). Learning rates are compared on the seeds that both
    were trained with.""",
}


def definitions() -> str:
  """Returns the section on how the numbers come about."""
  items = "".join(
    f"<dt>{html.escape(term)}</dt><dd>{html.escape(' '.join(text.split()))}</dd>"
    for term, text in _DEFINITIONS.items()
  )
  return f"<h2>How it is computed</h2><dl>{items}</dl>"


def html_page(title: str, body: str) -> str:
  """Returns a whole document that loads nothing from elsewhere."""
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>"
    f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
  )


def html_table(rows: pd.DataFrame) -> str:
  """Returns the rows as an HTML table, escaped."""
  return f'<div class="wide">{rows.to_html(index=False, border=0, na_rep="")}</div>'


def html_figure(figure: Figure, png: Path, title: str, caption: str) -> str:
  """Writes `png` and returns the figure as HTML that holds it; names its CSV file."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  png.write_bytes(buffer.getvalue())
  data = base64.b64encode(buffer.getvalue()).decode()
  return (
    f"<figure><h3>{html.escape(title)}</h3>"
    f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    f"<figcaption>{html.escape(caption)} Numbers: "
    f"<code>{png.with_suffix('.csv').name}</code>.</figcaption></figure>"
  )
