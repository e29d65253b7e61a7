"""Decoding with drafts says what plain decoding says, for every model and drafter."""

import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import accounting
from mtp_jax.config import with_overrides
from mtp_jax.decode import drafters, generate, loop
from mtp_jax.decode.generate import Decoding
from mtp_jax.decode.target import make_target, unstack
from mtp_jax.decode.trees import DynamicTree
from mtp_jax.decode.warp import Warp
from mtp_jax.lm import MtpLm, unembed_matrix
from mtp_jax.model import attention, cache_slots
from mtp_jax.predictors import weights
from mtp_jax.predictors.drafting import Choice, Window
from mtp_jax.sharding import logical_axes, make_mesh, tree_shardings
from tests.common import (
  INPUTS,
  LATENT,
  MINIMAL,
  SHARED,
  TRUNKS,
  batch_of,
  mostly_slow,
  random_params,
  tiny_config,
)

PROMPT_SLOTS, NEW, DEPTH = 9, 13, 3
SEQ_LEN = PROMPT_SLOTS + NEW  # Prompt and completion fill it to the last position.
LENGTHS = (1, 4, PROMPT_SLOTS, 2, PROMPT_SLOTS - 1)
MODELS = {
  "llama-none": ("llama", "none", 0, {}),
  "llama-parallel": ("llama", "parallel", DEPTH, {}),
  "gpt2-parallel": ("gpt2", "parallel", DEPTH, {}),
  "llama-sequential": ("llama", "sequential", DEPTH, {}),
  "gpt2-sequential": ("gpt2", "sequential", DEPTH, {}),
  "llama-markov": ("llama", "parallel", DEPTH, {"mtp.markov_rank": 6}),
  "gpt2-medusa-markov": ("gpt2", "medusa", DEPTH, {"mtp.markov_rank": 6}),
  "llama-linear": ("llama", "linear", DEPTH, {}),
  "gpt2-medusa": ("gpt2", "medusa", DEPTH, {}),
  "llama-eagle": ("llama", "eagle", DEPTH, {}),
  "gpt2-eagle": ("gpt2", "eagle", DEPTH, {}),
  "llama-eagle3": ("llama", "eagle3", DEPTH, {"trunk.num_kv_heads": 4}),
  "llama-eagle3.1": (
    "llama", "eagle3", DEPTH,
    {"trunk.num_kv_heads": 4, "mtp.fc_norm": True, "mtp.norm_output": True},
  ),
  "llama-peagle": ("llama", "peagle", DEPTH, {"trunk.num_kv_heads": 4}),
  "llama-dflash": (
    "llama", "dflash", DEPTH, {"trunk.num_kv_heads": 4, "mtp.one_mask": True}
  ),
  "gpt2-dflash": ("gpt2", "dflash", DEPTH, {"mtp.draft_layers": 1}),
  "llama-shared": ("llama", "sequential", 2, SHARED),
  "llama-eagle3-own": (
    "llama", "eagle3", 2,
    {"mtp.unembed": "own", "mtp.mlp_dim": 30, "trunk.num_kv_heads": 4},
  ),
  "gpt2-medusa-own": ("gpt2", "medusa", DEPTH, {"mtp.unembed": "own"}),
  "latent-sequential": ("llama", "sequential", 2, LATENT),
  "llama-trunk": ("llama", "sequential", DEPTH, INPUTS["trunk-before"]),
  "llama-shifted": ("llama", "sequential", DEPTH, INPUTS["shifted"]),
  "gpt2-fed-none": ("gpt2", "sequential", DEPTH, INPUTS["none"]),
  "gpt2-minimal": ("gpt2", "sequential", DEPTH, MINIMAL | {"mtp.zero_first": True}),
}


