"""Text that a model writes: whose documents it begins with, what it goes on with, and
a command that is stopped and goes on.
"""

import hashlib
import json

import numpy as np
import pytest

import mtp_jax
from mtp_jax import self_distillation
from mtp_jax.config import with_overrides
from mtp_jax.data import distilled_text
from mtp_jax.data.pipeline import load_corpus
from tests import common, tiny_runs
from tests.corpora import some_texts, write_jsonl
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)

MODULE = "launch.write_corpus"
ROW, EXCERPT, TEXTS = 24, 6, 45
BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("writing")


@pytest.fixture(scope="module")
def texts(folder):
  """Returns long and short texts; the corpus is made of them."""
  found = [*some_texts(30), "ab", "漢", "n = 1"]
  write_jsonl(folder / "texts.jsonl", found)
  return found


@pytest.fixture(scope="module")
def run(folder, texts):
  """Returns a run whose untrained model mostly says ASCII, and ends now and then."""
  shape = {
    "trunk.kind": "gpt2", "trunk.num_kv_heads": 4, "trunk.num_layers": 1,
    "trunk.embed_dim": 8, "mtp.depth": 1, "data.seq_len": ROW,
    "data.source": "jsonl",
  }
  config = tiny_runs.run_config(folder / "texts.jsonl", shape)
  params = common.random_params(config)
  params["final_norm"]["bias"][:] = 1.0
  params["unembed"]["kernel"][:, 128:] -= 0.6  # Logits, 8 * 0.6 lower.
  params["unembed"]["kernel"][:, EOS] += 0.9
  return save_run(folder / "run", config, params)


@pytest.fixture(scope="module")
def model(run):
  return mtp_jax.load(run)


@pytest.fixture(scope="module")
def corpus(model):
  return load_corpus(model.config)


@pytest.fixture(scope="module")
def lines(model, corpus):
  excerpts = self_distillation.Excerpts(corpus, EXCERPT, None, seed=5)
  return write(model, [excerpts[i] for i in range(TEXTS)])


def write(model, excerpts, **how):
  how = {"rule": "match"} | how
  return self_distillation.write(model, excerpts, ROW - EXCERPT, seed=7, **how)


def tokens_of(texts, document):
  by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
  return [BOS, *by_hash[document].encode(), EOS]


def text_of(tokens, is_ended):
  """Returns what Python's strict decoder makes of whole characters, None if nothing."""
  if any(token > 255 for token in tokens):
    return None
  raw = bytes(tokens)
  while raw and 0x80 <= raw[0] < 0xC0:  # The rest of a character before.
    raw = raw[1:]
  for cut in range(1 if is_ended else 4):
    try:
      return raw[: len(raw) - cut].decode() or None
    except UnicodeDecodeError:
      pass
  return None


def test_excerpts_are_of_training_documents_in_the_order_of_the_run(corpus, texts):
  excerpts = self_distillation.Excerpts(corpus, EXCERPT, None, seed=5)
  order = corpus.documents("train", corpus.config.data.seed)
  train = [corpus.store.hashes_NX[i].tobytes().hex() for i in order]
  found = [excerpts[i] for i in range(3 * len(train))]
  assert [x.document for x in found] == 3 * train
  assert len(train) < len(texts)  # The others are held out.
  for x in found:
    tokens = tokens_of(texts, x.document)
    assert 0 <= x.begin and x.tokens.tolist() == tokens[x.begin :][: len(x.tokens)]
    assert len(x.tokens) == min(EXCERPT, len(tokens) - 1)
    assert x.begin + len(x.tokens) <= len(tokens) - 1  # Never its end.
  first, second = found[: len(train)], found[len(train) : 2 * len(train)]
  moved = [a.begin != b.begin for a, b in zip(first, second, strict=True)]
  assert np.mean(moved) > 0.6  # Short documents leave no choice.


