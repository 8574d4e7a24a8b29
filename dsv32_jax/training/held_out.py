"""A stage's losses on text it does not train on, taken at each checkpoint."""

import dataclasses
import itertools

import jax
import numpy as np

from dsv32_jax.data import batch as batch_lib
from dsv32_jax.data import pipeline
from dsv32_jax.data import sources as sources_lib
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.training import placement
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
  """What a stage is measured on.

  Attributes:
    sources: text that the stage does not train on.
    batches: how many, of the training's size, the same every time; 0: none.
  """

  sources: tuple[sources_lib.SourceConfig, ...] = ()
  batches: int = 0

  def __post_init__(self):
    if self.batches < 0:
      raise ValueError(f"held_out.batches={self.batches} must not be negative")
    if self.batches and not self.sources:
      raise ValueError(f"held_out.batches={self.batches} without sources")


def read_batches(
  config: HeldOutConfig,
  data: pipeline.DataConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  share: placement.RowShare = placement.RowShare(0, 1),
) -> list[batch_lib.Batch]:
  """Returns this process's rows of the held-out batches.

  Args:
    config: what to read.
    data: the training's packing and size.
    tokenizer: of the training.
    share: of the rows that this process reads.

  Raises:
    ValueError: if a source is unusable.
  """
  if not config.batches:
    return []
  data = dataclasses.replace(data, sources=config.sources, num_epochs=None)
  with pipeline.make_batches(
    data, tokenizer, process_index=share.index, process_count=share.count
  ) as iterator:
    return list(itertools.islice(iterator, config.batches))


def make_measure(graph, stage: stages.StageConfig, microbatches: int = 1):
  """Builds the jitted losses of a batch, with no gradient.

  Args:
    graph: structure of the model, from step.init_state.
    stage: whose losses.
    microbatches: pieces the batch is cut into.

  Returns:
    A function from (TrainState, Batch) to the metrics of step.stage_loss.
  """

  @jax.jit
  def measure(state: step_lib.TrainState, batch: batch_lib.Batch):
    per = step_lib.denominators(batch, microbatches)

    def piece_metrics(trained, piece):
      del trained
      model = step_lib.merge_model(graph, state)
      _, (metrics, _) = step_lib.stage_loss(model, piece, stage, per)
      return {}, metrics

    _, metrics = step_lib.accumulate(
      piece_metrics, {}, batch, step_lib.cut_batch, microbatches
    )
    return metrics

  return measure


def mean(rows: list[dict]) -> dict[str, float]:
  """Averages the metrics of batches of the same size."""
  return {
    name: np.mean([row[name] for row in rows], dtype=np.float32)
    for name in rows[0]
  }
