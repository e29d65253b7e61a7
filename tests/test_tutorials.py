"""The three paths of the README and the tutorials, run as they stand, but small.

The commands of a page run one after the other in one folder, each on what those before
it left. Every training gets keys that make it tiny; `hf://` asks a Hub on this machine.
Commands for a cluster, and plans, stop before their work in
`test_documented_commands`.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from mtp_jax import interop
from mtp_jax.data.tokenizers import ByteTokenizer
from tests import hf_folders
from tests.commands import ROOT, Commands
from tests.common import random_params
from tests.fake_hub import FakeHub
from tests.quick_xla import xla_flags
from tests.test_documented_commands import BLOCK, joined, module_and_words

PAGES = ["README.md", *sorted(
  str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "tutorials").glob("*.md")
)]
LIMIT = 600  # Seconds for one page; on two idle cores, about one minute.
STEPS = (
  "train.num_steps=2", "train.log_every=1", "train.eval_every=0",
  "checkpoint.every_steps=2", "data.seq_len=16", "data.batch_size=4", "eval.num_rows=4",
  "eval.batch_size=4", "eval.line_prompts=0", "eval.function_prompts=0",
  "data.source=files", "data.path=input.txt",
)
TINY = (
  *STEPS, "trunk.num_layers=2", "trunk.embed_dim=16", "trunk.mlp_dim=16",
  "trunk.num_heads=2", "trunk.num_kv_heads=2",
)
# What is appended to a command, by its name.
SMALLER = {
  "train": TINY, "import": STEPS,
  "sweep": (*STEPS, "--only=embed_dim=16,seed=0,arm=added", "--parallel=1"),
  "generate": ("--max_new_tokens=4",), "demo": ("--max_new_tokens=4",),
}
# These need a scheduler, its runs, or libtpu.
ELSEWHERE = re.compile(r"--on=|mtp-jax status|shared/depth|mtp-jax plan")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Returns a folder with one text, and runs commands in it."""
  folder = tmp_path_factory.mktemp("tutorials")
  (folder / "input.txt").write_text("".join(f"line {i} of it\n" for i in range(4_000)))
  values = {"tokenizer.vocab_size": 264, "data.seq_len": 64}
  config = hf_folders.config_of("qwen2", values)
  interop.export_params(
    random_params(config), config, folder / "published", "qwen2",
    tokenizer=ByteTokenizer(),
  )
  with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
    hub.add("Qwen/Qwen2.5-0.5B", folder / "published")
    patch.setenv("HF_ENDPOINT", hub.endpoint)
    patch.setenv("HF_HOME", str(folder / "home"))
    patch.setenv("PYTHONPATH", str(ROOT))
    with Commands() as server:
      yield folder, server


def run(place, line):
  """Runs one line of a block; returns its output."""
  folder, server = place
  if not line.startswith("mtp-jax "):  # It makes a text.
    line = line.replace("python", shlex.quote(sys.executable), 1)
    return subprocess.run(
      line, shell=True, cwd=folder, check=True, capture_output=True, text=True
    ).stdout
  words = shlex.split(line, comments=True)
  module, *arguments = module_and_words(words)
  is_imported = arguments == ["--workdir=runs/qwen"]  # Its config is in the folder.
  smaller = () if is_imported else SMALLER.get(words[1], ())
  result = server(module, *arguments, *smaller, folder=folder)
  assert result.code == 0, f"{line}\n{result.output}"
  return result.output


@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(place, page):
  folder, _ = place
  text = (ROOT / page).read_text()
  output, blocks = "", list(BLOCK.finditer(text))
  for block, end in zip(blocks, [*(x.start() for x in blocks[1:]), None], strict=True):
    kind, code = block.groups()
    if kind == "python":
      environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}
      subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True,
        env=os.environ | environment,
      )
    for line in joined(code) if kind == "" else ():
      if line.startswith(("mtp-jax ", "python -c")) and not ELSEWHERE.search(line):
        output = run(place, line)
    for promise in re.findall(r"It prints `([^`]+)`", text[block.end() : end]):
      assert promise in output
  folders = {str(x.parent.relative_to(folder)) for x in folder.rglob("DONE")}
  for line in re.findall(r"--workdir=(runs/\S+)", text):
    assert line in folders
  for config in folder.rglob("DONE"):
    assert json.loads((config.parent / "eval.json").read_text())["step"] <= 2
