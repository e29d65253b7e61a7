"""Bytes or BPE: what extra heads cost in bits per byte on either."""

import functools

import pandas as pd

from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import parallel, penalty
from mtp_jax.analysis.claims.pictures import line_picture
from mtp_jax.analysis.drawing import COLOURS, series_marker
from mtp_jax.analysis.results import Results


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "bytes_or_bpe", preset, "Bytes or BPE",
    "Bits per byte more than NTP's, mean and 95 % t interval over seeds.",
    tuple(
      claim.Claim(
        f"bytes_pay_less_{n}", f"Bytes pay less for n = {n} than BPE",
        f"{claim.AYNETDINOV}; {claim.GLOECKLE}, table 1", published,
        f"penalty of n = {n} in bits per byte on BPE minus on bytes, {claim.PAIRED}",
        claim.BITS, functools.partial(bytes_pay_less, n=n),
      )
      for n, published in (
        (4, claim.NO_FIGURE),
        (8, "pass rates only, 7B, n = 1 and 8, MBPP pass@1: bytes 19.3 and 32.3 %, "
            "subwords 30.0 and 30.7 %"),
      )
    ),
    draw,
  )


def bits_penalty(results: Results, tokenizer: str, n: int) -> pd.Series:
  """Returns bits per byte of n heads minus those of NTP, a seed."""
  at = {"tokenizer.kind": tokenizer}
  return penalty(results, parallel(n), at, "bits_per_byte")


def bytes_pay_less(results: Results, n: int) -> claim.Finding:
  bpe, own = (bits_penalty(results, kind, n) for kind in ("bpe", "bytes"))
  return claim.found(bpe - own, "penalty on BPE minus on bytes")


def draw(results: Results) -> claim.Drawing:
  """Draws the penalty in bits per byte against n, one line a tokenizer."""
  rows = pd.concat([
    bits_penalty(results, kind, n).rename("value").reset_index().assign(
      predicted=n, tokenizer=kind
    )
    for kind in ("bytes", "bpe") for n in (4, 8)
  ])
  styles = {
    ("bytes",): {"color": COLOURS["parallel"], "marker": series_marker(0)},
    ("bpe",): {
      "color": COLOURS["sequential"], "marker": series_marker(1), "linestyle": "--"
    },
  }
  return line_picture(
    rows, "predicted", ["tokenizer"], styles,
    xlabel="tokens predicted at once, n", ylabel="bits per byte over NTP",
  )
