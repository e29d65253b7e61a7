"""Trees of drafts: which nodes they have, what is verified, and that nothing changes.

Greedy text and samples of rule `match` must be those of plain decoding, whatever the
tree; the caches must be those of one pass; the nodes must be those of a search that is
written out.
"""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import accounting
from mtp_jax.decode import drafters, generate, loop, trees
from mtp_jax.decode.generate import Decoding
from mtp_jax.decode.target import unstack
from mtp_jax.decode.trees import DynamicTree, StaticTree, best_static_tree
from mtp_jax.predictors.drafting import (
  Drafter,
  Nodes,
  Recursion,
  Window,
  chain,
)
from mtp_jax.sharding import logical_axes, make_mesh, tree_shardings
from tests.common import INPUTS, LATENT, MINIMAL, SHARED, mostly_slow, tiny_config
from tests.test_decode import (
  LENGTHS,
  MODELS,
  NEW,
  PROMPT_SLOTS,
  SAMPLING,
  Model,
  assert_caches_are_of_one_pass,
  assert_slots_close,
  tokens,
)

# Many nodes, so that tiny models accept some of every depth.
WIDE = StaticTree(
  tuple((r,) for r in range(6))
  + tuple((q, r) for q in range(4) for r in range(5))
  + tuple((q, p, r) for q, p in ((0, 0), (1, 0), (3, 4)) for r in (0, 2, 1))
)
SPINE = StaticTree(tuple((0,) * k + (r,) for k in range(3) for r in range(12)))
SHORT = StaticTree(tuple((0,) * k + (r,) for k in range(2) for r in range(12)))
GROWN = DynamicTree(depth=3, width=5, num_nodes=40)
CASES = {
  "llama-parallel": (MODELS["llama-parallel"], WIDE),
  "gpt2-medusa": (MODELS["gpt2-medusa"], WIDE),
  "llama-sequential": (MODELS["llama-sequential"], SPINE),
  "gpt2-sequential": (MODELS["gpt2-sequential"], SPINE),
  "gpt2-fed-none": (MODELS["gpt2-fed-none"], WIDE),
  "latent-sequential": (MODELS["latent-sequential"], SHORT),
  "llama-grown": (("llama", "sequential", 1, {}), GROWN),
  "gpt2-grown": (("gpt2", "sequential", 1, INPUTS["before"] | MINIMAL), GROWN),
  "latent-shared-grown": (("llama", "sequential", 2, LATENT | SHARED), GROWN),
  "gpt2-own": (MODELS["gpt2-medusa-own"], WIDE),
  "llama-eagle-grown": (("llama", "eagle", 1, {}), GROWN),
  "llama-eagle3-grown": (MODELS["llama-eagle3-own"], GROWN),
  "llama-eagle3-spine": (MODELS["llama-eagle3"], SPINE),
}


@functools.cache
def case(name):
  model, tree = CASES[name]
  return Model(*model), Decoding(tree=tree)


@pytest.mark.parametrize(
  "name", mostly_slow(CASES, "llama-parallel", "llama-sequential", "llama-grown")
)
def test_greedy_says_what_whole_forward_passes_say(name):
  model, decoding = case(name)
  completions = model.generate(decoding=decoding)
  assert tokens(completions) == model.expected
  histogram = sum(x.histogram for x in completions)
  assert np.count_nonzero(histogram) > 1, histogram  # Rejections and acceptances.
  for x in completions:
    drafted = [np.sum(x.source == k + 1) for k in range(decoding.tree.depth)]
    np.testing.assert_array_equal(drafted, x.accepted)
    assert np.all(x.accepted <= x.reached) and x.rounds == x.histogram.sum()
    assert x.histogram @ np.arange(len(x.histogram)) == x.accepted.sum()


