"""What `mkdocs build` adds to docs/: pages from elsewhere, keys, help of commands.

A page keeps its path in the repository, without `docs/`; README.md is the first page.
Links to files that the site does not have become plain text.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from launch import config, words  # noqa: E402

PAGES = (
  "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md",
  "experiments/README.md", "experiments/notebooks/README.md",
  "experiments/results/findings/findings.md",
  "experiments/results/benchmarks/README.md",
)
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_TEXT_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages, and the pictures that pages show."""
  found = set(PAGES)
  for name in [*PAGES, *(f"docs/{x.src_uri}" for x in files.documentation_pages())]:
    links = (match[1] for match in _LINK.finditer((ROOT / name).read_text()))
    found |= {_target(name, link) for link in links if link.endswith(".png")}
  for name in sorted(found):
    if not name.startswith("docs/"):
      path = str(ROOT / name)
      files.append(File.generated(config, _place(name), abs_src_path=path))
  return files


def on_page_markdown(text: str, page: Page, files: Files, **_: Any) -> str:
  """Fills in what is generated, and turns links of the repository into the site's."""
  uri = page.file.src_uri
  name = "README.md" if uri == "index.md" else uri
  name = name if name in PAGES else f"docs/{name}"
  if name == "launch/README.md":
    text += "".join(map(_help, words.COMMANDS))
  if name == "docs/reference/keys.md":
    text += _keys()
  text = text.replace("<details>", "<details markdown>")
  places = {file.src_uri for file in files}

  def link(match: re.Match) -> str:
    mark, label, target, anchor = match.groups()
    if "://" in target:
      return match[0]
    place = _place(_target(name, target))
    if place not in places:
      return label
    relative = posixpath.relpath(place, posixpath.dirname(uri) or ".")
    return f"{mark}[{label}]({relative}{anchor or ''})"

  return _TEXT_LINK.sub(link, text)


def _target(name: str, link: str) -> str:
  """Returns the path in the repository that a link of a page leads to."""
  return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _place(name: str) -> str:
  """Returns the path in the site of a file of the repository."""
  return "index.md" if name == "README.md" else name.removeprefix("docs/")


def _help(command: str) -> str:
  """Returns the section of one command: the docstring of its module."""
  source = (ROOT / "launch" / f"{words.COMMANDS[command]}.py").read_text()
  return f"\n## {command}\n\n```text\n{ast.get_docstring(ast.parse(source))}\n```\n"


def _keys() -> str:
  """Returns a table of the keys of every section."""
  parts, section = [], None
  for name in config.keys():
    if (head := name.rpartition(".")[0]) != section:
      section = head
      parts += [f"\n## {head or 'top'}\n", "| key | type | default | meaning |"]
      parts.append("|---|---|---|---|")
    key = config.keys()[name]
    facts = " ".join([f"{key.meaning}.", *config.rules(name)]).replace("|", "\\|")
    kind = config.type_name(name).replace("|", "\\|")
    parts.append(f"| `{name}` | {kind} | `{key.default!r}` | {facts} |")
  return "\n".join(parts) + "\n"