class Model:
  """A model whose drafts are right at times, prompts, and what greedy says to them."""

  def __init__(self, trunk, kind, depth, more):
    untied = {"trunk.tie_embeddings": False, "data.seq_len": SEQ_LEN}
    self.config = tiny_config(kind, depth, TRUNKS[trunk] | untied | more)
    self.params = random_params(self.config, seed=1)
    # Quiet layers and modules that say the same: random ones would agree on nothing.
    self.params = jax.tree_util.tree_map_with_path(
      functools.partial(_quieten, mtp=self.config.mtp), self.params
    )
    if self.config.mtp.unembed == "own":
      own = 0.2 * self.params["mtp"]["unembed"] + self.params["unembed"]["kernel"]
      self.params["mtp"]["unembed"] = own
    self.weights = unstack(self.params, self.config)
    rng = np.random.default_rng(0)
    vocab = self.config.tokenizer.vocab_size
    self.prompts = [rng.integers(0, vocab, n) for n in LENGTHS]
    self.expected = uncached(self.config, self.params, self.prompts)

  def generate(self, prompts=None, decoding=generate.GREEDY, **keywords):
    settings = {"max_new_tokens": NEW, "prompt_length": PROMPT_SLOTS}
    prompts = self.prompts if prompts is None else prompts
    return generate.generate(
      self.config, self.weights, prompts, decoding=decoding, **settings | keywords
    )


def _quieten(path, leaf, mtp):
  names, eye = [key.key for key in path], np.eye(16, dtype=np.float32)
  if mtp.kind in ("eagle3", "peagle") and "mtp" in names and leaf.ndim == 3:
    # Attention to the own row, which passes on the embedding that is read there.
    whole = eye if "out" in names else np.concatenate([0 * eye, 3 * eye])
    return 0.2 * leaf + whole.reshape(leaf.shape)
  if mtp.kind == "dflash" and names[-1] in ("value", "out", "masks"):
    # Of all rows the anchor alone says something, which the others pass on.
    if "masks" in names:
      return 1e-3 * leaf
    if "mtp" in names:
      return 0.2 * leaf + 3 * eye.reshape(leaf.shape)
  if "context_norm" in names:
    return 0.1 * leaf
  if "out" in names or "down" in names:
    return 0.3 * leaf
  if "scale" in names:
    return 1 + 0.3 * (leaf - 1)
  if "fusion" in names:
    return 0.2 * leaf
  if "maps" in names:
    return 0.2 * leaf + eye
  if "projection" in names:  # Passes on the embedding, as the trunk does, if any.
    halves = [eye, 0 * eye] if mtp.fed == "none" else [0 * eye, eye]
    return 0.2 * leaf + np.concatenate(halves)
  return leaf


def logits(config, params, hidden, depth=0):
  """Returns logits of a depth, by its output matrix; a state may be wider."""
  matrix_DV = unembed_matrix(params, config, depth)
  return hidden[..., : len(matrix_DV)] @ matrix_DV


def uncached(config, params, prompts):
  """The definition: each new token is the arg max after a pass over all before it."""
  length = config.data.seq_len

  @jax.jit
  def next_tokens(params, batch):
    hidden_BTD = MtpLm(config).apply({"params": params}, batch)[0]
    return logits(config, params, hidden_BTD).argmax(-1)

  rows = [list(prompt) for prompt in prompts]
  for _ in range(NEW):
    # What stands after the tokens so far cannot matter: attention is causal.
    total = length + 1 + config.mtp.depth
    padded = [row + [0] * (total - len(row)) for row in rows]
    argmax_BT = next_tokens(params, batch_of(padded, np.ones_like(padded), length))
    for row, argmax_T in zip(rows, np.asarray(argmax_BT), strict=True):
      row.append(int(argmax_T[len(row) - 1]))
  return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]


@pytest.fixture(
  scope="module", params=mostly_slow(MODELS, "llama-sequential", "gpt2-parallel")
)
def model(request):
  return Model(*MODELS[request.param])


@pytest.fixture(scope="module")
def sequential():
  return Model(*MODELS["llama-sequential"])


def tokens(completions):
  return [x.tokens.tolist() for x in completions]


def test_greedy_says_what_whole_forward_passes_say(model):
  # Five prompts, two at a time: the last batch is filled up.
  completions = model.generate(batch_size=2)
  assert tokens(completions) == model.expected
  assert not any(x.is_stopped for x in completions)
  if model.config.mtp.depth:
    # Rejections, acceptances and full rounds, so that every path was taken.
    histogram = sum(x.histogram for x in completions)
    assert histogram[0] > 0 and histogram[1:].sum() > 0, histogram