@pytest.mark.parametrize("name", mostly_slow(
  [
    "llama-parallel", "llama-sequential", "llama-eagle3-grown", "gpt2-grown",
    "latent-shared-grown",
  ],
  "llama-parallel", "llama-sequential",
))
def test_caches_after_many_rounds_are_those_of_one_pass(name):
  assert_caches_are_of_one_pass(*case(name))


@pytest.mark.parametrize(
  "name", mostly_slow(["llama-parallel", "latent-shared-grown"], "llama-parallel")
)
def test_match_says_what_plain_sampling_says(name):
  model, decoding = case(name)
  plain = model.generate(decoding=Decoding("match", SAMPLING, num_drafts=0))
  assert tokens(plain) != model.expected
  found = model.generate(decoding=Decoding("match", SAMPLING, tree=decoding.tree))
  assert tokens(found) == tokens(plain)
  assert sum(x.accepted[1:].sum() for x in found) > 0


def test_siblings_are_accepted_where_a_chain_fails():
  model, decoding = case("llama-parallel")
  rounds = [
    sum(x.rounds for x in model.generate(decoding=Decoding(tree=tree)))
    for tree in (None, StaticTree(((0,), (0, 0), (0, 0, 0))), decoding.tree)
  ]
  assert rounds[0] == rounds[1] > rounds[2]  # A tree without branches is the chain.


@pytest.mark.parametrize("name", ["llama-parallel", "llama-grown"])
def test_plans_of_equal_trees_share_their_programs(name):
  model, decoding = case(name)
  again = Decoding(tree=dataclasses.replace(decoding.tree))
  plans = [generate.make_plan(model.config, x) for x in (decoding, again)]
  assert plans[0] == plans[1] and hash(plans[0]) == hash(plans[1])


@pytest.mark.slow
def test_on_a_mesh():
  model, decoding = case("llama-sequential")
  sizes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  mesh = make_mesh(tiny_config(overrides=sizes).mesh)
  axes = logical_axes(accounting.abstract_params(model.config))
  sharded = jax.device_put(model.params, tree_shardings(mesh, axes))
  completions = generate.generate(
    model.config, unstack(sharded, model.config), model.prompts[:4],
    max_new_tokens=NEW, prompt_length=PROMPT_SLOTS, decoding=decoding,
    batch_sharding=tree_shardings(mesh, ("batch",)),
  )
  assert tokens(completions) == model.expected[:4]


def test_a_completion_ends_with_the_first_stop_token():
  model, decoding = case("llama-sequential")
  stops = (model.expected[0][3], model.expected[2][0])
  completions = model.generate(decoding=decoding, stop_ids=stops)
  for x, whole in zip(completions, model.expected, strict=True):
    end = next((i + 1 for i, token in enumerate(whole) if token in stops), NEW)
    assert x.tokens.tolist() == whole[:end]
    assert x.is_stopped == (whole[end - 1] in stops)


@pytest.mark.parametrize("new", [1, 2, 5])
def test_any_number_of_new_tokens(new):
  model, decoding = case("llama-grown")
  completions = model.generate(decoding=decoding, max_new_tokens=new)
  assert tokens(completions) == [x[:new] for x in model.expected]


# The right token is the second of two siblings, and children of the wrong one say the
# right thing too: they must not be accepted. Rows 2, 5 and 6 are the right path.
FORCED_PARENTS, FORCED_DEPTHS = (0, 0, 1, 2, 2, 5), (1, 1, 2, 2, 2, 3)
FORCED_OFFSETS = (1, 0, 0, 1, 0, 0)


def forced_drafter(num_drafts, parents, depths, offsets):
  def propose(drafts_BS, cache, carry, window, choose):
    ahead_BN = window.length_B[:, None] - 1 + np.array(depths)
    rows_B1 = jnp.arange(len(ahead_BN))[:, None]
    token_BN = drafts_BS.at[rows_B1, ahead_BN].get(mode="clip") + np.array(offsets)
    return cache, Nodes(
      token_BN % 40, jnp.broadcast_to(jnp.array(parents), token_BN.shape)
    )

  chain = drafters.given(num_drafts)
  return chain._replace(propose=propose, num_nodes=len(parents))


