"""The documentation as a site: it builds without a warning, and has all there is."""

import re
import subprocess
import sys

import pytest
import yaml

from launch import words
from mtp_jax.config import keys
from tests.commands import ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def _places(nav):
  for entry in nav:
    for value in entry.values():
      yield from _places(value) if isinstance(value, list) else [value]


def test_every_page_has_its_place_in_the_navigation():
  pages = {str(x.relative_to(ROOT / "docs")) for x in (ROOT / "docs").rglob("*.md")}
  places = list(_places(CONFIG["nav"]))
  assert pages <= set(places) and len(places) == len(set(places))
  assert all((ROOT / place).is_file() for place in set(places) - pages - {"index.md"})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  for name in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(name, reason="the extra docs is not installed")
  folder = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
    cwd=ROOT, capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
def test_the_site_builds_and_has_every_page(site):
  for place in _places(CONFIG["nav"]):
    folder = site / place.removesuffix(".md")
    folder = folder.parent if folder.name in ("README", "index") else folder
    assert (folder / "index.html").is_file(), place


@pytest.mark.slow
def test_the_site_has_every_key_command_and_picture(site):
  table = (site / "reference" / "keys" / "index.html").read_text()
  assert all(f"<code>{name}</code>" in table for name in keys())
  commands = (site / "launch" / "index.html").read_text()
  heads = set(re.findall(r'<h2 id="(\w+)"', commands))
  assert heads == set(words.COMMANDS)
  first = (site / "index.html").read_text()
  pictures = re.findall(r'src="([^"]+\.png)"', first)
  assert pictures and all((site / x).is_file() for x in pictures)
  reference = (site / "reference" / "python" / "index.html").read_text()
  assert 'id="mtp_jax.trained_model.TrainedModel.generate"' in reference
