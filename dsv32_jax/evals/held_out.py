"""Loss and next-token accuracy on text that training never saw.

Rows are scored where they lie: spread over the local devices with `jax.pmap`
where the model fits one of them, or by `jax.jit` over a mesh where it does not.
Both give the same numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.model import attention

# B batch, T tokens, D model width, V vocabulary, R rows of the whole set,
# X devices

# Tokens whose float32 logits are held at once.
LOGIT_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """What a model gave on rows of text.

  Attributes:
    loss_RT: float32 cross-entropy in nats.
    correct_RT: bool, the most likely token was the right one.
    mask_RT: float32, 1 where there is a target.
  """

  loss_RT: np.ndarray
  correct_RT: np.ndarray
  mask_RT: np.ndarray

  @property
  def tokens(self) -> int:
    """Targets scored."""
    return int(self.mask_RT.sum())

  @property
  def loss(self) -> float:
    """Mean cross-entropy in nats a target."""
    return float((self.loss_RT * self.mask_RT).sum(dtype=np.float64)) / (
      self.tokens
    )

  @property
  def accuracy(self) -> float:
    """Share of targets that were the most likely token."""
    return float((self.correct_RT * self.mask_RT).sum()) / self.tokens

  def row_losses(self, first: int = 0) -> np.ndarray:
    """Mean loss of each row over its targets at position `first` and later."""
    mask_RT = self.mask_RT[:, first:]
    total_R = (self.loss_RT[:, first:] * mask_RT).sum(axis=1, dtype=np.float64)
    return total_R / np.maximum(mask_RT.sum(axis=1), 1)

  def summary(self) -> dict[str, float | int]:
    """Numbers for a report."""
    return {
      "loss": self.loss,
      "perplexity": math.exp(min(self.loss, 700.0)),
      "accuracy": self.accuracy,
      "tokens": self.tokens,
      "rows": len(self.loss_RT),
    }


def token_scores(hidden_BTD, kernel_DV, targets_BT):
  """Cross-entropy in nats and whether the arg max is right, per token.

  Logits are float32 and exist for LOGIT_TOKENS tokens at a time.

  Returns:
    loss_BT float32 and correct_BT bool.
  """
  batch, length, width = hidden_BTD.shape
  slices = 1
  while length % (2 * slices) == 0 and batch * length > LOGIT_TOKENS * slices:
    slices *= 2

  def one(piece):
    hidden_BTD, targets_BT = piece
    logits_BTV = jnp.einsum(
      "BTD,DV->BTV",
      hidden_BTD,
      kernel_DV.astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )
    target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT1[..., 0]
    return loss_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT

  if slices == 1:
    return one((hidden_BTD, targets_BT))
  piece = length // slices
  pieces = (
    jnp.moveaxis(hidden_BTD.reshape(batch, slices, piece, width), 1, 0),
    jnp.moveaxis(targets_BT.reshape(batch, slices, piece), 1, 0),
  )
  found = jax.lax.map(one, pieces)
  return jax.tree.map(
    lambda part: jnp.moveaxis(part, 0, 1).reshape(batch, length), found
  )


def make_scorer(
  graph, options: attention.AttentionOptions, *, separate_documents=True
) -> Callable:
  """Returns a function of (model state, Batch) to loss_BT and correct_BT.

  Args:
    graph: structure of the model, from nnx.split.
    options: which keys a query sees.
    separate_documents: keep packed documents from seeing each other.
  """

  def run(state, batch: batch_lib.Batch):
    model = nnx.merge(graph, state)
    segments_BT = batch.segments_BT
    if not separate_documents:
      segments_BT = (segments_BT > 0).astype(jnp.int32)
    output = model(
      batch.tokens_BT,
      positions_BT=batch.positions_BT if separate_documents else None,
      segments_BT=segments_BT,
      options=options,
      with_logits=False,
    )
    return token_scores(output.hidden, model.head.kernel[...], batch.targets_BT)

  return run


class PmapScorer:
  """Scores rows with a whole model on each local device."""

  def __init__(
    self,
    graph,
    options: attention.AttentionOptions,
    *,
    devices=None,
    separate_documents: bool = True,
  ):
    """Prepares the computation; it is compiled on first use.

    Args:
      graph: structure of the models to score, from nnx.split.
      options: which keys a query sees.
      devices: local devices to use; default: all.
      separate_documents: as for make_scorer.
    """
    self._devices = list(jax.local_devices() if devices is None else devices)
    run = make_scorer(graph, options, separate_documents=separate_documents)
    self._run = jax.pmap(run, in_axes=(None, 0), devices=self._devices)

  def __call__(self, model, batches, progress=lambda steps: steps) -> Scores:
    """Scores batches of any numbers of rows, in their order.

    Rows that fill up the last device's share are masked and dropped.

    Args:
      model: of the graph given.
      batches: iterable of Batch.
      progress: wraps the iterable.
    """
    devices = self._devices
    everywhere = jax.sharding.NamedSharding(
      jax.sharding.Mesh(np.asarray(devices), ("devices",)),
      jax.sharding.PartitionSpec(),
    )
    state = jax.device_put(nnx.state(model), everywhere)

    def score(batch):
      rows = len(batch.tokens_BT)
      share = -(-rows // len(devices))
      whole = _pad_rows(batch, share * len(devices))
      cut = jax.tree.map(
        lambda x: x.reshape(len(devices), share, *x.shape[1:]), whole
      )
      return jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:rows],
        self._run(state, cut),
      )

    return _collect(score, progress(batches))


class MeshScorer:
  """Scores rows with one model laid over a mesh; as PmapScorer."""

  def __init__(
    self,
    graph,
    options: attention.AttentionOptions,
    mesh: jax.sharding.Mesh,
    *,
    separate_documents: bool = True,
  ):
    """Prepares the computation on a mesh of sharding.make_mesh."""
    self._mesh = mesh
    self._run = jax.jit(
      make_scorer(graph, options, separate_documents=separate_documents),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(self, model, batches, progress=lambda steps: steps) -> Scores:
    """Scores batches with a model that lies on the mesh."""
    mesh, state = self._mesh, nnx.state(model)
    split = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])

    def score(batch):
      rows = len(batch.tokens_BT)
      whole = _pad_rows(batch, -(-rows // split) * split)
      layout = sharding.batch_sharding(mesh, whole.tokens_BT.shape)
      with jax.set_mesh(mesh):
        found = self._run(state, jax.device_put(whole, layout))
      return jax.tree.map(lambda x: np.asarray(x)[:rows], found)

    return _collect(score, progress(batches))


def document_rows(
  documents: Iterable[Sequence[int]], length: int, *, max_rows: int
) -> np.ndarray:
  """Takes the first `length` tokens of each document that has as many.

  One row a document: rows are independent, which an interval needs.

  Args:
    documents: token ids, the opening one included.
    length: tokens a row.
    max_rows: rows at most, the first that fit.

  Returns:
    int32 tokens_RT.

  Raises:
    ValueError: if no document is long enough.
  """
  rows = []
  for token_ids in documents:
    if len(rows) == max_rows:
      break
    if len(token_ids) >= length:
      rows.append(np.asarray(token_ids[:length], np.int32))
  if not rows:
    raise ValueError(f"no document has {length=} tokens")
  return np.stack(rows)


def batches_of_rows(
  tokens_RT: np.ndarray, batch_size: int
) -> Iterator[batch_lib.Batch]:
  """Cuts rows of one document each into batches; the last may be smaller."""
  for start in range(0, len(tokens_RT), batch_size):
    rows = tokens_RT[start : start + batch_size]
    yield batch_lib.from_documents(rows, tokens_RT.shape[1])


def mean_and_interval(values_R: np.ndarray) -> tuple[float, float]:
  """Mean over rows and half the width of its 95% interval.

  Normal approximation: 1.96 standard errors. One row has no interval: NaN.
  """
  values_R = np.asarray(values_R, np.float64)
  mean = float(values_R.mean())
  if len(values_R) < 2:
    return mean, math.nan
  return mean, float(1.96 * values_R.std(ddof=1) / math.sqrt(len(values_R)))


def _pad_rows(batch: batch_lib.Batch, rows: int) -> batch_lib.Batch:
  """Fills a batch up with rows that have no token."""
  missing = rows - len(batch.tokens_BT)
  return jax.tree.map(
    lambda x: np.pad(np.asarray(x), [(0, missing), (0, 0)]), batch
  )


def _collect(score, batches) -> Scores:
  losses, corrects, masks = [], [], []
  for batch in batches:
    loss_BT, correct_BT = score(batch)
    losses.append(loss_BT)
    corrects.append(correct_BT)
    masks.append(np.asarray(batch.loss_mask_BT))
  if not losses:
    raise ValueError("there is no row to score")
  scores = Scores(
    loss_RT=np.concatenate(losses),
    correct_RT=np.concatenate(corrects),
    mask_RT=np.concatenate(masks),
  )
  if scores.tokens == 0:
    raise ValueError("no row has a target to score")
  return scores
