"""The flags that say how a command decodes, and how it shows the text."""

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from mtp_jax.config import MOST_DRAFTS
from mtp_jax.decode.generate import PROPOSALS
from mtp_jax.decode.verify import RULES

# They belong to the command that asked for them, in its --help.
flags.disclaim_key_flags()


def define(temperature: float | None) -> Callable[[], dict[str, Any]]:
  """Defines the flags; returns a function that reads them for `TrainedModel.generate`.

  `temperature` is the default of its flag: None takes the most likely tokens unless a
  rule, temperature or cut asks for sampling.
  """
  # What is drafted in a round.
  drafts = flags.DEFINE_integer(
    "drafts", None, "tokens drafted per round; by default one per extra predictor, 0 "
    "is plain decoding",
    lower_bound=0, upper_bound=MOST_DRAFTS,
  )
  recurse = flags.DEFINE_bool(
    "recurse", False, "let the last sequential module read its own output where "
    "--drafts is more than there are modules"
  )
  # How drafts are accepted: only the rules differ in what text comes out.
  rule = flags.DEFINE_enum(
    "rule", None, RULES, "how drafts are accepted: greedy takes the most likely "
    "tokens, the others sample. By default match, or greedy where nothing asks for "
    "sampling"
  )
  proposal = flags.DEFINE_enum(
    "proposal", "auto", PROPOSALS, "how drafts are chosen; auto draws them "
    "from the predictors where the rule uses their distribution (leviathan, block)"
  )
  # How tokens are sampled. None stands for a flag that was not given, because any of
  # these flags asks for sampling.
  temperature = flags.DEFINE_float(
    "temperature", temperature, "divides the logits before sampling, 1 changes "
    "nothing; 0 is greedy",
    lower_bound=0.0,
  )
  top_k = flags.DEFINE_integer(
    "top_k", None, "sample among the k most likely tokens", 1, 2**31 - 1
  )
  top_p = flags.DEFINE_float(
    "top_p", None, "sample among the most likely tokens that have this mass together",
    0.0, 1.0,
  )
  min_p = flags.DEFINE_float(
    "min_p", None, "sample among tokens at least so likely, relative to the most "
    "likely",
    0.0, 1.0,
  )

  # Flags are parsed after they are defined, so they are read by a function.
  def chosen() -> dict[str, Any]:
    cuts = {"top_k": top_k.value, "top_p": top_p.value, "min_p": min_p.value}
    has_cut = any(cut is not None for cut in cuts.values())
    heat, how = temperature.value, rule.value
    if heat == 0 and not has_cut and how in (None, "greedy"):
      heat = None
    if how is None:
      how = "greedy" if heat is None and not has_cut else "match"
    return cuts | {
      "rule": how,
      "temperature": heat,
      "num_drafts": drafts.value,
      "proposal": proposal.value,
      "recurse": recurse.value,
    }

  return chosen


def define_color() -> Callable[[], bool]:
  """Defines `--color`; returns a function that returns whether text is coloured."""
  color = flags.DEFINE_enum(
    "color", "auto", ("auto", "always", "never"), "show who proposed each token in "
    "colours; auto: if stdout is a terminal and NO_COLOR is not set"
  )

  def is_colored() -> bool:
    is_wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return {"auto": is_wanted, "always": True, "never": False}[color.value]

  return is_colored