def forced(model, offsets=FORCED_OFFSETS, stop_id=-1):
  """Decodes with nodes that are right where their offset is 0, in no slot too many.

  Checks the text and the target's cache, returns the state.
  """
  drafter = forced_drafter(3, FORCED_PARENTS, FORCED_DEPTHS, offsets)
  plan = generate.make_plan(model.config, Decoding(), drafter)
  slots = loop.slots_for(PROMPT_SLOTS + NEW, drafter.num_drafted)
  assert slots == PROMPT_SLOTS + NEW + len(FORCED_PARENTS)
  tokens_BS = np.zeros((len(LENGTHS), slots), np.int32)
  known_BS = np.zeros_like(tokens_BS)
  for i, (prompt, new) in enumerate(zip(model.prompts, model.expected, strict=True)):
    tokens_BS[i, : len(prompt)] = prompt
    known_BS[i, len(prompt) : len(prompt) + NEW] = new
  inputs = loop.Inputs(model.weights, known_BS, None, np.array([stop_id], np.int32))
  lengths_B = np.array(LENGTHS, np.int32)
  state = loop.prefill(
    plan, PROMPT_SLOTS, inputs, tokens_BS, lengths_B, lengths_B + NEW, np.uint32(0),
    np.arange(len(LENGTHS)),
  )
  state = jax.device_get(loop.finish(plan, inputs, state)._replace(key_B=None))
  known_BP, length_B = state.tokens_BS[:, : PROMPT_SLOTS + NEW], state.length_B
  target = jax.jit(plan.target.forward)(
    model.weights, known_BP, np.arange(known_BP.shape[1])[None] + 0 * known_BP,
    plan.target.init(*tokens_BS.shape),
  )
  assert_slots_close(state.cache, target[2], length_B - 1)
  for i, new in enumerate(model.expected):
    end = new.index(stop_id) + 1 if stop_id in new else NEW
    assert state.length_B[i] == LENGTHS[i] + end
    assert state.tokens_BS[i, LENGTHS[i] : state.length_B[i]].tolist() == new[:end]
  return state


@pytest.mark.parametrize("name", mostly_slow(
  ["llama-sequential", "gpt2-sequential", "latent-sequential"], "llama-sequential"
))
def test_a_tree_that_holds_the_right_path_is_always_right(name):
  state = forced(case(name)[0])
  assert set(state.stats.rounds_B) == {math.ceil((NEW - 1) / (3 + 1))}
  np.testing.assert_array_equal(state.stats.accepted_BK, state.stats.reached_BK)
  assert loop.CORRECTION not in state.source_BS


def test_a_wrong_tree_costs_rounds_and_nothing_else():
  model = case("llama-sequential")[0]
  state = forced(model, offsets=(1, 2, 0, 1, 0, 0))
  assert set(state.stats.rounds_B) == {NEW - 1}
  assert state.stats.accepted_BK.sum() == 0
  # Right until there is no node for the next place: nothing was rejected there.
  state = forced(model, offsets=(0, 1, 0, 0, 1, 1))
  accepted_BK = state.stats.accepted_BK
  assert accepted_BK[:, :2].all() and not accepted_BK[:, 2].any()
  assert loop.CORRECTION not in state.source_BS


