"""The documents: links lead somewhere, and the README stays short."""

import re

import pytest

from tests.commands import ROOT

DOCUMENTS = (
  *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
  "README.md", "CONTRIBUTING.md", "launch/README.md", "experiments/README.md",
  "experiments/notebooks/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
  file = ROOT / document
  links = re.findall(r"\]\(([^)#\s]+)", file.read_text())
  paths = [file.parent / link for link in links if "://" not in link]
  assert [str(path) for path in paths if not path.exists()] == []


def test_the_readme_is_short_and_begins_with_what_to_do():
  lines = (ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 90
  first = "\n".join(lines[:20])
  assert all(
    x in first for x in ("pip install .", "mtp-jax demo", "make reproduce", "make test")
  )
  paths = "\n".join(lines).partition("## Three paths")[2].partition("\n## ")[0]
  for block in re.findall(r"```\n(.*?)```", paths, re.DOTALL):
    commands = re.sub(r"\\\n", "", block).splitlines()
    assert len(commands) == 3
    assert all(line.startswith("mtp-jax ") and "#" in line for line in commands)
