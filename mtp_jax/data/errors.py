"""The error of unusable input data, and the import of packages that few inputs need."""

import importlib
from types import ModuleType


class DataError(ValueError):
  """Input data that cannot be used; the message names the place and the reason."""


def require(name: str, what: str) -> ModuleType:
  """Imports a package that only some input needs.

  Raises:
    DataError: the package is not installed; `what` needs it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    package = name.partition(".")[0]
    raise DataError(
      f"{what} needs the package {package}, which must be installed ({error}): "
      f"pip install {package}."
    ) from error
