"""Pages of figures: Markdown with tables, by pandas, and a JSON file beside it."""

import datetime
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mtp_jax import environment
from mtp_jax.files import write_json


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns a table; the keys of the rows are its columns."""
  frame = pd.DataFrame(list(rows)).fillna("-")
  return frame.to_markdown(index=False, disable_numparse=True)


def facts(command: Iterable[str], packages: Iterable[str]) -> dict[str, Any]:
  """Returns where figures come from: command, date, commit, versions of packages.

  `command` is the module and what it is given before the flags of this process.
  """
  return {
    "command": f"python -m {shlex.join([*command, *sys.argv[1:]])}",
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "commit": environment.code_commit() or "unknown",
    "versions": environment.versions(packages),
  }


def write_page(
  path: Path | None, title: str, record: Mapping[str, Any], parts: Iterable[str]
) -> None:
  """Prints a page, and writes it as PATH.md and the record as PATH.json.

  Args:
    path: without an ending; None writes nothing.
    title: of the page.
    record: from `facts`, with the figures.
    parts: paragraphs and tables.
  """
  versions = ", ".join(f"{name} {x}" for name, x in record["versions"].items())
  head = f"{record['date']}, commit {record['commit']}; {versions}."
  text = "\n\n".join([f"# {title}", f"`{record['command']}`", head, *parts]) + "\n"
  print(f"\n{text}")
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.md").write_text(text)
    write_json(path.with_name(f"{path.name}.json"), record)
    print(f"written to {path}.md and .json")
