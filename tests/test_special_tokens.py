"""Ids that begin and end a text are those of the model folder, and none is invented."""

import json

import numpy as np
import pytest

from mtp_jax.data import tokenizers
from mtp_jax.data.sources import DataError
from tests.hf_folders import PUBLISHED, write_tokenizer

TEXT = "the caf\u00e9 <|eot_id|>\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_folder_says_what_begins_and_ends_a_text(tmp_path, name):
  row = write_tokenizer(name, tmp_path)
  tokenizer = tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == row.tokens
  assert tokenizer.vocab_size <= 258 + len(row.specials)  # Nothing is added.
  document = tokenizers.document(tokenizer, tokenizer.encode(TEXT))
  bos, eos, _ = row.tokens
  assert document.tolist() == [
    *([bos] if bos is not None else []), *tokenizer.encode(TEXT),
    *([eos] if eos is not None else []),
  ]
  assert tokenizer.decode(document) == TEXT


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"deepseek_v3"}))
def test_ids_of_a_text_are_those_of_transformers(tmp_path, name):
  transformers = pytest.importorskip("transformers")
  write_tokenizer(name, tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
  text = "the caf\u00e9 (x)\n"
  expected = tokenizers.document(ours, ours.encode(text), ends=False)
  assert theirs(text).input_ids == expected.tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_beside_the_run_and_as_one_text_it_stays_the_same(tmp_path, name):
  write_tokenizer(name, tmp_path / "model")
  came = json.loads((tmp_path / "model/tokenizer.json").read_text())
  tokenizer = tokenizers.load_tokenizer(tmp_path / "model/tokenizer.json")
  (tmp_path / "run").mkdir()
  tokenizers.save_tokenizer(tokenizer, tmp_path / "run/tokenizer.json")
  assert json.loads((tmp_path / "run/tokenizer.json").read_text()) == came
  for again in (
    tokenizers.load_tokenizer(tmp_path / "run/tokenizer.json"),
    tokenizers.tokenizer_from_json(tokenizer.to_json()),
  ):
    assert again == tokenizer and hash(again) == hash(tokenizer)
    assert again.end_ids == tokenizer.end_ids and again.bos_id == tokenizer.bos_id
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def ids_of(folder, **files):
  """Returns the ids of a GPT-2 folder of which files were changed; None removes."""
  write_tokenizer("gpt2", folder)
  for name, content in files.items():
    file = folder / f"{name}.json"
    if content is None:
      file.unlink()
    else:
      file.write_text(json.dumps(content))
  tokenizer = tokenizers.load_tokenizer(folder / "tokenizer.json")
  return tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids


MODEL = {"model_type": "gpt2", "vocab_size": 264}


@pytest.mark.parametrize("files, expected", [
  # generation_config.json decides what ends a generated text, config.json separates.
  ({"config": MODEL | {"eos_token_id": [257, 258]},
    "generation_config": {"eos_token_id": [258, 5]}}, (None, 257, (258, 5))),
  ({"config": MODEL | {"eos_token_id": [257, 258]}, "generation_config": None},
   (None, 257, (257, 258))),
  ({"config": MODEL | {"eos_token_id": 257}, "generation_config": {"top_k": 50}},
   (None, 257, (257,))),
  ({"config": MODEL | {"eos_token_id": None},
    "generation_config": {"eos_token_id": 258}}, (None, 258, (258,))),
  # tokenizer_config.json alone names it.
  ({"config": MODEL | {"eos_token_id": None}, "generation_config": None,
    "tokenizer_config": {"eos_token": "<|endoftext|>"}}, (None, 258, (258,))),
  # Classes of transformers have ids of their own, where the key is missing ...
  ({"config": {"model_type": "llama", "vocab_size": 264}, "generation_config": None},
   (None, 2, (2,))),
  # ... which may lie outside of the vocabulary, as 50256 does here.
  ({"config": MODEL, "generation_config": None}, (None, None, ())),
  ({"config": MODEL | {"bos_token_id": 9}, "tokenizer_config": {
    "add_bos_token": True, "bos_token": "<|endoftext|>"}}, (258, 258, (258,))),
])  # fmt: skip
def test_where_ids_are_found(tmp_path, files, expected):
  assert ids_of(tmp_path, **files) == expected


@pytest.mark.parametrize("value", [-1, True, "2", 1.5, [3, None], {"id": 3}, 10**40])
def test_what_is_no_id_is_refused_by_key(tmp_path, value):
  if value == 10**40:  # No model has a row for it.
    files = {"config": MODEL | {"eos_token_id": value}, "generation_config": None}
    assert ids_of(tmp_path, **files) == (None, None, ())
    return
  with pytest.raises(DataError, match=r"config.json: eos_token_id must be null, a tok"):
    ids_of(tmp_path, config=MODEL | {"eos_token_id": value})


def test_a_special_token_without_a_row_needs_none(tmp_path):
  """Of its ids the model knows 258, and 259 is in the tokenizer alone."""
  write_tokenizer("gpt2", tmp_path)
  file = tmp_path / "tokenizer.json"
  values = json.loads(file.read_text())
  values["added_tokens"].append(
    values["added_tokens"][0] | {"id": 259, "content": "<pad>"}
  )
  file.write_text(json.dumps(values))
  tokenizer = tokenizers.load_tokenizer(file)
  assert tokenizer.vocab_size == 259
  assert 259 not in tokenizer.encode("a<pad>b")


def test_folders_that_we_wrote_before_have_their_begin_token(tmp_path):
  ours = tokenizers.ByteTokenizer()
  (tmp_path / "tokenizer.json").write_text(ours.to_json())
  values = {"model_type": "llama", "bos_token_id": 256, "eos_token_id": 257}
  (tmp_path / "config.json").write_text(json.dumps(values))
  again = tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
  assert type(again) is tokenizers.ByteTokenizer


def test_names_of_special_tokens_have_ids(tmp_path):
  write_tokenizer("llama", tmp_path)
  tokenizer = tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
  assert tokenizer.special_id("<|eot_id|>") == 261
  assert tokenizer.special_id("the") is None  # A token like any other.
  assert tokenizer.special_id("nothing") is None
  assert tokenizers.ByteTokenizer().special_id("<|eos|>") == 257


def test_a_file_by_itself_gets_what_it_lacks(tmp_path):
  write_tokenizer("gpt2", tmp_path)
  (tmp_path / "config.json").unlink()
  tokenizer = tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
  assert (tokenizer.bos_id, tokenizer.eos_id) == (259, 258)
  assert tokenizer.end_ids == (258,)


def test_dropout_of_merges_is_off(tmp_path):
  write_tokenizer("gpt2", tmp_path)
  file = tmp_path / "tokenizer.json"
  values = json.loads(file.read_text())
  values["model"]["dropout"] = 1.0
  file.write_text(json.dumps(values))
  assert len(tokenizers.load_tokenizer(file).encode("the")) == 1
