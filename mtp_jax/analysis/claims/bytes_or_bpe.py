"""Bytes or BPE: what extra heads cost in bits per byte on either."""

import functools

import pandas as pd

from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import parallel, penalty
from mtp_jax.analysis.results import Results


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "bytes_or_bpe", preset, "Bytes or BPE",
    "What heads cost in bits per byte on BPE minus on bytes, mean and 95 % t interval "
    "over seeds.",
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
  )


def bits_penalty(results: Results, tokenizer: str, n: int) -> pd.Series:
  """Returns bits per byte of n heads minus NTP's, a seed."""
  at = {"tokenizer.kind": tokenizer}
  return penalty(results, parallel(n), at, "bits_per_byte")


def bytes_pay_less(results: Results, n: int) -> claim.Finding:
  bpe, own = (bits_penalty(results, kind, n) for kind in ("bpe", "bytes"))
  return claim.found(bpe - own, "penalty on BPE minus on bytes")
