"""A prepared folder: the same rows as the text itself, and refused when not whole."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mtp_jax.config import Config
from mtp_jax.data import pipeline, prepare, prepared
from mtp_jax.data import tokenizers as tokenizers_lib
from mtp_jax.data.sources import DataError
from tests.corpora import data_config, some_texts, write_jsonl

BPE = {
  "tokenizer__kind": "bpe",
  "tokenizer__vocab_size": 290,
  "data__validation_fraction": 0.2,
  "data__test_fraction": 0.1,
}
# The second is several records long, and whole records at that.
TEXTS = [*some_texts(40), "ab\n" * 20_000, "x" * (2 * prepared.RECORD_TOKENS - 2)]


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> Path:
  file = tmp_path_factory.mktemp("texts") / "a.jsonl"
  return write_jsonl(file, [*TEXTS, TEXTS[3], " "])


@pytest.fixture(scope="module")
def direct(corpus_file) -> dict[str, Config]:
  return {
    "bytes": data_config("jsonl", corpus_file),
    "bpe": data_config("jsonl", corpus_file, **BPE),
  }


@pytest.fixture(scope="module")
def folders(direct, tmp_path_factory) -> dict[str, Path]:
  outputs = {}
  for kind, config in direct.items():
    outputs[kind] = tmp_path_factory.mktemp(kind)
    prepare.prepare_folder(config, outputs[kind], num_workers=1, shard_size=5_000)
  return outputs


@pytest.fixture
def copy(folders, tmp_path) -> Path:
  return shutil.copytree(folders["bytes"], tmp_path / "copy")


def from_folder(direct: Config, folder: Path, **overrides: object) -> Config:
  """Returns the config that reads what `direct` was prepared into."""
  same = {
    "tokenizer__kind": direct.tokenizer.kind,
    "tokenizer__vocab_size": direct.tokenizer.vocab_size,
    "data__validation_fraction": direct.data.validation_fraction,
    "data__test_fraction": direct.data.test_fraction,
  }
  return data_config("array_record", folder, **(same | overrides))


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
  """A folder of two texts: they are cut by position."""
  folder = tmp_path_factory.mktemp("few")
  rng = np.random.default_rng(0)
  for i in range(2):
    text = f"{i} é " + "".join(rng.choice(list("abc \n"), 9_000))
    (folder / f"{i}.txt").write_text(text)
  return folder


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_same_rows_as_the_text(direct, folders, kind):
  assert len(prepared.open_folder(folders[kind]).shards) > 2
  assert_same_rows(direct[kind], folders[kind])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_same_rows_as_few_texts(few, tmp_path, kind):
  config = data_config("files", few, **(BPE if kind == "bpe" else {}))
  prepare.prepare_folder(config, tmp_path, num_workers=1, shard_size=5_000)
  assert pipeline.load_corpus(config).stats["is_cut"]
  assert_same_rows(config, tmp_path)


def assert_same_rows(direct: Config, folder: Path) -> None:
  text = pipeline.load_corpus(direct)
  records = pipeline.load_corpus(from_folder(direct, folder))
  assert isinstance(records.store, prepared.ArrayRecordStore)
  for num_extra in (1, 3):
    ours, theirs = records.train_rows(num_extra), text.train_rows(num_extra)
    assert len(ours) == len(theirs)
    for r in range(0, len(theirs) + 5):
      for a, b in zip(ours[r], theirs[r], strict=True):
        np.testing.assert_array_equal(a, b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
  for ours, theirs in zip(records.eval_batches(2), text.eval_batches(2), strict=True):
    np.testing.assert_array_equal(ours[1], theirs[1])
    for a, b in zip(ours[0], theirs[0], strict=True):
      np.testing.assert_array_equal(a, b)
  for split in ("train", "validation"):
    assert list(records.texts(split)) == list(text.texts(split))
  # A run may go on from the one to the other.
  assert records.store.identity == text.store.identity
  assert records.stats == json.loads(json.dumps(text.stats))


def test_parts_of_documents(folders):
  opened = prepared.open_folder(folders["bytes"])
  store = prepared.ArrayRecordStore(opened.shards, opened.index_N, {})
  whole = [[256, *text.encode(), 257] for text in TEXTS]
  rng = np.random.default_rng(0)
  found = []
  for document, length in enumerate(store.lengths_N):
    tokens = store.read(document, 0, int(length))
    assert tokens.dtype == np.int32
    found.append(tokens.tolist())
    edges = [0, 1, *range(prepared.RECORD_TOKENS, length, prepared.RECORD_TOKENS)]
    for begin in {*edges, *rng.integers(0, length, 5)}:
      for end in {begin, min(begin + 1, length), rng.integers(begin, length + 1)}:
        part = store.read(document, int(begin), int(end))
        assert part.tolist() == found[-1][begin:end]
  assert sorted(found) == sorted(whole)
  lengths = [len(text.encode()) for text in TEXTS]
  assert sorted(opened.index_N["num_bytes"]) == sorted(lengths)


def test_folders_that_are_none(tmp_path):
  for path, reason in (
    (tmp_path / "nowhere", "does not exist"),
    (Path(__file__), "is not a folder"),
    (tmp_path, r"has no manifest\.json"),
  ):
    message = rf"data\.path must be a folder written by .*'{path}' {reason}"
    with pytest.raises(DataError, match=message):
      prepared.open_folder(path)


def test_unfinished_folders_say_how_to_go_on(copy):
  (copy / prepared.MANIFEST).unlink()
  with pytest.raises(DataError, match=r"not finished: run the same launch\.prepare"):
    prepared.open_folder(copy)


def test_other_formats_are_refused(copy):
  manifest = json.loads((copy / prepared.MANIFEST).read_text())
  (copy / prepared.MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
  with pytest.raises(DataError, match="format must be 1, got 2"):
    prepared.open_folder(copy)


def cut(file: Path) -> None:
  file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
  "name, damage, message",
  [
    ("manifest.json", cut, r"is damaged \(JSONDecodeError"),
    ("manifest.json", lambda file: file.write_text("{}"), r"is damaged \(KeyError"),
    ("index.npy", cut, "is damaged"),
    ("index.npy", Path.unlink, r"is damaged \(FileNotFoundError"),
    ("tokenizer.json", cut, "must hold a Hugging Face tokenizer"),
    ("shard-00001.array_record", cut, r"shard-00001\.array_record: must have .* has"),
    ("shard-00001.array_record", Path.unlink, r"shard-00001.* it is missing"),
  ],
)
def test_damaged_folders_are_refused(copy, name, damage, message):
  damage(copy / name)
  with pytest.raises(DataError, match=message):
    prepared.open_folder(copy)


def test_an_index_of_other_shards_is_refused(folders):
  opened = prepared.open_folder(folders["bytes"])
  message = r"the shards must hold \d+ records as in index\.npy, they hold \d+"
  with pytest.raises(DataError, match=message):
    prepared.ArrayRecordStore(opened.shards[:-1], opened.index_N, {})


@pytest.mark.parametrize("kind, other", [("bytes", "bpe"), ("bpe", "bytes")])
def test_tokenizer_must_be_of_the_kind_of_the_folder(direct, folders, kind, other):
  config = from_folder(direct[kind], folders[kind], tokenizer__kind=other)
  message = rf"tokenizer\.kind must be '{kind}', with which .* got '{other}'"
  with pytest.raises(DataError, match=message):
    pipeline.load_corpus(config)


def test_split_must_be_the_one_that_bpe_learned_from(direct, folders):
  split = {"data__validation_fraction": 0.3}
  message = r"data\.validation_fraction must be 0\.2, with which .* got 0\.3"
  with pytest.raises(DataError, match=message):
    pipeline.load_corpus(from_folder(direct["bpe"], folders["bpe"], **split))
  # Bytes have learned from nothing: any split will do.
  pipeline.load_corpus(from_folder(direct["bytes"], folders["bytes"], **split))


def test_a_given_tokenizer_must_be_that_of_the_folder(corpus_file, tmp_path):
  given, output = tmp_path / "given.json", tmp_path / "prepared"
  train = functools.partial(
    tokenizers_lib.make_tokenizer, data_config("stdlib", **BPE).tokenizer
  )
  tokenizers_lib.save_tokenizer(train(some_texts(30, seed=5)), given)
  config = data_config(
    "jsonl",
    corpus_file,
    tokenizer__kind="file",
    tokenizer__path=str(given),
    tokenizer__vocab_size=290,
  )
  prepare.prepare_folder(config, output, num_workers=1, shard_size=10**6)
  reading = from_folder(config, output, tokenizer__path=str(given))
  pipeline.load_corpus(reading)
  tokenizers_lib.save_tokenizer(train(some_texts(30, seed=6)), given)
  with pytest.raises(DataError, match=r"tokenizer\.path must name the tokenizer with"):
    pipeline.load_corpus(reading)
