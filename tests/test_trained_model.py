"""A loaded model computes what training would have, wherever its folder lies."""

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax import accounting, optimizer
from mtp_jax.checkpoint import Checkpointer, CheckpointError
from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.decode import generate as decoding
from mtp_jax.decode import stops
from mtp_jax.decode.generate import Completion, Decoding
from mtp_jax.decode.trees import DynamicTree
from mtp_jax.decode.warp import check_warp
from mtp_jax.lm import MtpLm, unembeddings
from mtp_jax.losses import token_stats
from mtp_jax.predictors import kind_of
from mtp_jax.sharding import logical_axes, make_mesh
from mtp_jax.targets import future_targets
from mtp_jax.train_state import init_state
from tests.common import (
  GPT2,
  batch_of,
  mostly_slow,
  random_params,
  tiny_config,
)

pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"  # As in test_checkpoint.
)

TEXT = "x = [é]\n"  # With its begin of document, 10 tokens.
BYTES = {"tokenizer.vocab_size": 260}
MODELS = {
  "sequential": tiny_config("sequential", 2, BYTES | {"mtp.arm": "shortened"}),
  "parallel": tiny_config("parallel", 2, BYTES),
  "eagle3": tiny_config("eagle3", 2, BYTES),
  "linear gpt2": tiny_config("linear", 2, BYTES | GPT2),
  "flops": tiny_config("sequential", 1, BYTES | {"mtp.arm": "flops"}),
}


