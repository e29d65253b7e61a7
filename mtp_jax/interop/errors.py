"""The error of import and export."""


class InteropError(ValueError):
  """A model folder that cannot be read, or a model that a layout cannot hold."""
