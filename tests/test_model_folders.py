"""Model folders as they are published: in, trained on, and out again as they came."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import mtp_jax
from experiments import imported
from launch import cli, import_hf, trials
from mtp_jax import interop, train
from mtp_jax.config import (
  ConfigError,
  TokenizerConfig,
  from_config_dict,
  with_overrides,
)
from mtp_jax.data import prepare
from mtp_jax.data.pipeline import load_corpus
from mtp_jax.data.tokenizers import load_tokenizer, make_tokenizer
from tests import common, tiny_runs
from tests.hf_folders import write_tokenizer

torch = pytest.importorskip("torch", reason="the weights come from transformers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"  # As in test_checkpoint.
)

POSITIONS, ROW = 96, 32
TEXT = "def the(x):\n  return x"
SHAPE = {
  "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2,
}
CLASSES = {
  "gpt2": lambda **k: transformers.GPT2LMHeadModel(transformers.GPT2Config(
    n_positions=ROW, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, **k
  )),
  "llama": lambda **k: transformers.LlamaForCausalLM(transformers.LlamaConfig(
    max_position_embeddings=POSITIONS, initializer_range=0.3, **SHAPE, **k
  )),
  "qwen2": lambda **k: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
    max_position_embeddings=POSITIONS, initializer_range=0.3, **SHAPE, **k
  )),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  return tiny_runs.write_texts(tmp_path_factory.mktemp("texts") / "texts")


def write_model(name, folder):
  """Writes a random model with a `PUBLISHED` tokenizer; returns model and row."""
  torch.manual_seed(0)
  model = CLASSES[name](vocab_size=264).eval()
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink()
  row = write_tokenizer(name, folder)
  return type(model).from_pretrained(folder).eval(), row


def run_from(folder, workdir, texts, **overrides):
  """Imports a folder as launch.import_hf does; returns the run folder."""
  values = {
    "mtp.kind": "none", "mtp.depth": 0, "data.source": "files", "data.path": str(texts),
    "data.batch_size": 8, "data.validation_fraction": 0.3, "data.test_fraction": 0.1,
    "train.num_steps": 2, "train.diagnostics_every": 0, "eval.num_rows": 4,
    "data.seq_len": ROW, "eval.batch_size": 8, "eval.line_prompts": 1,
    "eval.function_prompts": 1, "eval.max_new_tokens": 8, "mesh.data": -1,
  } | overrides
  config = with_overrides(from_config_dict(imported.get_config()), values)
  found = interop.read_model(folder)
  config = import_hf.combine(config, values, found)
  tokenizer, model_folder = import_hf.tokenizer_of(config, found)
  train.start_run(
    config, workdir, lambda mesh: interop.load_params(found, config, mesh), tokenizer,
    model_folder,
  )
  return workdir


def read(folder, name):
  return json.loads((folder / name).read_text())


@pytest.mark.parametrize("name", common.mostly_slow(CLASSES, "llama"))
def test_a_published_model_goes_in_and_out_as_it_came(tmp_path, texts, name):
  source, out = tmp_path / "source", tmp_path / "out"
  theirs, row = write_model(name, source)
  ids = transformers.AutoTokenizer.from_pretrained(source)(TEXT).input_ids
  came = shutil.copytree(source, tmp_path / "kept")
  run_from(source, tmp_path / "first", texts)

  # Nothing in the run folder needs the source, or the place where the folder was.
  shutil.rmtree(source)
  run = shutil.move(tmp_path / "first", tmp_path / "moved")
  for file in run.rglob("*.json"):
    assert str(source) not in file.read_text(), file
  model = mtp_jax.load(run)
  tokens = model.tokenizer
  assert (tokens.bos_id, tokens.eos_id, tokens.end_ids) == row.tokens
  assert model.encode(TEXT).tolist() == ids
  with torch.no_grad():
    logits = theirs(torch.tensor([ids])).logits[0].numpy()
    longest = theirs.generate(
      torch.tensor([ids]), max_new_tokens=ROW - len(ids), do_sample=False,
      pad_token_id=0,
    )[0, len(ids) :].numpy()
  np.testing.assert_allclose(model.logits(TEXT), logits, atol=1e-3)
  found = model.generate(TEXT, ROW - len(ids))
  np.testing.assert_array_equal(found.tokens, longest)

  interop.export_params(
    model.params, model.config, out, name, tokenizer=tokens,
    model_folder=model.model_folder,
  )
  for file in sorted(came.glob("*.json")):
    first, second = read(came, file.name), read(out, file.name)
    if file.name == "config.json":  # The weights are float32 now, as they were.
      assert second.pop("torch_dtype") == "float32"
    assert first == second, file.name
  again = transformers.AutoTokenizer.from_pretrained(out)
  assert again(TEXT).input_ids == ids
  opened = type(theirs).from_pretrained(out)
  assert opened.generation_config.eos_token_id == theirs.generation_config.eos_token_id
  assert not [x for x in came.iterdir() if not (out / x.name).exists()]


def test_fewer_positions_go_out_in_every_file(tmp_path, texts):
  write_model("gpt2", tmp_path / "source")
  run = run_from(tmp_path / "source", tmp_path / "run", texts, **{"data.seq_len": 16})
  model = mtp_jax.load(run)
  interop.export_params(
    model.params, model.config, tmp_path / "out", "gpt2", tokenizer=model.tokenizer,
    model_folder=model.model_folder,
  )
  assert read(tmp_path / "out", "config.json")["n_positions"] == 16
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert again.model_max_length == 16


@pytest.mark.slow
def test_documents_of_gpt2_are_text_and_its_separator(tmp_path, texts):
  write_model("gpt2", tmp_path / "source")
  run_from(tmp_path / "source", tmp_path / "run", texts)
  shutil.rmtree(tmp_path / "source")
  model = mtp_jax.load(tmp_path / "run")
  corpus = load_corpus(model.config, model.tokenizer)
  for document in corpus.documents("train"):
    tokens = corpus.store.read(document, 0, int(corpus.store.lengths_N[document]))
    assert tokens[-1] == 258 and 258 not in tokens[:-1]
    text = model.tokenizer.decode(tokens)
    assert text.startswith("def f") and text.endswith("\n")
    assert tokens.tolist() == [*model.tokenizer.encode(text), 258]
  assert corpus.texts("train")[0].startswith("def f")
  # Held-out rows begin with text, and all their bytes but the first token's count.
  batch, _ = next(corpus.eval_batches(1))
  assert 258 not in batch.tokens[:, 0]
  # A document that is still empty begins after the end of another one.
  assert model.generate("", 3).prompt_tokens.tolist() == [258]
  np.testing.assert_array_equal(model.logits(""), model.logits([258]))


@pytest.mark.slow
def test_any_end_token_ends_a_text_and_names_are_stops(tmp_path, texts):
  write_model("llama", tmp_path / "source")
  model = mtp_jax.load(run_from(tmp_path / "source", tmp_path / "run", texts))
  base = model.generate(TEXT, 24, stop=[]).tokens.tolist()
  config = tmp_path / "source" / "generation_config.json"
  for end in (base[3], base[6]):  # Neither is the first of the list.
    config.write_text(json.dumps({"eos_token_id": [259, end]}))
    run = run_from(tmp_path / "source", tmp_path / f"run{end}", texts)
    ended = mtp_jax.load(run).generate([TEXT, TEXT], 24)
    for found in ended:
      assert found.tokens.tolist() == base[: 1 + base.index(end)]
      assert found.completion.is_stopped
  # The name of a special token is the token, not its letters.
  stops = model._stops(["<|eot_id|>", "ab"])
  assert stops == ((259, 260, 261, 261), ("ab",))


@pytest.mark.slow
def test_a_run_is_evaluated_and_trained_without_its_source(tmp_path, texts):
  write_model("qwen2", tmp_path / "source")
  run_from(tmp_path / "source", tmp_path / "first", texts)
  shutil.rmtree(tmp_path / "source")
  run = shutil.move(tmp_path / "first", tmp_path / "run")
  config = from_config_dict(read(run, "config.json"))
  assert config.tokenizer.path == "tokenizer.json"
  result = train.fit(config, run, progress=False)
  assert np.isfinite(result["main_loss"]["mean"])
  again = train.evaluate_run(config, run)
  assert again["main_loss"] == result["main_loss"]
  # What it had is in the new checkpoint too, which may be copied alone.
  alone = shutil.copytree(run / "checkpoints" / "2", tmp_path / "mine")
  shutil.rmtree(run)
  model = mtp_jax.load(alone)
  assert model.tokenizer.end_ids == (260, 258)
  assert model.model_folder["generation_config.json"]["repetition_penalty"] == 1.05


@pytest.mark.slow
def test_a_prepared_folder_and_a_drafter_go_with_an_imported_trunk(tmp_path, texts):
  """Both are made with the tokenizer of the model; what it had goes along."""
  write_model("llama", tmp_path / "source")
  section = TokenizerConfig(
    kind="file", vocab_size=264, path=str(tmp_path / "source" / "tokenizer.json")
  )
  config = from_config_dict(imported.get_config())
  values = {"data.source": "files", "data.path": str(texts)}
  config = dataclasses.replace(with_overrides(config, values), tokenizer=section)
  prepare.prepare_folder(config, tmp_path / "it", num_workers=1, shard_size=10**6)
  assert read(tmp_path / "it", "special_tokens.json")["end_ids"] == [259, 260, 261]
  records = {"data.source": "array_record", "data.path": str(tmp_path / "it")}
  run = run_from(tmp_path / "source", tmp_path / "run", texts, **records)
  shutil.rmtree(tmp_path / "source")

  own = str(run / "tokenizer.json")
  medusa = with_overrides(from_config_dict(read(run, "config.json")), {
    "mtp.kind": "medusa", "mtp.depth": 1, "train.trunk_from": str(run),
    "train.freeze_trunk": True, "tokenizer.path": own, "eval.function_prompts": 0,
  })
  train.fit(medusa, tmp_path / "medusa", progress=False)
  shutil.rmtree(run)
  model = mtp_jax.load(tmp_path / "medusa")
  assert model.model_folder["config.json"]["max_position_embeddings"] == POSITIONS
  assert model.tokenizer.end_ids == (259, 260, 261)


@pytest.mark.slow
def test_a_run_has_its_own_tokenizer_whoever_started_it(tmp_path, texts):
  file = tmp_path / "tokenizer.json"
  section = TokenizerConfig(kind="bpe", vocab_size=280, path="")
  file.write_text(make_tokenizer(section, [TEXT] * 9).to_json())
  config = tiny_runs.run_config(texts, {
    "tokenizer.kind": "file", "tokenizer.path": str(file), "data.seq_len": 32,
    "mtp.kind": "none", "mtp.depth": 0, "train.num_steps": 2, "train.eval_every": 0,
    "tokenizer.vocab_size": 280, "train.diagnostics_every": 0, "eval.line_prompts": 0,
    "eval.function_prompts": 0, "eval.max_new_tokens": 64,
  })
  run = tmp_path / "run"
  train.fit(config, run, progress=False)
  other = tmp_path / "other.json"
  other.write_text(make_tokenizer(section, ["the " * 9]).to_json())
  changed = with_overrides(config, {"tokenizer.path": str(other)})
  with pytest.raises(ConfigError, match=r"^tokenizer\.path must hold the token"):
    cli.of_run(changed, run)
  file.unlink()
  # The command that started it, the folder alone, and a sweep.
  for given in (config, from_config_dict(read(run, "config.json"))):
    found = cli.of_run(given, run)
    cli.check_files(found.data, found.tokenizer)
    assert np.isfinite(train.evaluate_run(given, run)["main_loss"]["mean"])
  (trial,) = trials.plan(config, {}, [{"name": "run"}], tmp_path)
  trials.check_folders([trial])


def test_another_tokenizer_takes_other_ids_with_it(tmp_path, texts):
  write_model("llama", tmp_path / "source")
  values = {"tokenizer.kind": "bytes"}
  run = run_from(tmp_path / "source", tmp_path / "run", texts, **values)
  model = mtp_jax.load(run)
  assert (model.tokenizer.bos_id, model.tokenizer.eos_id) == (256, 257)
  out = tmp_path / "out"
  interop.export_params(
    model.params, model.config, out, "llama", tokenizer=model.tokenizer,
    model_folder=model.model_folder,
  )
  values = read(out, "config.json")
  assert (values["bos_token_id"], values["eos_token_id"]) == (256, 257)
  assert values["max_position_embeddings"] == POSITIONS
  assert values["initializer_range"] == 0.3
  assert read(out, "generation_config.json") == {
    "bos_token_id": 256, "eos_token_id": 257
  }


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_auto_tokenizer_gives_the_ids_of_training(tmp_path, kind):
  size = {"bytes": 258, "bpe": 300}[kind]
  section = TokenizerConfig(kind=kind, vocab_size=size, path="")
  ours = make_tokenizer(section, [TEXT] * 9)
  config = common.tiny_config(overrides={"tokenizer.vocab_size": size})
  params = common.random_params(config)
  out = tmp_path / "out"
  interop.export_params(params, config, out, "llama", tokenizer=ours)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  for text in (TEXT, "", "caf\u00e9  \u6f22\U0001f642\n\n"):
    assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
  assert theirs.decode(theirs(TEXT).input_ids, skip_special_tokens=True) == TEXT
  opened = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert opened.generation_config.eos_token_id == ours.eos_id
  # In again, it is the same tokenizer.
  again = load_tokenizer(out / "tokenizer.json")
  assert (again.bos_id, again.eos_id) == (ours.bos_id, ours.eos_id)
  np.testing.assert_array_equal(again.encode(TEXT), ours.encode(TEXT))


def test_a_begin_token_that_only_a_key_asks_for_is_written_out(tmp_path):
  """DeepSeek-V3's tokenizer.json does not add it, its tokenizer_config.json does."""
  write_tokenizer("deepseek_v3", tmp_path / "source")
  ours = load_tokenizer(tmp_path / "source" / "tokenizer.json")
  config = common.tiny_config(overrides={"tokenizer.vocab_size": 264})
  out = tmp_path / "out"
  interop.export_params(
    common.random_params(config), config, out, "llama", tokenizer=ours
  )
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  assert theirs(TEXT).input_ids == [258, *ours.encode(TEXT)]
