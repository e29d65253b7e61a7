"""The error of unusable input data."""


class DataError(ValueError):
  """Input data that cannot be used; the message says where and why."""
