"""The stages a model goes through: what trains, on which losses.

Paper section 2.1.1: a dense model, a dense warm-up in which the indexer alone
learns the attention of the frozen model, then sparse training of everything.
"""

import dataclasses
from typing import Literal

from flax import nnx

from dsv32_jax.model import attention
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import moe
from dsv32_jax.model import selection

TRAINED = ("model", "indexer", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One training stage.

  Attributes:
    select: keys the main attention sees: every one, the indexer's top k, or
      one of the controls `window` and `random` with as many keys.
    trains: `model` (all but the indexer), `indexer`, or `all`.
    lm_weight: weight of the next-token loss.
    mtp_weight: weight of the multi-token prediction loss (V3: 0.3, then 0.1).
    balance_weight: weight of the sequence-wise balance loss (V3: 1e-4).
    indexer_weight: weight of the indexer's KL; the paper names none, and it
      alone reaches the indexer, so 1.
    router_bias_speed: step of the router bias against the load (V3: 1e-3).
    top_k: keys a query sees; None takes the model's.
    attention_form: a name in forms.FORMS, None for the cost rule.
    kernels: a name in attention.KERNELS, None for what the device runs best.
    separate_documents: keep packed documents from seeing each other.
  """

  select: Literal["dense", "top_k", "window", "random"]
  trains: Literal["model", "indexer", "all"]
  lm_weight: float = 1.0
  mtp_weight: float = 0.0
  balance_weight: float = 0.0
  indexer_weight: float = 0.0
  router_bias_speed: float = 0.0
  top_k: int | None = None
  attention_form: str | None = None
  kernels: str | None = None
  separate_documents: bool = True

  def __post_init__(self):
    if self.trains == "indexer" and self.indexer_weight <= 0:
      raise ValueError(
        f"trains='indexer' needs indexer_weight={self.indexer_weight} > 0"
      )
    if self.trains == "indexer" and self.select != "dense":
      raise ValueError(
        f"trains='indexer' with select={self.select!r}: the warm-up is dense,"
        " its attention must not see the selection"
      )
    if self.indexer_weight and self.select not in ("dense", "top_k"):
      raise ValueError(
        f"indexer_weight={self.indexer_weight} with select={self.select!r}:"
        " the indexer has no part in it"
      )
    for name in ("lm_weight", "mtp_weight", "balance_weight"):
      if self.trains == "indexer" and getattr(self, name):
        raise ValueError(f"trains='indexer' with {name}={getattr(self, name)}")

  @property
  def uses_model_losses(self) -> bool:
    return self.trains != "indexer"

  def options(self, model: config_lib.ModelConfig):
    """The attention of this stage for a model."""
    k = self.top_k or model.index_top_k
    selectors = {
      "dense": selection.DENSE,
      "top_k": selection.TopK(k),
      "window": selection.Window(k),
      "random": selection.Random(k),
    }
    return attention.AttentionOptions(
      select=selectors[self.select],
      form=self.attention_form,
      kernels=self.kernels,
      indexer_loss=self.indexer_weight > 0,
    )


def in_indexer(path, value) -> bool:
  """Whether a variable belongs to an indexer; a filter for nnx.split."""
  del value
  return "indexer" in path


def trained_filter(trains: str):
  """Returns the nnx filter of the parameters that a stage trains."""
  filters = {
    "model": nnx.All(nnx.Param, nnx.Not(in_indexer)),
    "indexer": nnx.All(nnx.Param, in_indexer),
    "all": nnx.Param,
  }
  return filters[trains]


def partition(model, trains: str):
  """Splits a model into its structure and four states.

  Returns:
    graph, trained parameters, frozen parameters, router biases, the rest.
  """
  return nnx.split(
    model, trained_filter(trains), nnx.Param, moe.RouterBias, ...
  )


# The recipe. Where the paper is silent the number is named as ours.
PRETRAIN = StageConfig(
  select="dense",
  trains="model",
  mtp_weight=0.3,  # V3 report section 4.2, the first 10T tokens
  balance_weight=1e-4,
  router_bias_speed=1e-3,
)
DENSE_WARMUP = StageConfig(
  select="dense", trains="indexer", lm_weight=0.0, indexer_weight=1.0
)
SPARSE = StageConfig(
  select="top_k",
  trains="all",
  indexer_weight=1.0,  # ours; the paper prints the sum without a weight
  mtp_weight=0.1,  # ours: V3's value at the end of pretraining
  balance_weight=1e-4,  # ours: as in pretraining
  router_bias_speed=0.0,  # ours: V3 holds the bias at the end of pretraining
)
SFT = dataclasses.replace(SPARSE, mtp_weight=0.0)  # ours: MTP rests in SFT
