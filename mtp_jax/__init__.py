"""Multi-token prediction in JAX. Importing the package does no work."""

__version__ = "0.1.0"


def load(path, step=None, mesh=None):
  """Returns a `trained_model.TrainedModel`.

  Args:
    path: a run folder, its `checkpoints`, or one checkpoint.
    step: the checkpoint of a run; None is the newest undamaged one.
    mesh: from `sharding.make_mesh`, for the parameters; None is the first device.
  """
  from mtp_jax import trained_model  # Here, because it imports JAX.

  return trained_model.load(path, step, mesh)


def demo_checkpoint():
  """Returns the folder of the small checkpoint that the package ships, for `load`.

  Python source, sequential modules with D = 3; made.json in it has how it was made.
  """
  from pathlib import Path

  return Path(__file__).parent / "demo"