def test_provenance_and_counts_agree_with_the_tokens(model):
  for x in model.generate(batch_size=2):
    assert len(x.source) == len(x.tokens) == NEW
    assert x.source[0] == loop.OWN  # The prefill's.
    drafted = np.array([np.sum(x.source == k + 1) for k in range(len(x.accepted))])
    np.testing.assert_array_equal(drafted, x.accepted)
    assert np.all(x.accepted <= x.reached)
    assert x.rounds == x.histogram.sum() and x.rounds <= NEW - 1
    assert x.histogram @ np.arange(len(x.histogram)) == x.accepted.sum()
    # A draft of depth k comes right after one of depth k - 1.
    for before, source in zip(x.source, x.source[1:], strict=False):
      assert source <= 1 or before == source - 1


def test_fewer_drafts_say_the_same(sequential):
  for num_drafts in (0, 1, 2):
    completions = sequential.generate(decoding=Decoding(num_drafts=num_drafts))
    assert tokens(completions) == sequential.expected


def test_a_completion_ends_with_the_first_stop_token(sequential):
  expected = sequential.expected
  stops = (expected[0][3], expected[2][0])
  completions = sequential.generate(stop_ids=stops)
  lengths = set()
  for x, whole in zip(completions, expected, strict=True):
    end = next((i + 1 for i, token in enumerate(whole) if token in stops), NEW)
    assert x.tokens.tolist() == whole[:end]
    assert x.is_stopped == (whole[end - 1] in stops)
    lengths.add(end)
  assert len(lengths) > 1


@pytest.mark.parametrize("new", [1, 2, 5])
def test_any_number_of_new_tokens(sequential, new):
  completions = sequential.generate(max_new_tokens=new)
  assert tokens(completions) == [x[:new] for x in sequential.expected]


def test_recursion_past_the_last_module(sequential):
  decoding = Decoding(num_drafts=DEPTH + 2, recurse=True)
  assert tokens(sequential.generate(decoding=decoding)) == sequential.expected


@pytest.mark.parametrize("kind", mostly_slow(["eagle", "eagle3"], "eagle"))
def test_eagle_drafts_as_far_as_wanted(kind):
  model = Model(*MODELS[f"llama-{kind}"])
  completions = model.generate(decoding=Decoding(num_drafts=DEPTH + 2))
  assert tokens(completions) == model.expected
  reached = sum(x.reached for x in completions)
  assert len(reached) == DEPTH + 2 and reached[1] > 0


@pytest.mark.parametrize(
  "name", mostly_slow(["own", "trunk", "shifted", "bare"], "own")
)
def test_recursion_from_other_inputs(name):
  model = Model("llama", "sequential", 2, INPUTS[name])
  completions = model.generate(decoding=Decoding(num_drafts=5, recurse=True))
  assert tokens(completions) == model.expected
  assert sum(x.accepted[0] for x in completions) > 0


def forced(model, offset, stop_id=-1):
  """Decodes with a drafter of the right tokens, plus an offset; returns the state."""
  K, config = 4, model.config
  plan = generate.make_plan(config, Decoding(), drafters.given(K))
  slots = loop.slots_for(PROMPT_SLOTS + NEW, K)
  tokens_BS = np.zeros((len(LENGTHS), slots), np.int32)
  forced_BS = np.zeros_like(tokens_BS)
  for i, (prompt, new) in enumerate(zip(model.prompts, model.expected, strict=True)):
    tokens_BS[i, : len(prompt)] = prompt
    forced_BS[i, len(prompt) : len(prompt) + NEW] = new
  forced_BS = (forced_BS + offset) % config.tokenizer.vocab_size
  inputs = loop.Inputs(model.weights, forced_BS, None, np.array([stop_id], np.int32))
  lengths_B = np.array(LENGTHS, np.int32)
  state = loop.prefill(
    plan, PROMPT_SLOTS, inputs, tokens_BS, lengths_B, lengths_B + NEW, np.uint32(0),
    np.arange(len(LENGTHS)),
  )
  state = jax.device_get(loop.finish(plan, inputs, state)._replace(key_B=None))
  for i, new in enumerate(model.expected):
    end = new.index(stop_id) + 1 if stop_id in new else NEW
    assert state.length_B[i] == LENGTHS[i] + end
    assert state.tokens_BS[i, LENGTHS[i] : state.length_B[i]].tolist() == new[:end]
  return state