def test_a_stop_token_ends_an_accepted_path():
  model = case("llama-sequential")[0]
  first, stop_id = model.expected[0], model.expected[0][2]
  assert stop_id not in first[:2]
  stats = forced(model, stop_id=stop_id).stats
  assert stats.rounds_B[0] == 1
  assert stats.reached_BK[0].tolist() == stats.accepted_BK[0].tolist() == [1, 1, 0]
  assert stats.histogram_BR[0].tolist() == [0, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name, decoding", [
  ("llama-grown", Decoding()),
  ("llama-grown", Decoding("leviathan", SAMPLING, "sample")),
])
def test_a_chain_of_recursion_is_what_recurse_drafts(name, decoding):
  model, _ = case(name)
  inputs = generate._inputs(model.weights, decoding, ())
  found = []
  for drafter in (
    drafters.own_predictors(model.config, 3, recurse=True),
    chain(drafters.own_recursion(model.config), 3),
  ):
    plan = generate.make_plan(model.config, decoding, drafter)
    sizes = generate._Sizes(model.config, plan, model.prompts, NEW, PROMPT_SLOTS)
    state = generate._prefill(plan, inputs, sizes, model.prompts, 0, 0, None)
    state = loop.finish(plan, inputs, state)
    found.append(jax.device_get((state.tokens_BS, state.source_BS, state.stats)))
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert found[0][2].accepted_BK[:, 1:].sum() > 0


def random_parents(rng, num_nodes):
  """Parents of nodes in topological order, anywhere before them."""
  return [int(rng.integers(0, i + 1)) for i in range(num_nodes)]


def test_rows_see_their_ancestors_and_a_path_is_accepted():
  rng = np.random.default_rng(0)
  B, N, slots = 100, 7, 16
  parents = np.array([random_parents(rng, N) for _ in range(B)])
  length_B = rng.integers(1, 8, B)
  token_BN, own_BX = np.zeros((B, N), int), rng.integers(0, 3, (B, 1 + N))
  for row, parent in zip(token_BN, parents, strict=True):  # Siblings differ.
    for p in set(parent.tolist()):
      row[parent == p] = 10 * p + np.arange(np.sum(parent == p))
  own_BX = np.where(own_BX < 2, 10 * np.arange(1 + N) + own_BX, own_BX)

  @jax.jit
  def run(nodes, length_B, own_BX):
    sees = trees.ancestors(nodes.parent_BN, N)
    places = trees.places(sees, length_B, slots)
    return places, trees.accepted_path(own_BX, nodes, sees, N)

  places, (path_BR, accepted_B) = jax.device_get(
    run(Nodes(token_BN, parents), length_B, own_BX)
  )
  for b in range(B):
    first = length_B[b] - 1
    for x in range(1 + N):
      line, node = [x], x
      while node:
        node = parents[b][node - 1]
        line.append(int(node))
      assert places.position_BT[b, x] == first + len(line) - 1
      assert places.slot_BT[b, x] == first + x
      seen = set(range(first)) | {first + y for y in line}
      assert set(np.flatnonzero(places.visible_BTS[b, x])) == seen
    path, row = [0], 0
    while True:
      right = [
        1 + i for i in range(N)
        if parents[b][i] == row and token_BN[b, i] == own_BX[b, row]
      ]
      if not right:
        break
      (row,) = right
      path.append(row)
    assert accepted_B[b] == len(path) - 1
    assert path_BR[b].tolist() == path + [0] * (1 + N - len(path))
  assert set(accepted_B.tolist()) >= {0, 1, 2, 3}


def test_nodes_of_a_static_tree_are_the_likeliest_tokens_by_rank():
  B, K, V = 3, 3, 9
  logits = np.random.default_rng(0).normal(size=(K, B, V)).astype(np.float32)
  chosen = []

  def propose(weights, cache, carry, window, choose):
    chosen.extend(choose(jnp.array(logits[k - 1]), k) for k in range(1, 1 + K))
    return cache, chosen

  drafter = Drafter(K, True, None, None, propose, feeds_choices=False)
  tree = trees.static(drafter, WIDE)
  _, nodes = tree.propose((), (), (), None, None)
  order = np.argsort(-logits, axis=-1)
  for i, path in enumerate(WIDE.paths):
    expected = order[len(path) - 1][:, path[-1]]
    np.testing.assert_array_equal(nodes.token_BN[:, i], expected)
    parent = 0 if len(path) == 1 else 1 + WIDE.paths.index(path[:-1])
    assert set(np.asarray(nodes.parent_BN)[:, i]) == {parent}
  np.testing.assert_array_equal(np.stack([x.token_B for x in chosen]), order[:, :, 0])
  assert tree.num_drafted == len(WIDE.paths) and tree.num_drafts == K


