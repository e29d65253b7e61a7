"""What goes wrong with a model folder of another framework."""


class InteropError(ValueError):
  """A folder that cannot be read, or a model that has no place in a layout."""