def test_an_oracle_is_always_right(sequential):
  stats = forced(sequential, offset=0).stats
  assert set(stats.rounds_B) == {math.ceil((NEW - 1) / (4 + 1))}
  np.testing.assert_array_equal(stats.accepted_BK, stats.reached_BK)


def test_a_stop_token_ends_a_run_of_accepted_drafts(sequential):
  # The third new token of the first prompt is the second draft of its first round.
  first, stop_id = sequential.expected[0], sequential.expected[0][2]
  assert stop_id not in first[:2]
  stats = forced(sequential, 0, stop_id).stats
  assert stats.rounds_B[0] == 1
  assert stats.reached_BK[0].tolist() == stats.accepted_BK[0].tolist() == [1, 1, 0, 0]
  assert stats.histogram_BR[0].tolist() == [0, 0, 1, 0, 0]


def test_an_always_wrong_drafter_costs_rounds_and_nothing_else(sequential):
  stats = forced(sequential, offset=1).stats
  assert set(stats.rounds_B) == {NEW - 1}
  assert stats.accepted_BK.sum() == 0


def ends(model, decoding):
  """Returns the plan, its inputs and the state after a whole generation."""
  plan = generate.make_plan(model.config, decoding)
  inputs = generate._inputs(model.weights, decoding, ())
  sizes = generate._Sizes(model.config, plan, model.prompts, NEW, PROMPT_SLOTS)
  state = generate._prefill(plan, inputs, sizes, model.prompts, 0, 0, None)
  return plan, inputs, loop.finish(plan, inputs, state)


@pytest.mark.slow
def test_a_cache_in_parts_says_the_same(sequential, monkeypatch):
  monkeypatch.setattr(attention, "_PARTS", len(LENGTHS))
  monkeypatch.setattr(attention, "_LEAST_BYTES", 0)
  # A model that differs, if only in what decoding does not use, has its own programs.
  model = copy.copy(sequential)
  model.config = with_overrides(model.config, {"trunk.remat": "full"})
  _, _, state = ends(model, Decoding())
  assert {len(cache.keys_BGHS) for cache in state.cache} == {len(LENGTHS)}
  rows = zip(np.asarray(state.tokens_BS), LENGTHS, sequential.expected, strict=True)
  for row, length, expected in rows:
    assert row[length : length + NEW].tolist() == expected


@pytest.mark.parametrize("name", mostly_slow(
  ["llama-none", "gpt2-sequential", "llama-eagle3", "gpt2-dflash"], "llama-none"
))
def test_texts_one_by_one_on_a_gpu_say_the_same(name, monkeypatch):
  """There a single token is computed as two rows, and its slot is updated in place."""
  for module in (cache_slots, weights):
    monkeypatch.setattr(module, "platform", lambda: "gpu")
  model = Model(*MODELS[name])
  model.config = with_overrides(model.config, {"trunk.remat": "none"})
  found = model.generate(batch_size=1)
  assert tokens(found) == model.expected


def test_caches_after_many_rounds_are_those_of_one_pass(model):
  assert_caches_are_of_one_pass(model, Decoding())


