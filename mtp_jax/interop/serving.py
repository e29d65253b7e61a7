"""Which engine opens which layout, with how many drafts, and by which command.

What is said of vLLM 0.32.0 and transformers 5.24.0 was tried (docs/serving.md has the
table, `make test-serve` repeats it). The lines for SGLang were not run.
"""

from mtp_jax.config import Config
from mtp_jax.interop.layouts import DRAFTERS, NUMBERED
from mtp_jax.predictors import tapped_layers

ENGINES = ("transformers", "vllm")
# Layout -> `method` of vLLM's speculative config.
VLLM_METHODS = {
  **dict.fromkeys(("mimo", *NUMBERED), "mtp"), **{name: name for name in DRAFTERS}
}
# Drafters whose config.json names the trunk and the number of drafts.
SERVED_ALONE = ("eagle3", "peagle", "dflash")


def engine_obstacle(config: Config, layout: str, engine: str) -> str:
  """Returns the reason why an engine does not run a folder as we do, or "".

  `config`: of what is exported, that is, without predictors for the trunk alone.
  """
  if engine == "transformers" and layout in DRAFTERS:
    return f"transformers has no {layout} drafters: verify the trunk, or with vllm"
  if engine == "vllm" and layout == "eagle" and config.mtp.fc_bias:
    return "vLLM drops fc.bias of EAGLE in silence: train with mtp.fc_bias=False"
  taps = tapped_layers(config)
  if engine == "vllm" and len(set(taps)) < len(taps):
    name = config.mtp.kind
    return f"vLLM takes a layer once, and {name} reads the trunk after layers {taps}"
  return ""


def drafts_of(config: Config, layout: str, engine: str) -> int:
  """Returns how many tokens the engine drafts a round with a folder; 0: none."""
  depth = config.mtp.depth
  if engine == "vllm":
    return depth if layout in VLLM_METHODS else 0
  # transformers has MTP layers with experts alone, which glm4_moe writes for any trunk.
  has_experts = layout == "glm4_moe" or config.trunk.moe.num_experts
  return depth if layout in NUMBERED and has_experts else 0


def vllm_line(config: Config, layout: str, folder: str, base_model: str = "") -> str:
  """Returns the command that serves an exported folder with vLLM."""
  drafts = drafts_of(config, layout, "vllm")
  if not drafts or layout in SERVED_ALONE:
    return f"vllm serve {folder}"
  model = f'"model": "{folder}", ' if layout in DRAFTERS else ""
  how = (
    f'{{{model}"method": "{VLLM_METHODS[layout]}", "num_speculative_tokens": {drafts}}}'
  )
  return f"vllm serve {base_model or folder} \\\n  --speculative-config '{how}'"
