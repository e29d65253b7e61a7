"""The table of all experiments and presets that have claims."""

from mtp_jax.analysis.claims import (
  acceptance,
  bytes_or_bpe,
  data_repetition,
  drafters,
  gains_with_scale,
  hidden_source,
  kinds,
  look_ahead,
  markov,
  schedules,
  siblings,
  star_graph,
  tasks,
  tax,
)
from mtp_jax.analysis.claims.claim import Experiment

PRESETS = ("cpu", "gpu", "cluster")


def experiments() -> tuple[Experiment, ...]:
  """Returns every experiment in every preset."""
  makers = (
    siblings.experiment, look_ahead.experiment, tax.experiment, star_graph.experiment,
    tasks.sat, tasks.countdown, tasks.polynomial, tasks.induction,
    acceptance.experiment, schedules.experiment, bytes_or_bpe.experiment,
    data_repetition.experiment, hidden_source.experiment, drafters.experiment,
    markov.experiment, kinds.experiment, gains_with_scale.experiment,
  )
  two_presets = drafters.experiment, markov.experiment, kinds.experiment
  of_presets = [
    make(preset) for make in makers for preset in PRESETS
    if preset != "cluster" or make not in two_presets
  ]
  return (
    *of_presets, kinds.siblings_experiment("cpu"),
    star_graph.experiment(star_graph.EASIER),
  )