TABLE, VOCAB = 211, 5


def select(state, token):
  """Returns the row of a table that all tokens so far select."""
  return (7 * state + token + 1) % TABLE


def table_recursion():
  """A drafter whose state is the row of a table."""
  return Recursion(
    init=lambda rows, slots: (),
    catch_up=None,
    step=lambda weights, cache, state_BW1, token_BW, places: (
      cache, select(state_BW1, token_BW[..., None])
    ),
    logits=lambda weights, state: weights[state[..., 0]],
  )


def grow(tree, after):
  """Returns the nodes of a dynamic tree as {tokens from the root: log-probability}.

  `after(path)` is log_p_V of the token after a path.
  """
  beam, pool = {(): 0.0}, {}
  for _ in range(tree.depth):
    found = {}
    for path, value in beam.items():
      row = np.asarray(after(path), np.float64)
      for token in np.argsort(-row, kind="stable")[: tree.width]:
        found[*path, int(token)] = value + row[token]
    pool |= found
    best = sorted(found, key=found.get, reverse=True)
    beam = {path: found[path] for path in best[: tree.width]}
  kept = sorted(pool, key=pool.get, reverse=True)  # Stable: the first of equal ones.
  return {path: pool[path] for path in kept[: tree.num_nodes]}


def paths_of(token_N, parent_N):
  """Returns the tokens from the root to every node; parents must come first."""
  paths = [()]
  for token, parent in zip(token_N.tolist(), parent_N.tolist(), strict=True):
    assert 0 <= parent < len(paths)
    paths.append((*paths[parent], token))
  assert len(set(paths)) == len(paths)
  return paths[1:]


