"""Layouts of Hugging Face folders, and the models that each of them can hold."""

from mtp_jax.config import (
  PUBLISHED_INPUTS,
  Config,
  MtpConfig,
  RopeScalingConfig,
  TrunkConfig,
)

# Layout -> (class name, model type) in its config.json. No engine has the model type
# of published MiMo folders, `mimo`: vLLM finds the class by its name, and transformers
# the trunk by the type of the family that it is of.
LAYOUTS = {
  "gpt2": ("GPT2LMHeadModel", "gpt2"),
  "llama": ("LlamaForCausalLM", "llama"),
  "qwen2": ("Qwen2ForCausalLM", "qwen2"),
  "qwen3": ("Qwen3ForCausalLM", "qwen3"),
  "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3"),
  "mimo": ("MiMoForCausalLM", "qwen2"),
  "glm4_moe": ("Glm4MoeForCausalLM", "glm4_moe"),
}
# The layouts with MTP layers numbered after the trunk's, any number of them.
NUMBERED = ("deepseek_v3", "glm4_moe")
# Layout of drafters alone (`drafter_config`) -> its file of tensors.
DRAFTERS = {
  "medusa": "medusa_lm_head.safetensors",
  "eagle": "model.safetensors",
  "eagle3": "model.safetensors",
  "peagle": "model.safetensors",
  "dflash": "model.safetensors",
}
# Layout of a drafter with masks -> path of the mask, and its entry there. The folder
# has the mask as the embedding of one token, `mask_token_id`.
MASKS = {"peagle": ("mtp/mask_embedding", ()), "dflash": ("mtp/masks", (0,))}

# Why no layout has a kind, where it is not that no engine has it.
_UNSERVED = {
  "top": "token-order prediction drafts nothing and is left out of what is deployed",
}


def model_layouts_for(config: Config, trunk_only: bool) -> dict[str, str]:
  """Returns, by layout of a trunk, the reason why it cannot hold `config`, or ""."""
  return {
    layout: _trunk_obstacle(config, layout)
    or _predictor_obstacle(config, layout, trunk_only)
    for layout in LAYOUTS
  }


def _trunk_obstacle(config: Config, layout: str) -> str:
  trunk = config.trunk
  if (trunk.kind == "gpt2") != (layout == "gpt2"):
    return f"the trunk is of kind {trunk.kind!r}"
  if trunk.kind == "gpt2":
    if trunk.num_heads * trunk.head_dim != trunk.embed_dim:
      return "trunk.attention_dim must be trunk.embed_dim in this layout"
    return ""
  if trunk.rope_fraction < 1 and layout != "glm4_moe":
    return "trunk.rope_fraction below 1 exists in the layout 'glm4_moe' only"
  if _differs_there(trunk.rope_scaling):
    return "in this layout YaRN with mscale_all_dim 0 means mscale 1"
  if trunk.attention_kind == "latent":
    if layout != "deepseek_v3":
      return "latent attention exists in the layout 'deepseek_v3' only"
    return _experts_obstacle(trunk)
  if layout == "glm4_moe":
    return _experts_obstacle(trunk)
  if trunk.moe.num_experts:
    return "experts exist in the layouts 'deepseek_v3' and 'glm4_moe' only"
  if layout == "deepseek_v3":
    return "this layout has latent attention (trunk.attention_kind)"
  # The families of grouped attention differ in biases and norms of the heads.
  has = trunk.qkv_bias, trunk.qk_norm
  wants = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
  if layout == "mimo" and trunk.qk_norm:
    return "trunk.qk_norm must be False in this layout"
  if layout in wants and has != wants[layout]:
    return (
      f"trunk.qkv_bias and trunk.qk_norm must be {wants[layout][0]} and "
      f"{wants[layout][1]} in this layout"
    )
  # These config files have no `head_dim`: readers derive it from the width.
  if layout in ("qwen2", "mimo"):
    if trunk.num_heads * trunk.head_dim != trunk.embed_dim:
      return "trunk.attention_dim must be trunk.embed_dim in this layout"
  if layout == "llama" and trunk.embed_dim % trunk.num_heads:
    return "trunk.embed_dim must be divisible by trunk.num_heads in this layout"
  return ""


def _experts_obstacle(trunk: TrunkConfig) -> str:
  if trunk.moe.num_experts and not trunk.moe.num_shared:
    return "in this layout every layer with experts has a shared expert"
  return ""


def _differs_there(scaling: RopeScalingConfig) -> bool:
  if scaling.kind != "yarn":
    return False
  both = scaling.mscale and scaling.mscale_all_dim
  return not both and (scaling.mscale, scaling.mscale_all_dim) != (1.0, 0.0)


def _predictor_obstacle(config: Config, layout: str, trunk_only: bool) -> str:
  mtp = config.mtp
  has_any = (mtp.depth > 0 or mtp.kind == "parallel") and not trunk_only
  if layout == "mimo":
    if not has_any or mtp.kind != "sequential" or mtp.depth != 1:
      return "the layout has exactly one sequential module (mtp.depth 1)"
    return unpublished_inputs(mtp)
  if not has_any:
    return ""
  if mtp.kind in DRAFTERS:
    return f"the layout {mtp.kind!r} has the extra predictors, this one the trunk alone"
  if mtp.kind != "sequential":
    why = _UNSERVED.get(mtp.kind, f"only mtp-jax generate runs {mtp.kind} heads")
    return (
      f"{why}. Engines run the trunk alone (--trunk_only), and "
      "medusa or eagle3 predictors trained on that trunk"
    )
  if layout not in NUMBERED:
    return "the layout has no place for MTP modules; the trunk alone can be exported"
  if mtp.dense_blocks:
    return "in this layout MTP layers have experts if the trunk's last layer has them"
  return unpublished_inputs(mtp)


def unpublished_inputs(mtp: MtpConfig) -> str:
  """Returns the first setting of sequential modules that no layout supports, or "".

  `mtp.norm` is not checked: layouts with modules have RMSNorm in the trunk, too.
  """
  more = {"out_norm": "own", "mlp_dim": 0}
  for key, published in (PUBLISHED_INPUTS | more).items():
    if getattr(mtp, key) != published:
      found = getattr(mtp, key)
      return f"mtp.{key} must be {published!r} in this layout, got {found!r}"
  return ""