def assert_caches_are_of_one_pass(model, decoding):
  """One pass over the tokens that were committed: a prefill with them as the prompt."""
  plan, inputs, state = ends(model, decoding)
  slots = state.tokens_BS.shape[1]
  passed = loop.prefill(
    plan, slots, inputs, np.asarray(state.tokens_BS), state.length_B,
    state.length_B + 1, np.uint32(0), np.arange(len(LENGTHS)),
  )
  # The newest token is not cached yet; the k - 1 rows before it of module k have only
  # seen drafts.
  newest_B = np.asarray(state.length_B) - 1
  assert_slots_close(state.cache, passed.cache, newest_B)
  # A recursion has one cache, of depth 1.
  is_recursion = isinstance(decoding.tree, DynamicTree)
  is_chain = model.config.mtp.kind == "sequential" and not is_recursion
  caches = [x.draft_cache[0] if is_chain else x.draft_cache for x in (state, passed)]
  caches = [[x] if is_recursion else x for x in caches]
  for k, (rounds, once) in enumerate(zip(*caches, strict=True)):
    assert_slots_close(rounds, once, newest_B - k if is_chain else newest_B)


def assert_slots_close(cache, expected, known_B):
  """The first slots of every row are the same."""
  for leaf, reference in zip(
    jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True
  ):
    axis = np.argmax(leaf.shape)  # No other dimension is as large as the slots.
    leaf, reference = (np.moveaxis(x, axis, 1) for x in (leaf, reference))
    for row, known in enumerate(known_B):
      np.testing.assert_allclose(
        leaf[row, :known], reference[row, :known], rtol=2e-4, atol=2e-5
      )


def test_depths_say_in_decoding_what_they_say_in_training(model):
  """Drafts replaced by the true tokens, every depth's logits are those of training.

  EAGLE, whose parameters are the same at any depth, goes on for two drafts more.
  """
  depth = model.config.mtp.depth + 2 * (model.config.mtp.kind in ("eagle", "eagle3"))
  config = with_overrides(model.config, {"mtp.depth": depth})
  T = 12
  rng = np.random.default_rng(3)
  rows = rng.integers(0, config.tokenizer.vocab_size, (2, SEQ_LEN + 1 + depth))

  def trained(rows, length):
    batch = batch_of(rows, np.ones_like(rows), length)
    hidden_MBTD = jax.jit(MtpLm(config).apply)({"params": model.params}, batch)
    return np.stack([
      logits(config, model.params, hidden_BTD, m)
      for m, hidden_BTD in enumerate(hidden_MBTD)
    ])

  expected_MBTV = trained(rows, SEQ_LEN)
  drafter = drafters.own_predictors(model.config, depth)
  target = make_target(config)
  length_B = jnp.array([T, T - 5])
  seen = []

  @jax.jit
  def run(weights, tokens_BS):
    positions_BT = jnp.broadcast_to(jnp.arange(SEQ_LEN), tokens_BS.shape)
    hidden, feature, _ = target.forward(
      weights, tokens_BS, positions_BT, target.init(*tokens_BS.shape)
    )
    there = positions_BT <= length_B[:, None] - 2
    window = Window(
      tokens_BS, length_B, feature, jnp.where(there, positions_BT, SEQ_LEN),
      0 * length_B, length_B - 2,
    )
    drafted = []
    if depth == 0:
      return target.unembed(weights, hidden), drafted
    cache, carry = drafter.catch_up(weights, drafter.init(2, SEQ_LEN), window)

    def choose(logits_BV, k):
      drafted.append(logits_BV)
      return Choice(tokens_BS[jnp.arange(2), length_B + k - 1])

    drafter.propose(weights, cache, carry, window, choose)
    return target.unembed(weights, hidden), drafted

  own, seen = run(model.weights, jnp.asarray(rows[:, :SEQ_LEN], jnp.int32))
  np.testing.assert_allclose(own, expected_MBTV[0], rtol=2e-4, atol=2e-5)
  at_newest_MBV = expected_MBTV[:, jnp.arange(2), length_B - 2]
  if config.mtp.hidden == "trunk_shifted":
    # The trunk has no states past the newest position, as past the end of a row.
    ends = [(row, n - 1) for row, n in zip(rows, length_B.tolist(), strict=True)]
    at_newest_MBV = np.stack(
      [trained(row[None, : n + 1 + depth], n)[:, 0, -1] for row, n in ends], axis=1
    )
  for k, logits_BV in enumerate(seen, start=1):
    expected_BV = at_newest_MBV[k]
    np.testing.assert_allclose(logits_BV, expected_BV, rtol=2e-4, atol=2e-5)
  assert len(seen) == depth