@pytest.mark.parametrize("tree", [
  DynamicTree(3, 3, 9), DynamicTree(1, 4, 3), DynamicTree(4, 2, 14),
  DynamicTree(5, 1, 5),
], ids=str)
@pytest.mark.parametrize("scale", [1.5, 0.0, 1e5])  # Equal tokens; certain ones.
def test_a_dynamic_tree_has_the_nodes_of_a_search_written_out(tree, scale):
  rng = np.random.default_rng(0)
  logits = (scale * rng.normal(size=(TABLE, VOCAB))).astype(np.float32)
  log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  window = Window(jnp.zeros((6, 12), jnp.int32), jnp.full(6, 4), None, None, None, None)
  drafter = trees.dynamic(table_recursion(), tree)
  propose = jax.jit(lambda w, s: drafter.propose(w, (), s, window, None)[1])
  nodes = jax.device_get(propose(logits, jnp.arange(6)[:, None]))
  for first, token_N, parent_N in zip(range(6), *nodes, strict=True):

    def after(path, first=first):
      return log_p[functools.reduce(select, path, first)]

    paths, expected = paths_of(token_N, parent_N), grow(tree, after)
    assert len(paths) == tree.num_nodes
    if scale == 1.5:
      assert set(paths) == set(expected)
    else:  # Which of equal nodes are taken is not said, what they are worth is.
      worth = [
        sum(float(after(path[:i])[token]) for i, token in enumerate(path))
        for path in paths
      ]
      np.testing.assert_allclose(sorted(worth), sorted(expected.values()), rtol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(
  ["llama-grown", "latent-shared-grown", "llama-eagle-grown"], "llama-grown"
))
def test_a_beam_drafts_what_each_of_its_paths_would_alone(name):
  model, decoding = case(name)
  config, tree = model.config, decoding.tree
  plan = generate.make_plan(config, decoding)
  inputs = generate._inputs(model.weights, decoding, ())
  sizes = generate._Sizes(config, plan, model.prompts, NEW, PROMPT_SLOTS)
  state = generate._prefill(plan, inputs, sizes, model.prompts, 0, 0, None)
  for _ in range(2):  # What the beams before have cached must not be seen.
    state = loop.step(plan, inputs, state)
  recursion, slots = drafters.own_recursion(config), state.tokens_BS.shape[1]

  @jax.jit
  def alone(weights, tokens_1S, length_1, path_K):
    """Returns log_p_V after every prefix of one path, as a chain drafts it."""
    position_1S = jnp.arange(slots)[None]
    _, feature_1SD, _ = plan.target.forward(
      weights, tokens_1S, position_1S, plan.target.init(1, slots)
    )
    there_1S = jnp.where(position_1S <= length_1 - 2, position_1S, slots)
    cache, state_1D = recursion.catch_up(
      weights, recursion.init(1, slots),
      Window(tokens_1S, length_1, feature_1SD, there_1S, 0 * length_1, length_1 - 2),
    )
    logits = [recursion.logits(weights, state_1D)[0]]
    for i, token in enumerate(path_K):
      cache, state_11D = recursion.step(
        weights, cache, state_1D[:, None], token[None, None], length_1[:, None] - 1 + i
      )
      state_1D = state_11D[:, 0]
      logits.append(recursion.logits(weights, state_1D)[0])
    return jax.nn.log_softmax(jnp.stack(logits), axis=-1)

  tokens_BS, length_B, nodes = jax.device_get(
    (state.tokens_BS, state.length_B, state.nodes)
  )
  for b in (1, 2):

    def after(path, row=slice(b, b + 1)):
      path_K = np.array([*path, 0, 0, 0][: tree.depth - 1], np.int32)
      return alone(model.weights, tokens_BS[row], length_B[row], path_K)[len(path)]

    paths = paths_of(nodes.token_BN[b], nodes.parent_BN[b])
    assert set(paths) == set(grow(tree, after))
    assert max(map(len, paths)) == tree.depth


@pytest.mark.parametrize("hits, spine_only", [
  (((0.6, 0.2, 0.15), (0.5, 0.25, 0.05)), False),
  (((0.6, 0.2), (0.7, 0.1), (0.4, 0.35)), True),
  (((0.9, 0.1), (0.9, 0.1)), False),
])
def test_the_best_static_tree_is_the_best_of_all(hits, spine_only):
  K, R = np.shape(hits)
  every = [
    path for k in range(1, 1 + K) for path in itertools.product(range(R), repeat=k)
    if not (spine_only and any(path[:-1]))
  ]
  value = {path: math.prod(hits[k][r] for k, r in enumerate(path)) for path in every}
  for num_nodes in range(1, 1 + len(every)):
    best = max(
      sum(value[path] for path in some)
      for some in itertools.combinations(every, num_nodes)
      if all(path[:-1] in some for path in some if path[:-1])
    )
    tree = best_static_tree(hits, num_nodes, spine_only)
    assert tree.num_nodes == num_nodes and set(tree.paths) <= set(every)
    assert trees.expected_tokens(tree, hits) == pytest.approx(1 + best)


def test_trees_are_read_and_kept_in_order(tmp_path):
  assert trees.read("dynamic:4,3,20") == DynamicTree(4, 3, 20)
  path = tmp_path / "tree.json"
  path.write_text(json.dumps({"paths": [[0, 1], [1], [0]], "hits": []}))
  tree = trees.read(str(path))
  assert tree == StaticTree(((0,), (1,), (0, 1)))
  assert hash(tree) == hash(StaticTree(((1,), (0, 1), (0,))))
  assert (tree.depth, tree.num_nodes, tree.width) == (2, 3, 2)
  assert tree.parents == (0, 0, 1)


