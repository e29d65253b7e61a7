"""The frame of a page: Markdown tables and folds, and one HTML file made of them."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; color: #1a1a1a; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; display: block;
        overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #e3e3e3; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
"""


def table(rows: pd.DataFrame) -> str:
  """Returns the rows as a Markdown table; what is missing stays empty."""
  cells = rows.astype(object).where(rows.notna(), "").astype(str)
  cells = cells.apply(lambda column: column.str.replace("|", "/"))
  return cells.to_markdown(index=False, disable_numparse=True)


def details(title: str, lines: Iterable[str]) -> list[str]:
  """Returns the lines of a part of a page that is folded away."""
  summary = f"<summary>{title}</summary>"
  return ["<details>", summary, "", *lines, "", "</details>", ""]


def code(text: str) -> str:
  """Returns text that Markdown shows as it is."""
  return f"`{text}`" if text else ""


def html(markdown: str, title: str, folder: Path) -> str:
  """Returns a whole document that loads nothing: images of `folder` are part of it."""
  body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)

  def embed(source: re.Match) -> str:
    data = base64.b64encode((folder / source[1]).read_bytes()).decode()
    return f'src="data:image/png;base64,{data}"'

  body = re.sub(r'src="([\w.]+\.png)"', embed, body)
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>{body}</body>"
    f"</html>\n"
  )