def test_places_are_uniform(corpus):
  documents = corpus.documents("train", corpus.config.data.seed)
  number = int(np.argmin(corpus.store.lengths_N[documents]))
  length = int(corpus.store.lengths_N[documents[number]]) - 3  # Leaves three places.
  places = [
    self_distillation.Excerpts(corpus, length, None, seed)[
      number + seed * len(documents)
    ].begin
    for seed in range(2000)
  ]
  counts = np.bincount(places, minlength=3)
  assert len(counts) == 3 and np.sum((counts - 2000 / 3) ** 2 / (2000 / 3)) < 14


def test_a_place_may_be_given(corpus, texts):
  for at in (0, 4, 10**6):
    for number in range(9):
      x = self_distillation.Excerpts(corpus, EXCERPT, at, seed=0)[number]
      latest = max(0, len(tokens_of(texts, x.document)) - 1 - EXCERPT)
      assert x.begin == min(at, latest)


def test_texts_are_excerpt_and_plain_continuation(model, corpus, texts, lines):
  """Each alone, without drafts: what it says depends on its number only."""
  found = {line["number"]: line for line in lines}
  excerpts = self_distillation.Excerpts(corpus, EXCERPT, None, seed=5)
  kinds = set()
  for number in range(TEXTS):
    x = excerpts[number]
    completion = model.generate(
      x.tokens, ROW - EXCERPT, rule="match", num_drafts=0, seed=7, first=number
    ).completion
    new = completion.tokens.tolist()
    is_ended = new[-1] == EOS
    before = [token for token in x.tokens.tolist() if token != BOS]
    text = text_of(before + new[: len(new) - is_ended], is_ended)
    if text is None:
      assert number not in found
    else:
      assert found[number] == {
        "text": text, "bos": x.begin == 0, "eos": is_ended, "number": number,
        "document": x.document, "begin": x.begin, "excerpt_tokens": len(x.tokens),
      }
    cut = text is not None and len(text.encode()) < len(before + new) - is_ended
    kinds |= {(text is None, is_ended, x.begin == 0), "cut" if cut else ""}
  # All of it happens here.
  assert {"cut", (False, True, False), (False, False, True), (True, False, False)} <= (
    kinds
  )


def test_texts_can_be_trained_on_as_they_are(model, lines, folder):
  file = folder / "lines.jsonl"
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  config = with_overrides(model.config, {"data.train_on": str(file)})
  store = load_corpus(config).train_rows(1).store
  expected = sorted(
    [BOS] * line["bos"] + [*line["text"].encode()] + [EOS] * line["eos"]
    for line in lines
  )
  found = [store.read(i, 0, int(n)).tolist() for i, n in enumerate(store.lengths_N)]
  assert sorted(found) == expected
  assert max(map(len, found)) == ROW
  assert distilled_text.load(str(file)).stats.num_documents == len(lines)


def test_settings_of_decoding_are_passed_on(model, corpus):
  source = self_distillation.Excerpts(corpus, EXCERPT, None, seed=5)
  excerpts = [source[i] for i in range(8)]
  with pytest.raises(ValueError, match=r"^temperature must be positive"):
    write(model, excerpts, temperature=0.0)
  length = ROW - EXCERPT
  one, other = (  # Of one token nothing is drawn.
    self_distillation.write(
      model, excerpts, length, seed, rule="match", top_k=1, num_drafts=0
    )
    for seed in (0, 1)
  )
  assert one == other


@pytest.fixture
def flags(run, folder, tmp_path):
  return (
    f"--workdir={run}", f"--output={tmp_path / 'new/it.jsonl'}", "--seed=5",
    f"--documents={TEXTS}", f"--excerpt_tokens={EXCERPT}", "--batch_size=16",
    f"--compilation_cache={folder / 'cache'}",
  )


