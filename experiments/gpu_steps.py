"""Train steps whose time on a GPU is worth knowing before there is one.

Question: where does the time of a step go on a GPU, and which choice is the fastest?
Expectation: unrolled layers without rematerialisation are the fastest that fits;
attention of cuDNN halves the time of plain XLA; experts and latent attention reach a
third of the utilisation of a dense model.

  mtp-jax plan gpu_steps --topology=h200:1 --output=experiments/results/plan
  mtp-jax plan gpu_steps --topology=h200:1 --only=1M --packs=8
  mtp-jax plan gpu_steps --topology=h200:1 --only='350M,D=0,auto' --decode=1,8,64

`auto` is what training does; the other trials force what it has to beat. The plan is a
model of the time, not a measurement: `make gpu` measures. Nothing is to be trained: the
tokens are of no text.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import base

# Of GPT-3 (Brown et al. 2020, table 2.1), as in `launch.benchmark`.
_350M = {
  "trunk.embed_dim": 1024, "trunk.num_layers": 24, "trunk.num_heads": 16,
  "trunk.num_kv_heads": 8, "trunk.mlp_dim": 2752,
}
_1B = {
  "trunk.embed_dim": 2048, "trunk.num_layers": 24, "trunk.num_heads": 16,
  "trunk.num_kv_heads": 8, "trunk.mlp_dim": 5504, "data.seq_len": 2048,
  "data.batch_size": 8,
}
_EXPERTS = _350M | {
  "trunk.attention_kind": "latent", "trunk.num_kv_heads": 16,
  "trunk.latent.query_rank": 384, "trunk.latent.kv_rank": 256,
  "trunk.latent.nope_dim": 64, "trunk.latent.rope_dim": 32,
  "trunk.latent.value_dim": 64, "trunk.moe.num_experts": 16,
  "trunk.moe.experts_per_token": 4, "trunk.moe.expert_dim": 704,
}
# Of `launch.benchmark pack`.
_1M = {
  "trunk.embed_dim": 128, "trunk.num_layers": 4, "trunk.num_heads": 4,
  "trunk.num_kv_heads": 2, "trunk.mlp_dim": 384, "tokenizer.kind": "bytes",
  "tokenizer.vocab_size": 264,
}
_LOOP = {"trunk.scan_layers": "on", "trunk.remat": "names"}
_BYTES = {"tokenizer.kind": "bytes", "tokenizer.vocab_size": 264}


def get_config() -> ConfigDict:
  config = base.get_config()
  config.name = "gpu_steps"
  config.tokenizer.update(kind="bpe", vocab_size=50304)
  config.data.update(seq_len=1024, batch_size=16)
  return config


def sweep() -> Iterator[dict]:
  """Yields sizes and depths, each as training runs it and as it has to beat it."""

  def trial(name: str, depth: int, values: dict) -> dict:
    kind = "sequential" if depth else "none"
    return values | {"name": name, "mtp.kind": kind, "mtp.depth": depth}

  yield trial("350M,D=0,auto", 0, _350M)
  yield trial("350M,D=0,loop", 0, _350M | _LOOP)
  yield trial("350M,D=0,loop,attention=xla", 0, _350M | _LOOP | {
    "trunk.attention": "xla"
  })
  # JAX from 0.12 on; no roofline shows the products that it skips between documents.
  yield trial("350M,D=0,packed", 0, _350M | {"trunk.attention": "cudnn_packed"})
  yield trial("350M,D=1,auto", 1, _350M)
  yield trial("350M,D=3,auto", 3, _350M)
  yield trial("350M,D=3,loop", 3, _350M | _LOOP)
  yield trial("350M,D=1,bytes,auto", 1, _350M | _BYTES)
  yield trial("350M,D=1,bytes,block_tokens=4096", 1, _350M | _BYTES | {
    "loss.block_tokens": 4096
  })
  yield trial("1.3B,D=1,auto", 1, _1B)
  for length in (128, 256):  # A pack of 8, and one trial with as many rows.
    for rows in (16, 128):
      yield trial(f"1M,T={length},rows={rows}", 0, _1M | {
        "data.seq_len": length, "data.batch_size": rows
      })
  yield trial("experts,D=1,auto", 1, _EXPERTS)
  yield trial("experts,D=1,blocked", 1, _EXPERTS | {
    "trunk.moe.grouped_matmul": "blocked"
  })
