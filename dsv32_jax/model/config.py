"""The shape of a DeepSeek-V3.2 model: every number its architecture needs."""

import dataclasses
import math


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary embedding with YaRN scaling; factor 1.0 is plain rotary.

  Attributes:
    theta: base of the frequencies.
    factor: context extension; frequencies below the ramp are divided by it.
    original_length: tokens of context before the extension.
    beta_fast: turns within original_length above which nothing is scaled.
    beta_slow: turns below which a frequency is fully scaled.
    mscale: magnitude of the cos and sin correction, over mscale_all_dim.
    mscale_all_dim: magnitude of the softmax scale correction.
  """

  theta: float = 10000.0
  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  def __post_init__(self):
    _require(self.theta > 1, f"rope.theta={self.theta} must exceed 1")
    _require(self.factor >= 1, f"rope.factor={self.factor} must be >= 1")
    _require(
      self.original_length > 0,
      f"rope.original_length={self.original_length} must be positive",
    )
    _require(
      self.mscale == self.mscale_all_dim,
      f"rope.mscale={self.mscale} must equal rope.mscale_all_dim="
      f"{self.mscale_all_dim}: other ratios scale cos and sin and no released"
      " checkpoint has them",
    )

  @property
  def softmax_correction(self) -> float:
    """Factor on the attention scale, (0.1 mscale ln(factor) + 1) squared."""
    if self.factor <= 1:
      return 1.0
    return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Architecture of DeepSeek-V3.2 (paper section 2.1, V3 report section 4.2).

  Attributes:
    vocab_size: rows of the embedding and of the untied output head.
    width: residual stream D.
    num_layers: transformer blocks, the dense ones first.
    num_dense_layers: leading blocks whose FFN is not a mixture.
    ffn_width: hidden width of the dense FFN.
    expert_width: hidden width of one expert.
    num_heads: attention heads H.
    query_latent_width: rank of the query compression (1536).
    latent_width: rank of the key-value compression C (512).
    nope_width: per-head query and key width without rotary.
    rope_width: rotary width R, shared by all heads on the key side.
    value_width: per-head value width.
    num_experts: routed experts E.
    num_shared_experts: experts that every token uses.
    experts_per_token: routed experts A that a token uses.
    num_expert_groups: groups of the device-limited routing.
    expert_groups_kept: groups a token may choose from.
    normalize_expert_weights: divide chosen affinities by their sum.
    routed_scale: factor on the routed experts' output.
    index_heads: indexer query heads I.
    index_width: indexer key width K, the first rope_width of it rotary.
    index_top_k: keys a query attends to.
    norm_epsilon: of every RMSNorm and of the indexer's LayerNorm.
    rope: rotary embedding.
    max_length: longest context the model claims.
    num_mtp_layers: multi-token prediction modules, 0 or 1.
    initializer_scale: standard deviation of fresh weights.
    bos_id: token that begins a document.
    eos_id: token that ends one.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_dense_layers: int
  ffn_width: int
  expert_width: int
  num_heads: int
  query_latent_width: int
  latent_width: int
  nope_width: int
  rope_width: int
  value_width: int
  num_experts: int
  num_shared_experts: int = 1
  experts_per_token: int
  num_expert_groups: int
  expert_groups_kept: int
  normalize_expert_weights: bool = True
  routed_scale: float = 2.5
  index_heads: int
  index_width: int
  index_top_k: int
  norm_epsilon: float = 1e-6
  rope: RopeConfig = RopeConfig()
  max_length: int = 163840
  num_mtp_layers: int = 0
  initializer_scale: float = 0.006
  bos_id: int = 0
  eos_id: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and field.name not in _MAY_BE_ZERO:
        _require(value > 0, f"{field.name}={value} must be positive")
      elif field.type is int:
        _require(value >= 0, f"{field.name}={value} must not be negative")
    _require(
      self.num_dense_layers <= self.num_layers,
      f"num_dense_layers={self.num_dense_layers} exceeds"
      f" num_layers={self.num_layers}",
    )
    _require(
      self.rope_width % 2 == 0 and self.rope_width <= self.index_width,
      f"rope_width={self.rope_width} must be even and at most"
      f" index_width={self.index_width}",
    )
    _require(
      self.num_mtp_layers in (0, 1),
      f"num_mtp_layers={self.num_mtp_layers} must be 0 or 1",
    )
    self._check_experts()

  def _check_experts(self):
    _require(
      self.num_experts % self.num_expert_groups == 0,
      f"num_experts={self.num_experts} is not a multiple of"
      f" num_expert_groups={self.num_expert_groups}",
    )
    _require(
      self.experts_per_group >= 2 or self.num_expert_groups == 1,
      f"num_expert_groups={self.num_expert_groups} leaves fewer than 2 of"
      f" num_experts={self.num_experts} in a group, whose score is a sum of 2",
    )
    _require(
      self.expert_groups_kept <= self.num_expert_groups,
      f"expert_groups_kept={self.expert_groups_kept} exceeds"
      f" num_expert_groups={self.num_expert_groups}",
    )
    reachable = self.expert_groups_kept * self.experts_per_group
    _require(
      self.experts_per_token <= reachable,
      f"experts_per_token={self.experts_per_token} exceeds the {reachable}"
      f" experts in expert_groups_kept={self.expert_groups_kept} groups",
    )

  @property
  def experts_per_group(self) -> int:
    return self.num_experts // self.num_expert_groups

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers

  @property
  def query_width(self) -> int:
    """Per-head query and key width of the expanded form."""
    return self.nope_width + self.rope_width

  @property
  def softmax_scale(self) -> float:
    """Scale on query-key products, YaRN's correction included."""
    return self.query_width**-0.5 * self.rope.softmax_correction

  @property
  def index_scale(self) -> float:
    """Scale on index scores, folded into the head weights."""
    return self.index_heads**-0.5 * self.index_width**-0.5


_MAY_BE_ZERO = frozenset(
  {
    "num_dense_layers",
    "num_shared_experts",
    "num_mtp_layers",
    "bos_id",
    "eos_id",
  }
)
