"""Tables for Markdown pages, by pandas."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns a table; the keys of the rows are its columns."""
  frame = pd.DataFrame(list(rows)).fillna("-")
  return frame.to_markdown(index=False, disable_numparse=True)