@pytest.mark.parametrize("make, message", [
  (lambda: StaticTree(()), r"a tree must have at least one path, got none"),
  (
    lambda: StaticTree(tuple((i,) for i in range(10**5))),
    r"at most 1024 paths, got 100000",
  ),
  (lambda: DynamicTree(2, 10**4, 10**5), r"at most 1024, got 100000"),
  (lambda: StaticTree(((0,), ())), r"paths must be of ranks from 0 on.*got \(\)"),
  (lambda: StaticTree(((0,), (-1,))), r"paths must be of ranks from 0 on.*got \(-1,\)"),
  (lambda: StaticTree(((0,), (1.0,))), r"paths must be of ranks.*got \(1.0,\)"),
  (lambda: StaticTree(((0,), (0,))), r"paths must differ, got \(0,\) 2 times"),
  (
    lambda: StaticTree(((0,), (1, 0))),
    r"the parent of every node, \(1, 0\) is without \(1,\)",
  ),
  (lambda: DynamicTree(0, 2, 1), r"depth of a tree must be at least 1, got 0"),
  (lambda: DynamicTree(2, 2, 7), r"num_nodes of a tree must be at most 6.*got 7"),
  (lambda: trees.read("dynamic:3,2"), r"dynamic:DEPTH,WIDTH,NODES.*'dynamic:3,2'"),
  (lambda: trees.read("no/file"), r"or a JSON file with paths, got 'no/file'"),
  (lambda: best_static_tree([[0.5]], 2), r"num_nodes must be 1 to 1.*got 2"),
  (
    lambda: best_static_tree([[0.5, 0.1]] * 2, 5, spine_only=True),
    r"num_nodes must be 1 to 4.*along the most likely tokens, got 5",
  ),
  (lambda: best_static_tree([[1.5]], 1), r"hits must be \[K, R\] in \[0, 1\]"),
])
def test_bad_trees_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("kind, depth, decoding, message", [
  ("medusa", 2, Decoding(tree=WIDE), r"static tree.*at most the model's 2.*got 3"),
  ("none", 0, Decoding(tree=WIDE), r"at most the model's 0 extra predictor"),
  (
    "sequential", 3, Decoding(tree=WIDE),
    r"must be children of the most likely tokens.*got \(1, 0\)",
  ),
  (
    "medusa", 3, Decoding(tree=GROWN),
    r"must be EAGLE or one sequential module.*'medusa'.*depth 3",
  ),
  ("sequential", 2, Decoding(tree=GROWN), r"one sequential module.*mtp.depth 2"),
  ("medusa", 3, Decoding(num_drafts=3, tree=WIDE), r"num_drafts must be None.*got 3"),
  (
    "medusa", 3, Decoding(tree=StaticTree(tuple((r,) for r in range(41)))),
    r"at most as wide as the vocabulary .*, 40, got width 41",
  ),
  (
    "medusa", 3, Decoding("leviathan", SAMPLING, tree=WIDE),
    r"a tree must have rule 'greedy' or 'match'.*one-hot.*got rule 'leviathan'",
  ),
  ("medusa", 3, Decoding("block", SAMPLING, tree=WIDE), r"a tree must have rule"),
  (
    "medusa", 3, Decoding("match", SAMPLING, "coupled", tree=WIDE),
    r"a tree must have proposal 'argmax'.*got 'coupled'",
  ),
])
def test_trees_that_do_not_fit_are_refused(kind, depth, decoding, message):
  with pytest.raises(ValueError, match=message):
    generate.make_plan(tiny_config(kind, depth), decoding)


def test_a_file_of_deeply_nested_lists_is_no_tree(tmp_path):
  file = tmp_path / "tree.json"
  file.write_text('{"paths": ' + "[" * 10**5 + "]" * 10**5 + "}")
  with pytest.raises(ValueError, match=r"JSON file with paths, got .* \(Recursion"):
    trees.read(str(file))
