"""Multi-token prediction in JAX. Importing the package does no work."""


def load(path, step=None, mesh=None):
  """Returns a trained model, ready to be looked at: see `mtp_jax.trained_model.load`.

  Args:
    path: a run folder, its `checkpoints`, or one checkpoint.
    step: which checkpoint of a run; None is the newest whole one.
    mesh: from `sharding.make_mesh`, to spread the parameters; None is the first device.
  """
  from mtp_jax import trained_model  # Here, because it starts with importing JAX.

  return trained_model.load(path, step, mesh)
