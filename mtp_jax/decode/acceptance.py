"""How much of what was drafted was kept: the figures that papers call acceptance.

They are measured while decoding, on the model's own text. What extra predictors agree
with on true prefixes is teacher-forced agreement (`mtp_jax.evaluate`): rounds begin
after failures, at hard tokens, so that the two differ even at the first draft, and
rates at one draft do not compare across K.

Legend: N prompts, K drafts, Z resamples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.decode.generate import Completion

DEFINITIONS = {
  "round": "one run of the target on the newest token and K drafts, or on the nodes of "
  "a tree of depth K, whose draft k is its accepted node of depth k; the prefill and "
  "the token that it commits are in no figure but `tokens`",
  "emitted draft": "accepted by the rule and committed; a draft after a stop token or "
  "past the limit is not",
  "tau": "tokens committed in rounds / rounds; the target's own token after the drafts "
  "is included, so that plain decoding has 1",
  "survival": "S_k = rounds in which draft k was emitted / rounds; tau is 1 + sum of "
  "S_k, but for rounds that a stop token or the limit cut",
  "conditional": "alpha_k = rounds in which draft k was emitted / rounds in which it "
  "could be, because all before it were and none of them ended the sequence",
  "accepted_per_drafted": "drafts emitted / drafts made (rounds * K)",
  "histogram": "rounds by the number of drafts emitted in them, 0 to K",
  "interval": "low and high: 95 % bootstrap percentile interval; prompts are drawn "
  "with replacement, and a figure is a ratio of sums over the prompts drawn",
}

_LEVEL = 0.95


def summarize(
  completions: Sequence[Completion], *, seed: int = 0, num_resamples: int = 2000
) -> dict[str, Any]:
  """Returns the figures of `DEFINITIONS` as JSON values, with intervals over prompts.

  Every mean is `{"mean", "low", "high"}`; lists have an entry per draft, the first
  first. A ratio of nothing is None.

  Args:
    completions: at least one, all with the same K.
    seed, num_resamples: Z, of the bootstrap.

  Raises:
    ValueError: no completion, or different K.
  """
  drafts = {len(completion.accepted) for completion in completions}
  if len(drafts) != 1:
    raise ValueError(
      "completions must be at least one and have one number of drafts, got "
      f"{len(completions)} with {sorted(drafts)}."
    )
  (K,) = drafts
  tokens_N, rounds_N, accepted_NK, reached_NK = counts(completions)
  histogram_NR = np.stack([completion.histogram for completion in completions])
  # How often each prompt is drawn: a figure of all resamples is one product then.
  count = len(completions)
  generator = np.random.default_rng(seed)
  draws_ZN = generator.multinomial(count, np.full(count, 1 / count), num_resamples)

  def mean(above_N: np.ndarray, below_N: np.ndarray) -> dict[str, float | None]:
    return _ratio_of_sums(above_N, below_N, draws_ZN)

  return {
    "definitions": DEFINITIONS,
    "bootstrap": {"seed": seed, "num_resamples": num_resamples, "level": _LEVEL},
    "num_prompts": count,
    "num_drafts": K,
    "tokens": int(tokens_N.sum()) + count,  # The prefill commits one each.
    "rounds": int(rounds_N.sum()),
    "tau": mean(tokens_N, rounds_N),
    "survival": [mean(accepted_NK[:, k], rounds_N) for k in range(K)],
    "conditional": [mean(accepted_NK[:, k], reached_NK[:, k]) for k in range(K)],
    "accepted_per_drafted": mean(accepted_NK.sum(axis=1), rounds_N * K),
    "histogram": histogram_NR.sum(axis=0, dtype=np.int64).tolist(),
  }


def counts(
  completions: Sequence[Completion],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns `(tokens_N, rounds_N, accepted_NK, reached_NK)`, all figures' ingredients.

  The token of the prefill is left out, so that tokens / rounds is tau.
  """
  tokens_N = np.array([len(completion.tokens) - 1 for completion in completions])
  rounds_N = np.array([completion.rounds for completion in completions])
  stack = lambda name: np.stack(  # noqa: E731
    [getattr(completion, name) for completion in completions]
  ).astype(np.int64)
  return tokens_N, rounds_N, stack("accepted"), stack("reached")


def _ratio_of_sums(
  above_N: np.ndarray, below_N: np.ndarray, draws_ZN: np.ndarray
) -> dict[str, float | None]:
  if not below_N.sum():
    return {"mean": None, "low": None, "high": None}
  with np.errstate(invalid="ignore", divide="ignore"):
    ratio_Z = (draws_ZN @ above_N) / (draws_ZN @ below_N)
  # A resample may miss every prompt that counts: then its ratio is NaN.
  tail = 50 * (1 - _LEVEL)
  low, high = np.nanpercentile(ratio_Z, [tail, 100 - tail])
  mean = above_N.sum() / below_N.sum()
  return {"mean": float(mean), "low": float(low), "high": float(high)}