def test_streaming_says_the_same(sequential):
  prompt, whole = sequential.prompts[1], sequential.generate()[1]
  parts = list(
    generate.stream(
      sequential.config, sequential.weights, prompt, max_new_tokens=NEW
    )
  )
  assert len(parts) == 1 + whole.rounds
  assert [len(x.tokens) for x in parts] == sorted({len(x.tokens) for x in parts})
  np.testing.assert_array_equal(parts[-1].tokens, whole.tokens)
  np.testing.assert_array_equal(parts[-1].source, whole.source)


SAMPLING = Warp(0.8, None, 0.95)


def test_match_says_what_plain_sampling_says(sequential):
  plain = sequential.generate(decoding=Decoding("match", SAMPLING, num_drafts=0))
  assert tokens(plain) != sequential.expected
  for proposal in ("argmax", "coupled"):
    decoding = Decoding("match", SAMPLING, proposal)
    assert tokens(sequential.generate(decoding=decoding)) == tokens(plain)
  for rule in ("leviathan", "block"):  # Without drafts they are plain sampling too.
    alone = sequential.generate(decoding=Decoding(rule, SAMPLING, num_drafts=0))
    assert tokens(alone) == tokens(plain)
  other = sequential.generate(decoding=Decoding("match", SAMPLING), seed=1)
  assert tokens(other) != tokens(plain)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["leviathan", "block"])
def test_sampling_does_not_depend_on_the_batch(sequential, rule):
  decoding = Decoding(rule, SAMPLING)
  together = sequential.generate(decoding=decoding)
  apart = sequential.generate(decoding=decoding, batch_size=2)
  assert tokens(together) == tokens(apart)


def test_other_prompts_and_settings_of_a_bucket_compile_nothing(sequential):
  decode = lambda prompts, settings, new: sequential.generate(  # noqa: E731
    prompts, Decoding("match", settings), batch_size=2, max_new_tokens=new
  )
  decode(sequential.prompts, Warp(0.5), 9)
  before = loop.prefill._cache_size(), loop.finish._cache_size()
  decode(sequential.prompts[::-1][:3], Warp(1.5), 12)
  assert (loop.prefill._cache_size(), loop.finish._cache_size()) == before


@pytest.mark.slow
@pytest.mark.parametrize("is_batch_sharded", [False, True])
def test_on_a_mesh(sequential, is_batch_sharded):
  sizes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  mesh = make_mesh(tiny_config(overrides=sizes).mesh)
  axes = logical_axes(accounting.abstract_params(sequential.config))
  sharded = jax.device_put(sequential.params, tree_shardings(mesh, axes))
  weights = unstack(sharded, sequential.config)
  rows = tree_shardings(mesh, ("batch",)) if is_batch_sharded else None
  completions = generate.generate(
    sequential.config, weights, sequential.prompts[:4], max_new_tokens=NEW,
    prompt_length=PROMPT_SLOTS, batch_sharding=rows,
  )
  assert tokens(completions) == sequential.expected[:4]


def test_no_prompt_needs_no_work(sequential):
  assert sequential.generate([]) == []


