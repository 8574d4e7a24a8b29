"""Evaluation of a checkpoint on a data source, one selection after another."""

from collections.abc import Iterator
import dataclasses
import math
from typing import Literal

from flax import nnx
import jax
import tqdm

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.data import pipeline
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.evals import held_out
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.model import transformer

SELECTORS = {
  "dense": lambda top_k: selection.DENSE,
  "top_k": selection.TopK,
  "window": selection.Window,
  "random": selection.Random,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  """What to evaluate on, and how.

  Attributes:
    data: one pass over one source in a fixed order (num_epochs=1, seed=None).
    selections: names in SELECTORS: `top_k` is DeepSeek Sparse Attention.
    top_k: keys a query sees; None takes the model's.
    spread: `pmap` puts the model on every local device and deals the rows
      out; `mesh` lays one model over all devices.
    mesh: axes of the latter.
    max_batches: stop after so many; None: the whole source.
    separate_documents: keep packed documents from seeing each other.
    dtype: of weights and compute.
  """

  data: pipeline.DataConfig
  selections: tuple[str, ...] = ("dense", "top_k")
  top_k: int | None = None
  spread: Literal["pmap", "mesh"] = "pmap"
  mesh: sharding.MeshConfig = dataclasses.field(
    default_factory=lambda: sharding.MeshConfig(fsdp=-1)
  )
  max_batches: int | None = None
  separate_documents: bool = True
  dtype: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    if self.data.num_epochs is None and self.max_batches is None:
      raise ValueError("data.num_epochs=None needs max_batches")
    if not self.selections:
      raise ValueError("selections is empty")
    for name in self.selections:
      if name not in SELECTORS:
        raise ValueError(f"selections has {name!r}, none of {list(SELECTORS)}")
    for name in ("top_k", "max_batches"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be positive")

  def make_mesh(self) -> jax.sharding.Mesh | None:
    """The mesh to load the model on; None for a single device."""
    if self.spread == "pmap":
      return None
    return sharding.make_mesh(self.mesh)


def batches(
  config: EvaluateConfig, tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[batch_lib.Batch]:
  """Yields the batches in their fixed order."""
  with pipeline.make_batches(config.data, tokenizer) as source:
    for number, batch in enumerate(source):
      if number == config.max_batches:
        return
      yield batch


def evaluate(
  config: EvaluateConfig,
  model: transformer.Transformer,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh | None,
) -> dict[str, dict[str, float | int]]:
  """Scores every selection on the same rows.

  Args:
    config: what and how.
    model: on one device, or on the mesh.
    tokenizer: of the model.
    mesh: of config.make_mesh.

  Returns:
    By selection: loss (nats a token), perplexity, accuracy, tokens, rows, and
    from two rows up interval (half of the loss's 95% interval over rows).

  Raises:
    ValueError: if the tokenizer does not fit the model.
  """
  if tokenizer.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"tokenizer.vocab_size={tokenizer.vocab_size} exceeds the model's"
      f" vocab_size={model.config.vocab_size}"
    )
  graph = nnx.split(model)[0]
  found = {}
  for name in config.selections:
    top_k = config.top_k or model.config.index_top_k
    options = attention.AttentionOptions(select=SELECTORS[name](top_k))
    separate = dict(separate_documents=config.separate_documents)
    if mesh is None:
      scorer = held_out.PmapScorer(graph, options, **separate)
    else:
      scorer = held_out.MeshScorer(graph, options, mesh, **separate)
    scores = scorer(
      model,
      batches(config, tokenizer),
      lambda steps: tqdm.tqdm(steps, desc=name, unit="batch", ascii=True),
    )
    real_R = scores.mask_RT.any(axis=1)
    _, interval = held_out.mean_and_interval(scores.row_losses()[real_R])
    found[name] = scores.summary() | {"rows": int(real_R.sum())}
    if math.isfinite(interval):
      found[name]["interval"] = interval
  return found
