"""The command that continues a prompt: what it prints, and how it refuses bad input."""

import re

import numpy as np
import pytest

from launch import comparison
from tests import tiny_runs
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)

MODULE = "launch.generate"
LENGTH = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns the flags of a run with one sequential module, and of a shared cache."""
  folder = tmp_path_factory.mktemp("generate")
  shape = {"trunk.num_layers": 1, "trunk.embed_dim": 8, "mtp.depth": 1}
  config = tiny_runs.run_config(folder, shape)
  workdir = save_run(folder / "run", config)
  return (
    f"--workdir={workdir}", f"--compilation_cache={folder / 'cache'}",
    f"--max_new_tokens={LENGTH}",
  )


def test_text_is_that_of_plain_decoding_streamed_or_not(command, run):
  start = (MODULE, *run, "--prompt=def ")
  result = command(*start)
  assert result.code == 0
  assert result.output.startswith("def ")
  text, found, rest = result.output.partition(f"\n{LENGTH} tokens, the first by")
  assert found and re.search(r"in \d+ rounds: tau = [12]\.\d\d tokens per round", rest)
  assert re.search(r"\naccepted where reached: draft 1 \d+%\n", rest)
  assert re.search(r"\d s, plain decoding .* s: \d+\.\d\d times as fast", rest)
  assert rest.endswith("identical to plain decoding: yes\n")

  streamed = command(*start, "--stream", "--nocompare")
  assert streamed.output.partition("\n24 tokens")[0] == text
  assert "plain decoding" not in streamed.output

  grown = command(*start, "--tree=dynamic:3,2,6")
  assert grown.output.partition("\n24 tokens")[0] == text
  assert "draft 3" in grown.output
  assert grown.output.endswith("identical to plain decoding: yes\n")

  plain = command(*start, "--drafts=0")
  assert plain.output.partition("\n24 tokens")[0] == text
  assert plain.output.endswith("\nplain decoding: nothing was drafted\n")

  colored = command(*start, "--color=always", "--nocompare")
  assert "\x1b[" in colored.output and "\x1b[" not in result.output


def test_stops_end_the_text_before_them_and_special_tokens_have_names(command, run):
  start = (MODULE, *run, "--prompt=def ", "--temperature=1", "--seed=1")
  whole = command(*start, "--drafts=0").output
  text = re.split(r"\n\d+ tokens, ", whole)[0].removeprefix("def ")
  stop = re.search("[!-~]{1,2}", text[1:])[0]
  expected = f"def {text[: text.find(stop)]}"
  stops = (f"--stop={stop}", "--stop=\U0001f642", "--nocompare")
  for more in ([], ["--stream"], ["--drafts=2", "--recurse"]):
    result = command(*start, *stops, *more)
    assert result.code == 0, result.output
    assert re.split(r"\n\d+ tokens, ", result.output)[0] == expected
  result = command(*start, f"--stop={stop}", "--stop=<|eos|>")
  assert result.output.endswith("identical to plain decoding: yes\n")
  result = command(*start, "--stop=")
  assert result.code == 2
  assert result.output == "error: stop must have no empty string, got ''.\n"


def test_sampling_goes_on_from_a_file_as_plain_sampling_does(command, run, tmp_path):
  path = tmp_path / "start.py"
  path.write_text("def f1(x):\n  total = left")
  start = (MODULE, *run, f"--prompt_file={path}", "--nobos", "--seed=3")
  match = command(*start, "--temperature=0.7", "--drafts=2", "--recurse")
  assert match.code == 0
  assert match.output.startswith(path.read_text())
  assert "draft 2" in match.output
  assert match.output.endswith("identical to plain decoding: yes\n")


@pytest.mark.parametrize("flags, message", [
  (["--prompt="], "--prompt must have at least one character, got ''."),
  ([], "one of --prompt and --prompt_file is required."),
  (["--prompt=a", "--prompt_file=b"], "is required, got both ('a' and 'b')."),
  (["--prompt_file=/no/file"], "--prompt_file must be a readable text file, got '/no/"),
  (["--prompt=a", "--drafts=2"], "num_drafts must be at most the model's 1 extra pred"),
  (["--prompt=a", "--tree=dynamic:2"], "--tree: tree must be dynamic:DEPTH,WIDTH,NOD"),
  (["--prompt=a", "--tree=dynamic:2,2,9"], "--tree: num_nodes of a tree must be at mo"),
  (["--prompt=a", "--tree=dynamic:2,2,3", "--rule=block"], "a tree must have rule 'gr"),
  (["--prompt=a", "--rule=block", "--proposal=argmax"], "rule 'block' must have the d"),
  (["--prompt=a", "--rule=match", "--temperature=0"], "temperature must be positive, "),
  (["--prompt=a", "--rule=greedy", "--top_k=3"], "rule 'greedy' takes the arg max and"),
  (["--prompt=a", "--step=5"], "no checkpoint of step 5 in "),
  (
    ["--prompt=a", "--workdir=/no/run"],
    "/no/run must be a folder; there is no such folder.",
  ),
  (["--prompt=a", "--rule=typical"], "value should be one of <greedy|match|leviathan"),
])
def test_bad_input_ends_in_one_message(command, run, flags, message):
  result = command(MODULE, *run, *flags)
  assert result.code == 2
  assert message in result.output
  assert "Traceback" not in result.output


def test_help_has_examples_and_needs_no_backend(command):
  result = command(MODULE, "--help")
  assert result.code == 0 and not result.touched_backend
  assert result.output.count("mtp-jax generate ") >= 2


def test_words_about_the_text_of_plain_decoding(monkeypatch):
  class Fake:
    def __init__(self, tokens):
      self.tokens = np.array(tokens)

  monkeypatch.setattr(comparison, "_SHORT_SECONDS", 0.0)
  asked = []

  def words(rule, ours, theirs):
    def complete(**how):
      asked.append((how["rule"], how["num_drafts"]))
      return Fake(theirs if how["num_drafts"] == 0 else ours)

    how = {"rule": rule, "num_drafts": None}
    times, same = comparison.compare(complete, how).words().splitlines()
    assert times.endswith(" times as fast")
    return same

  no = "identical to plain decoding: no, from new token 3 on"
  assert words("greedy", [1, 2, 3], [1, 2, 3]) == "identical to plain decoding: yes"
  assert words("greedy", [1, 2, 3], [1, 2, 4]) == no
  assert words("match", [1, 2, 3], [1, 2]) == no
  assert words("block", [1], [2]) == "equal to plain sampling in distribution"
  assert asked[-1] == ("match", 0)