def save(folder, config, steps=(4,)):
  """Fills a run folder with checkpoints of random parameters, a seed per step.

  Their configs are as a run on GPUs may have them.
  """
  config = accounting.resolve(config)
  chain = optimizer.make_optimizer(
    config.optimizer, logical_axes(accounting.abstract_params(config))
  )
  empty = jax.eval_shape(functools.partial(init_state, config, chain), 0)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty)
  on_gpu = with_overrides(config, {"trunk.attention": "cudnn"})
  checkpointer = Checkpointer(folder, keep=len(steps))
  for step in steps:
    state = state.replace(step=np.int32(step), params=random_params(config, step))
    checkpointer.save(
      jax.device_put(state), on_gpu, ByteTokenizer().to_json(), {}, {}
    )
  checkpointer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns the run folder of one of `MODELS`."""

  @functools.cache
  def run(name):
    folder = tmp_path_factory.mktemp("run")
    save(folder, MODELS[name], steps=(4, 8) if name == "sequential" else (4,))
    return folder

  return run


@pytest.fixture(scope="module")
def models(runs):
  return functools.cache(lambda name: mtp_jax.load(runs(name)))


@pytest.fixture
def model(models):
  return models("sequential")


@pytest.fixture
def copy(runs, tmp_path):
  return shutil.copytree(runs("sequential"), tmp_path / "run")


def assert_is_step(model, step):
  assert model.step == step
  expected = random_params(model.config, step)
  jax.tree.map(np.testing.assert_array_equal, model.params, expected)


def test_importing_the_package_imports_nothing():
  code = "import sys, mtp_jax; mtp_jax.load; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_its_checkpoints_and_one_of_them_are_loaded(runs, tmp_path):
  run = runs("sequential")
  assert_is_step(mtp_jax.load(run), 8)
  assert_is_step(mtp_jax.load(str(run), step=4), 4)
  assert_is_step(mtp_jax.load(run / "checkpoints"), 8)
  assert_is_step(mtp_jax.load(run / "checkpoints" / "4"), 4)
  alone = shutil.copytree(run / "checkpoints" / "4", tmp_path / "mine")
  assert_is_step(mtp_jax.load(alone), 4)


def test_config_and_tokenizer_come_with_it(model, models):
  assert model.config == MODELS["sequential"]
  assert model.tokenizer.vocab_size == 258
  assert repr(model).startswith("<TrainedModel 'base': sequential, D = 2, ")
  assert repr(model).endswith(" parameters, step 8>")


def test_arm_flops_is_loaded_as_it_was_trained(models):
  flops = models("flops")
  assert flops.config.mtp.depth == 0
  assert flops.config.train.num_steps > MODELS["flops"].train.num_steps
  assert "next token only" in repr(flops)


def test_text_begins_a_document(model):
  ids = model.tokenizer.encode(TEXT)
  np.testing.assert_array_equal(model.encode(TEXT), [256, *ids])
  np.testing.assert_array_equal(model.encode(TEXT, bos=False, eos=True), [*ids, 257])
  np.testing.assert_array_equal(model.losses(TEXT), model.losses([256, *ids]))
  assert model.logits("").shape == (1, 260)


@pytest.mark.parametrize(
  "name", mostly_slow(["sequential", "parallel", "linear gpt2"], "sequential")
)
def test_losses_are_those_of_a_row_with_other_documents(models, name):
  model = models(name)
  config = model.config
  document = model.encode(TEXT)
  other = model.encode("y,z", eos=True)
  depth = config.mtp.depth
  tokens = np.concatenate([other, document, other])[: 16 + 1 + depth]
  segments = np.repeat([1, 2, 3], [len(other), len(document), len(other)])
  rows = batch_of(tokens[None], segments[None, : len(tokens)], 16)

  def losses(params, batch):
    hidden = MtpLm(config).apply({"params": params}, batch)
    targets, mask = future_targets(batch, depth)
    stats = token_stats(hidden, unembeddings(params, config), targets, 40)
    return stats.nll_MBT, mask

  nll, mask = jax.device_get(jax.jit(losses)(model.params, rows))
  expected = np.where(mask, nll, np.nan)[:, 0, len(other) : len(other) + len(document)]
  found = model.losses(TEXT)
  assert found.shape == (1 + depth, len(document))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for m in range(1 + depth):  # No target: where the text ends before it.
    np.testing.assert_array_equal(
      np.isnan(found[m]), np.arange(len(document)) >= len(document) - 1 - m
    )


@pytest.mark.parametrize(
  "name",
  mostly_slow(["sequential", "parallel", "linear gpt2", "eagle3"], "sequential"),
)
def test_logits_at_a_row_say_what_the_losses_say(models, name):
  model = models(name)
  ids, losses = model.encode(TEXT), model.losses(TEXT)
  reads_on = kind_of(model.config.mtp).is_autoregressive
  for depth in range(3):
    logits = model.logits(TEXT, depth)
    assert logits.shape == (len(ids), 260) and logits.dtype == np.float32
    last = len(ids) - depth if reads_on else len(ids)
    assert np.isfinite(logits[:last]).all() and np.isnan(logits[last:]).all()
    rows = np.arange(len(ids) - 1 - depth)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
      -log_p[rows, ids[rows + 1 + depth]], losses[depth, rows], rtol=1e-4
    )


@pytest.mark.parametrize("name", ["sequential", "parallel"])
def test_what_comes_later_changes_nothing_and_padding_neither(models, name):
  model = models(name)
  whole, part = model.hidden(TEXT * 3), model.hidden(TEXT)  # Of two padded lengths.
  assert part.shape == (3, 10, 16)
  known = np.isfinite(part)
  assert known[0].all() and known[2, :8].all()
  assert known[2, 8:].any() == (name == "parallel")
  np.testing.assert_allclose(
    np.where(known, whole[:, :10], np.nan), part, rtol=1e-4, atol=1e-5
  )


def test_a_mesh_computes_the_same(runs, model):
  sizes = with_overrides(
    model.config, {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2}
  ).mesh
  spread = mtp_jax.load(runs("sequential"), mesh=make_mesh(sizes))
  assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
  np.testing.assert_allclose(spread.losses(TEXT), model.losses(TEXT), rtol=1e-4)
  np.testing.assert_allclose(
    spread.logits(TEXT, 1), model.logits(TEXT, 1), rtol=1e-3, atol=1e-4
  )


@pytest.fixture
def calls(monkeypatch):
  """What the decoder is asked for, instead of decoding."""
  calls = []

  def generate(config, weights, prompts, **settings):
    calls.append((prompts, settings))
    counts = np.zeros(2, int)
    nothing = Completion(counts, counts, False, 0, counts, counts, np.zeros(3, int))
    return [nothing] * len(prompts)

  monkeypatch.setattr(decoding, "generate", generate)
  return calls


def test_settings_reach_the_decoder(model, calls):
  model.generate("a")
  model.generate(
    "a", 9, num_drafts=5, rule="leviathan", temperature=0.5, top_k=7, top_p=0.9,
    min_p=0.1, proposal="sample", recurse=True, seed=3, first=4,
    stop=["\n", 7, "<|bos|>"], tree=DynamicTree(3, 2, 4),
  )
  model.generate("a", rule="match")
  default, given, match = (settings for _, settings in calls)
  assert default["decoding"] == Decoding()
  assert default["stop_ids"] == (model.tokenizer.eos_id,)
  assert default["stop_SV"] is None and given["stop_SV"][0, 10] == stops.FOUND
  warp = check_warp(0.5, 7, 0.9, 0.1)
  assert given == {
    "max_new_tokens": 9,
    "stop_ids": (257, 7, 256),
    "stop_SV": given["stop_SV"],
    "decoding": Decoding(
      "leviathan", warp, "sample", 5, True, DynamicTree(3, 2, 4)
    ),
    "seed": 3,
    "first": 4,
  }
  assert match["decoding"].warp == check_warp(1.0)


@pytest.mark.parametrize(
  "prompt, is_one, expected",
  [
    ("ab", True, [[256, 97, 98]]),
    ([97, 98], True, [[97, 98]]),
    (np.array([97]), True, [[97]]),
    (["a", ""], False, [[256, 97], [256]]),
    ([[97], np.array([98, 99])], False, [[97], [98, 99]]),
    (("a",), False, [[256, 97]]),
  ],
)
def test_a_prompt_is_a_text_or_a_list_of_texts(model, calls, prompt, is_one, expected):
  found = model.generate(prompt)
  ((prompts, _),) = calls
  assert [x.tolist() for x in prompts] == expected
  assert isinstance(found, list) != is_one
  results = [found] if is_one else found
  assert [x.prompt_tokens.tolist() for x in results] == expected


def test_greedy_text_is_the_arg_max_of_the_logits(model):
  ids = list(model.encode("a"))
  for _ in range(5):
    ids.append(int(model.logits(ids)[-1].argmax()))
  np.testing.assert_array_equal(model.generate("a", 5).tokens, ids[2:])


def test_the_stream_ends_as_the_whole(model):
  whole = model.generate("a", 12)
  *_, last = parts = list(model.generate("a", 12, stream=True))
  assert [len(x.tokens) for x in parts] == sorted({len(x.tokens) for x in parts})
  np.testing.assert_array_equal(last.tokens, whole.tokens)
  assert last.text == whole.text


def test_a_stop_token_ends_the_text(model):
  tokens = model.generate("a", 12).tokens
  stopped = model.generate("a", 12, stop=[tokens[3]])
  np.testing.assert_array_equal(
    stopped.tokens, tokens[: 1 + int(np.argmax(tokens == tokens[3]))]
  )
  assert stopped.completion.is_stopped


def test_an_empty_list_lets_nothing_end_the_text(model, calls):
  model.generate("a", stop=[])
  assert calls[0][1]["stop_ids"] == ()


@pytest.mark.parametrize("how", mostly_slow([
  {"num_drafts": 0}, {}, {"num_drafts": 4, "recurse": True},
  {"rule": "match", "seed": 1, "temperature": 0.7},
  {"rule": "match", "seed": 1, "temperature": 0.7, "num_drafts": 0},
], {}), ids=str)
def test_text_is_cut_before_a_string_whatever_drafts(model, how):
  prompts = ["a", "bc\n", "(1", "x = "]
  whole = model.generate(prompts, 24, **how)
  texts = [x.text for x in whole]
  # Strings of several tokens, from amid two of the texts, and one that never comes.
  found = [re.search("[^\ufffd]{2,3}", text[4:]) for text in texts]
  first, second = [match[0] for match in found if match][:2]
  strings = [first, second, "\U0001f642"]
  for i, found in enumerate(model.generate(prompts, 24, stop=strings, **how)):
    ends = [texts[i].find(string) for string in strings]
    expected = texts[i][: min([end for end in ends if end >= 0], default=None)]
    assert found.text == expected and "".join(found.pieces) == expected
    is_stopped = expected != texts[i] or whole[i].completion.is_stopped
    assert found.completion.is_stopped == is_stopped
    tokens = whole[i].tokens[: len(found.tokens)]
    np.testing.assert_array_equal(found.tokens, tokens)
    counts = found.completion
    drafted = sum(counts.accepted)
    assert drafted == np.sum(counts.source > 0) and sum(counts.histogram) == (
      counts.rounds
    )
    if expected != texts[i]:  # Not a token more than is needed.
      before = model.tokenizer.decode(tokens[:-1])
      assert not any(string in before for string in strings)


@pytest.mark.slow
def test_a_stream_holds_back_what_may_become_a_stop(model):
  whole = model.generate("a", 24, stop=[]).text
  stop = [whole[6:9], whole[6:8] + "\U0001f642"]
  texts = [x.text for x in model.generate("a", 24, stop=stop, stream=True)]
  end = whole.find(stop[0])
  assert texts[-1] == whole[:end]
  for before, after in itertools.pairwise(texts):
    assert after.startswith(before.rstrip("\ufffd"))
  # What is held back for a string that does not come is shown at the end.
  stop = [whole[-2:] + "\U0001f642"]
  *texts, last = (x.text for x in model.generate("a", 24, stop=stop, stream=True))
  assert last == whole
  assert not any(text.endswith(whole[-2:]) and text == whole for text in texts)


BAD_TEXTS = {
  "no token": ([], "at least one token, got none"),
  "an id too large": ([1, 260], r"token ids must be in \[0, 260\), got 260"),
  "a negative id": (np.array([-1]), r"got -1"),
  "fractions": ([0.5], "a sequence of token ids, got list .* type float64"),
  "a table": (np.zeros((2, 2), int), r"got ndarray of shape \(2, 2\)"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_refused(model, case):
  text, message = BAD_TEXTS[case]
  with pytest.raises(ValueError, match=message):
    model.losses(text)


def test_bad_settings_are_refused(model, models):
  for depth in (-1, 3):
    with pytest.raises(ValueError, match=rf"depth must be in \[0, 2\].*got {depth}"):
      model.logits(TEXT, depth)
  for message, settings in {
    "rule must be one of": {"rule": "lucky"},
    "num_drafts must be at most the model's 2": {"num_drafts": 3},
    "rule 'greedy' takes the arg max": {"temperature": 0.5},
    "temperature must be positive": {"rule": "match", "temperature": 0.0},
    "top_p must be a number": {"rule": "match", "top_p": 2.0},
    "max_new_tokens must be an integer from 1": {"max_new_tokens": 0},
    "stop must be a list, got 'ab'; write": {"stop": "ab"},
    "stop must have no empty string": {"stop": ["ab", ""]},
    "stop must have strings of at most 250 bytes .*, got 251": {"stop": ["a" * 251]},
    "token ids must be in": {"stop": [300]},
  }.items():
    with pytest.raises(ValueError, match=message):
      model.generate("a", **settings)
  for prompt in ([], [[]], [TEXT, []]):
    with pytest.raises(ValueError, match="at least one token"):
      model.generate(prompt)
  with pytest.raises(ValueError, match="stream=True takes one prompt, got 2"):
    model.generate(["a", "b"], stream=True)
  with pytest.raises(ValueError, match=r"at most 16 tokens.*learned positions.*got 17"):
    models("linear gpt2").losses("a" * 16)
  with pytest.raises(ValueError, match="learned positions"):
    models("linear gpt2").generate("a", 20)


def test_a_folder_that_is_none_is_refused(copy, tmp_path):
  with pytest.raises(CheckpointError, match=r"nowhere must be a folder"):
    mtp_jax.load(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(CheckpointError, match=r"must be a run folder .* a checkpoint"):
    mtp_jax.load(tmp_path / "empty")
  (tmp_path / "new" / "checkpoints" / "4.orbax-tmp").mkdir(parents=True)
  with pytest.raises(CheckpointError, match="run folder without a finished checkpoint"):
    mtp_jax.load(tmp_path / "new")
  (copy / "config.json").write_text("{}")
  with pytest.raises(CheckpointError, match=r"holds 1 run folder.*such as 'run'"):
    mtp_jax.load(tmp_path)
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*\[4, 8\]"):
    mtp_jax.load(copy, step=5)
  with pytest.raises(CheckpointError, match="is one checkpoint; step 8 was asked for"):
    mtp_jax.load(copy / "checkpoints" / "4", step=8)


def largest_file(step_folder):
  files = (p for p in (step_folder / "state").rglob("*") if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


def change_bytes(step_folder):
  path = largest_file(step_folder)
  data = bytearray(path.read_bytes())
  for i in range(100, len(data), 200):
    data[i] ^= 0x10
  path.write_bytes(data)


DAMAGES = {
  "some bytes": change_bytes,
  "no arrays": lambda folder: shutil.rmtree(folder / "state" / "d"),
  "no meta": lambda folder: shutil.rmtree(folder / "meta"),
  "an empty folder": lambda folder: (shutil.rmtree(folder), os.mkdir(folder)),
}


@pytest.mark.parametrize("damage", mostly_slow(DAMAGES, next(iter(DAMAGES))))
def test_damage_is_reported_and_the_one_before_is_used(copy, damage):
  DAMAGES[damage](copy / "checkpoints" / "8")
  with pytest.warns(UserWarning, match="checkpoints/8 is damaged .* the one before it"):
    assert_is_step(mtp_jax.load(copy), 4)
  with pytest.raises(CheckpointError, match="checkpoints/8 is damaged"):
    mtp_jax.load(copy, step=8)


@pytest.mark.slow
def test_one_changed_byte_is_reported_or_was_not_read(copy, runs):
  path = largest_file(copy / "checkpoints" / "8")
  whole = path.read_bytes()
  expected = mtp_jax.load(runs("sequential")).params
  num_reported = 0
  for place in range(1000, len(whole), len(whole) // 8):
    data = bytearray(whole)
    data[place] ^= 0x10
    path.write_bytes(data)
    try:
      found = mtp_jax.load(copy, step=8).params
    except CheckpointError as error:
      num_reported += "checkpoints/8 is damaged" in str(error)
    else:  # In what is not parameters: the rest of the state is not read.
      jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert num_reported >= 2


def test_another_contract_is_refused(runs, monkeypatch):
  monkeypatch.setattr("mtp_jax.checkpoint.contract", lambda config: {"other": True})
  with pytest.raises(ConfigError, match="another contract"):
    mtp_jax.load(runs("sequential"))