def test_a_stopped_command_goes_on_to_the_same_file(command, flags, tmp_path, corpus):
  result = command(MODULE, *flags)
  output = tmp_path / "new/it.jsonl"
  assert result.code == 0, result.output
  content = output.read_bytes()
  found = [json.loads(line) for line in content.splitlines()]
  numbers = [line["number"] for line in found]
  assert numbers == sorted(set(numbers)) and numbers[-1] < TEXTS
  excerpts = self_distillation.Excerpts(corpus, EXCERPT, None, seed=5)
  assert all(line["document"] == excerpts[line["number"]].document for line in found)
  counts = {"texts": len(found), "left_out": TEXTS - len(found)}
  about = json.loads((tmp_path / "new/it.about.json").read_text())
  assert about["counts"] == counts and 0 < counts["left_out"] < TEXTS
  assert f"{counts['texts']} texts; {counts['left_out']} left out" in result.output
  assert about["command"].startswith(f"python -m {MODULE} --workdir=")
  assert about["settings"]["temperature"] == 1 and about["settings"]["rule"] == "match"
  assert {"commit", "workdir"} <= about.keys()

  # As it was when a kill came amid a line of the third batch, and of the first one.
  part = tmp_path / "new/it.jsonl.part"
  for kept in (content.splitlines(keepends=True)[:-1], []):
    output.unlink()
    part.write_bytes(b"".join(kept) + b'{"text": "cut')
    assert command(MODULE, *flags).code == 0
    assert output.read_bytes() == content and not part.exists()

  again = command(MODULE, *flags)
  assert again.code == 0 and "is whole already: " in again.output
  assert output.read_bytes() == content
  other = command(MODULE, *flags, "--seed=6", "--top_k=3")
  assert other.code == 2
  assert (
    "was begun with other settings: seed is 6 now and was 5 there; top_k is 3 now and "
    "was None there." in other.output
  )


@pytest.mark.parametrize("more, message", [
  (["--output=it.json"], "--output must end in .jsonl, got 'it.json'."),
  ([f"--excerpt_tokens={ROW}"], "--excerpt_tokens must leave room in a row (data.s"),
  (["--workdir=/no/run"], "/no/run must be a folder; there is no such folder."),
  (["--top_p=0"], "top_p must be a number in (0, 1], or None, got 0.0."),
  (["--top_p=2"], "flag --top_p=2: 2.0 is not a number in the range [0.0, 1.0]"),
  (["--documents=0"], "flag --documents=0: 0 is not a positive integer"),
])
def test_bad_input_ends_in_one_message(command, flags, tmp_path, more, message):
  result = command(MODULE, *flags, *more)
  assert result.code == 2
  assert message in result.output
  assert "Traceback" not in result.output
  assert not (tmp_path / "new").exists()


def test_files_of_others_are_not_overwritten(command, flags, tmp_path):
  output = tmp_path / "new/it.jsonl"
  output.parent.mkdir()
  output.write_text("mine")
  result = command(MODULE, *flags)
  assert result.code == 2
  assert "exists without a it.about.json of this command." in result.output
  assert output.read_text() == "mine"


def test_a_model_that_says_no_text_is_told_of(command, flags, folder, model):
  save_run(folder / "wild", model.config)  # Half of its bytes are no ASCII.
  result = command(MODULE, *flags, f"--workdir={folder / 'wild'}", "--documents=9")
  assert result.code == 1
  assert "0 texts; 9 left out" in result.output
  assert result.output.endswith(": there is nothing to train on.\n")


def test_a_run_on_a_task_has_no_documents(command, flags, folder, model):
  task = {"data.source": "siblings", "tokenizer.kind": "symbols"}
  save_run(folder / "task", with_overrides(model.config, task))
  result = command(MODULE, *flags, f"--workdir={folder / 'task'}")
  assert result.code == 2
  assert (
    "--workdir must be a run on text, got one of data.source 'siblings'."
    in result.output
  )


def test_a_corpus_that_is_gone_is_missed(command, flags, folder, model):
  bpe = {"tokenizer.kind": "bpe"}  # The checkpoint has another.
  save_run(folder / "bpe", with_overrides(model.config, bpe))
  result = command(MODULE, *flags, f"--workdir={folder / 'bpe'}")
  assert result.code == 2
  assert "must be a run whose corpus is still there: " in result.output
