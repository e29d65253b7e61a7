"""Shared setup of the experiments on text; not an experiment itself.

Models are rungs of the ladders of gains_with_scale.py. Preset `cluster` has larger
models or more seeds than `gpu`, from the same ladder.
"""

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import Size
from experiments.task_setup import check_preset


def text_config(experiment: str, preset: str) -> ConfigDict:
  """Returns the config of the ladder; on a CPU with 512 bytes a step.

  Raises:
    ValueError: preset is not one of `task_setup.PRESETS`.
  """
  check_preset(preset)
  config = gains_with_scale.get_config(_ladder(preset))
  config.name = f"{experiment}_{preset}"
  if preset == "cpu":
    config.data.batch_size = 4
  return config


def model(preset: str, size: Size) -> dict:
  """Returns the overrides of one size."""
  return gains_with_scale.rung(_ladder(preset), size)


def _ladder(preset: str) -> str:
  return "cpu" if preset == "cpu" else "gpu"