@pytest.mark.parametrize(
  "change,message",
  [
    ({"prompts": [[]]}, r"prompts must have 1 to 9 tokens, prompt 0 has 0"),
    ({"prompts": [[1], [1] * 10]}, r"1 to 9 tokens, prompt 1 has 10"),
    ({"prompts": [[1, 40]]}, r"token ids must be in \[0, 40\), prompt 0 has 40"),
    ({"prompts": [[-1]]}, r"token ids must be in \[0, 40\), prompt 0 has -1"),
    ({"max_new_tokens": 0}, r"max_new_tokens must be an integer from 1 to \d+, got 0"),
    ({"batch_size": 0}, r"batch_size must be an integer from 1 to \d+, got 0"),
    ({"num_drafts": 4}, r"at most the model's 3 extra.*recurse=True; got 4"),
    ({"num_drafts": -1}, r"num_drafts must be an integer from 0 to 64, got -1"),
    ({"rule": "typical"}, r"rule must be one of 'greedy'.*got 'typical'"),
    ({"proposal": "best"}, r"proposal must be one of.*got 'best'"),
    ({"rule": "match"}, r"rule 'match' samples and must have a positive temperature"),
    ({"warp": Warp(1.0)}, r"rule 'greedy' takes the arg max and no temperature"),
    ({"proposal": "sample"}, r"rule 'greedy' must have proposal 'argmax'"),
    (
      {"rule": "block", "warp": Warp(1.0), "proposal": "argmax"},
      r"rule 'block' must have the distribution q.*got proposal 'argmax'",
    ),
    (
      {"rule": "leviathan", "warp": Warp(1.0), "proposal": "coupled"},
      r"only rule 'match' may use, got rule 'leviathan'",
    ),
  ],
)
def test_bad_input_is_refused(sequential, change, message):
  fields = {field.name for field in dataclasses.fields(Decoding)}
  decoding = Decoding(**{k: v for k, v in change.items() if k in fields})
  keywords = {k: v for k, v in change.items() if k not in fields}
  with pytest.raises(ValueError, match=message):
    sequential.generate(decoding=decoding, **keywords)


def test_a_drafter_without_a_distribution_cannot_be_sampled_from(sequential):
  for proposal, rule in (("sample", "leviathan"), ("auto", "block")):
    with pytest.raises(ValueError, match=r"(needs|must have).*distribution"):
      generate.make_plan(
        sequential.config, Decoding(rule, SAMPLING, proposal), drafters.given(2)
      )


@pytest.mark.parametrize("kind", ["sequential", "parallel", "eagle"])
def test_drafts_are_drawn_where_the_rule_uses_their_distribution(kind):
  config = tiny_config(kind, 2)
  proposals = {
    rule: generate.make_plan(config, Decoding(rule, SAMPLING)).proposal
    for rule in ("match", "leviathan", "block")
  }
  assert proposals == {"match": "argmax", "leviathan": "sample", "block": "sample"}


def test_heads_cannot_recurse_and_learned_positions_bound_the_length():
  config = tiny_config("parallel", 2)
  with pytest.raises(ValueError, match=r"2 extra predictor.*'parallel'\); got 3"):
    drafters.own_predictors(config, 3, recurse=True)
  model = Model("gpt2", "none", 0, {})
  with pytest.raises(ValueError, match=r"at most 22 tokens together.*got 9 \+ 14"):
    model.generate(max_new_tokens=NEW + 1)


@pytest.mark.parametrize("name, value, message", [
  ("max_new_tokens", 2.5, "max_new_tokens must be an integer from 1 to "),
  ("max_new_tokens", 0, "max_new_tokens must be an integer from 1 to "),
  ("max_new_tokens", 2**28, "prompt and max_new_tokens must fit into memory: 1 prompt"),
  ("seed", -1, "seed must be an integer from 0 to 4294967295, got -1."),
  ("seed", 2**32, "seed must be an integer from 0 to 4294967295, got 4294967296."),
  ("first", -1, "first must be an integer from 0 to "),
  ("first", 2**31, "first must be an integer from 0 to "),
  ("num_drafts", 10**5, "num_drafts must be an integer from 0 to 64, got 100000."),
])
def test_numbers_out_of_range_are_refused_before_any_work(name, value, message):
  limits = {"max_new_tokens": 4, "seed": 0, "first": 0}
  if name == "num_drafts":
    limits["decoding"] = Decoding(num_drafts=value, recurse=True)
  else:
    limits[name] = value
  with pytest.raises(ValueError) as caught:
    generate.generate(tiny_config("sequential", 1), None, [np.array([1])], **limits)
  assert str(caught.value).startswith(message)


def test_a_prompt_that_does_not_fit_into_memory_is_refused():
  prompts = [np.ones(10**6, int)]
  with pytest.raises(ValueError, match=r"must fit into memory: 1 prompt\(s\) pad"):
    generate.generate(tiny_config("sequential", 1), None, prompts, max_new_tokens=4)
