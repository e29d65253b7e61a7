"""Claims about multi-token prediction, each with the rule that decides it.

One file an experiment: its claims, how each is tested, its picture. A claim belongs to
an experiment in a preset (`experiments/NAME.py:PRESET`), whose results are kept in the
folder `NAME_PRESET`. A rule is written before the results of its experiment are read,
unless it says otherwise; what is expected is in the experiment's file, from before the
run. Nothing measured stands here. Published figures are those that could be checked in
the paper itself; where there is none, that is said.
"""

from mtp_jax.analysis.claims import (
  acceptance,
  bytes_or_bpe,
  data_repetition,
  drafters,
  gains_with_scale,
  hidden_source,
  look_ahead,
  schedules,
  siblings,
  star_graph,
  tasks,
  tax,
)
from mtp_jax.analysis.claims.claim import NOT_RUN, NOT_TESTED, Claim, Experiment

__all__ = ["NOT_RUN", "NOT_TESTED", "PRESETS", "Claim", "Experiment", "experiments"]
PRESETS = ("cpu", "gpu", "cluster")


def experiments() -> tuple[Experiment, ...]:
  """Returns every experiment in every preset."""
  makers = (
    siblings.experiment, look_ahead.experiment, tax.experiment, star_graph.experiment,
    tasks.sat, tasks.countdown, tasks.polynomial, tasks.induction,
    acceptance.experiment, schedules.experiment, bytes_or_bpe.experiment,
    data_repetition.experiment, hidden_source.experiment, drafters.experiment,
    gains_with_scale.experiment,
  )
  of_presets = [
    make(preset) for make in makers for preset in PRESETS
    if (make, preset) != (drafters.experiment, "cluster")
  ]
  return (*of_presets, star_graph.experiment(star_graph.EASIER))
