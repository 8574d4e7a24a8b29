"""What a TPU kernel's static schedule takes, over what its work needs.

A row of `pallas_kernels.budget.rows` becomes a `Measure`: the bundles of a unit
of work and the fewest that its products take, on matrix units of 128 or 256
rows (`roofline.MXU`). What runs once a table of keys is left out, and what a
tile does in two forms (all keys seen, or some) counts as the mean of both.

A kernel over segments of keys fills its lists in part: its bundles are then
multiplied by the slots a listed key costs, on average over the queries of a
causal sequence that select at random, as many draws from a fixed seed say.
"""
# G segments of keys

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels import cases
from pallas_kernels import roofline
from pallas_kernels.index_select import tpu as index_select
from pallas_kernels.index_select import tpu_search
from pallas_kernels.indexer_kl import gathered_tpu as kl_gathered
from pallas_kernels.masked_attention import tpu as masked_forward
from pallas_kernels.masked_attention import tpu_backward as masked_backward
from pallas_kernels.sparse_mla import tpu as sparse_forward
from pallas_kernels.sparse_mla import tpu_backward as sparse_backward
from pallas_kernels.sparse_mla import tpu_rows
from pallas_kernels.sparse_mla import tpu_segments

# Columns of a loop in a row, see `budget.LOOP`.
_DEPTH, _BUNDLES, _, _LEAST, _ = range(5)
_SAMPLES = 4096
# Registers that a bundle stores, and queries of a call of masked attention.
_STORES = {"v5e": 1, "v5p": 1, "v6e": 2, "7x": 2}
_CLEARED_QUERIES = 8192
_BOTH = {"v5e": 1.3, "v5p": 1.3, "v6e": 3.0, "7x": 3.0}
_BOTH_LONG = {"v5e": 1.6, "v5p": 1.6, "v6e": 4.0, "7x": 4.0}
# By kernel and keys of a case: the most that its ratio should be.
TARGETS = {
  ("index_select", 32768): {"v5p": 1.6},
  ("index_select", 131072): {"v5p": 1.6},
  ("masked_attention_forward", 131072): {"v5p": 1.8, "v6e": 1.8},
  ("masked_attention_backward", 131072): {"v5p": 2.0, "v6e": 2.0},
  ("sparse_mla", 32768): _BOTH,
  ("sparse_mla_backward", 32768): _BOTH,
  ("sparse_mla", 131072): _BOTH_LONG,
  ("sparse_mla_backward", 131072): _BOTH_LONG,
}


class Measure(NamedTuple):
  """A unit of a kernel's work.

  Attributes:
    unit: what it is, in words.
    bundles: that it executes.
    minimum: the fewest its products take, widths padded to the matrix unit; of
      selection, the bundles of the scores alone.
    plain: the fewest its products take without padding; None if unknown.
    waste: what the bundles are to be multiplied by; see the top.
  """

  unit: str
  bundles: float
  minimum: float
  plain: float | None
  waste: float = 1.0

  @property
  def ratio(self) -> float:
    """What the kernel takes over the minimum."""
    return self.waste * self.bundles / self.minimum


def kernel_name(row: dict) -> str:
  """Returns a row's kernel without the number that the compiler adds."""
  return row["kernel"].rsplit(".", 1)[0]


def generation(row: dict) -> str:
  """Returns the short name of a row's TPU, as in `roofline.MXU`."""
  return row["topology"].split(":")[0].removeprefix("tpu")


def case_of(row: dict) -> cases.Case:
  """Finds the case of a row among `cases.BENCHMARKS`."""
  wanted = (row["op"], row["case"])
  return next(
    case
    for table in cases.BENCHMARKS.values()
    for case in table
    if (case.operation, case.name) == wanted
  )


def target(row: dict) -> float | None:
  """Returns the most that a row's ratio should be; None if nothing is said.

  The targets are for bfloat16 and all 128 heads, or a chip's share of 16 where
  attention is masked; those of masked attention for the longest context.
  """
  case = case_of(row)
  if case.queries == 1 or row["dtype"] != "bfloat16":
    return None
  if case.operation == "sparse_mla" and case.heads < 128:
    return None
  targets = TARGETS.get((kernel_name(row), case.keys), {})
  return targets.get(generation(row))


def measure(row: dict) -> Measure | None:
  """Returns what a row says; None for a kernel that has no measure.

  Where a type is multiplied in several passes the minimum is unknown.
  """
  makers = {
    "index_select": _selection,
    "masked_attention_forward": _masked,
    "masked_attention_backward": _masked,
    "sparse_mla": _gathered,
    "sparse_mla_backward": _gathered,
    "sparse_mla_backward_serial": _gathered,
    "indexer_kl_gathered": _gathered,
    "indexer_kl_gathered_gradients": _gathered,
  }
  maker = makers.get(kernel_name(row))
  if maker is None or row["dtype"] == "float32":
    return None
  return maker(row, case_of(row))


def _own(row) -> int:
  """Returns the bundles of the outermost loop without those inside it."""
  inner = sum(x[_BUNDLES] for x in row["loops"] if x[_DEPTH] == 1)
  return row["loops"][0][_BUNDLES] - inner


def _selection(row, case):
  """A block of 256 rows of scores: they, the longest search, ties packed."""
  loops = row["loops"]
  scores = next(x for x in loops if x[_DEPTH] == 1 and x[_LEAST])
  count = next(n for n, x in enumerate(loops) if x[_DEPTH] == 2)
  counting = loops[count][_BUNDLES]
  around = loops[count - 1][_BUNDLES] - counting
  packing = max(x[_BUNDLES] for x in loops[count + 1 :])
  queries = tpu_search.LANES
  while 4 * queries * case.keys > index_select.SCRATCH_BYTES:
    queries //= 2
  blocks = case.keys * queries // tpu_search.LANES / tpu_search.BLOCK
  a_step = counting * tpu_search.BLOCK / index_select.TILE + around / blocks
  total = scores[_BUNDLES] + tpu_search.MOST_STEPS * a_step + packing
  return Measure(
    "256 keys by 128 queries or their share, of the scores alone",
    total,
    scores[_BUNDLES],
    scores[_LEAST],
  )


def _masked(row, case):
  """A tile of queries and keys, of the heads of a step."""
  is_forward = kernel_name(row) == "masked_attention_forward"
  module = masked_forward if is_forward else masked_backward
  tile = module.HEADS * module.QUERIES * module.KEYS
  share = tile / (case.batch * case.queries * case.heads * case.keys)
  padded, plain = _minimum(row, case, is_forward)
  # The gradients of a batch element's queries are cleared once a head.
  clearing = 0
  if not is_forward:
    queries = min(case.queries, _CLEARED_QUERIES)
    registers = queries * -(-case.width // tpu_rows.LANES) / 8
    clearing = registers / _STORES[generation(row)]
  return Measure(
    f"{module.HEADS} x {module.QUERIES} x {module.KEYS} scores",
    (_own(row) - clearing) / 2,
    share * padded,
    share * plain,
  )


def _gathered(row, case):
  """A query's keys: a grid step has two lists, of some of them or all."""
  is_forward = kernel_name(row) in ("sparse_mla", "indexer_kl_gathered")
  padded, plain = _minimum(row, case, is_forward)
  queries = case.batch * case.queries
  slots, waste = _slots(row, case, is_forward)
  # Row after row is a loop of each query; that of a table's first list counts.
  is_serial = kernel_name(row) == "sparse_mla_backward_serial"
  bundles = row["bundles"] if is_serial else _own(row)
  return Measure(
    f"{case.top_k} keys of a query",
    bundles * case.top_k / slots,
    padded / queries,
    plain / queries,
    waste,
  )


def _minimum(row, case, is_forward):
  """Returns the fewest bundles of one pass over all pairs, padded and plain."""
  found = []
  for padded in (True, False):
    of_pass = functools.partial(
      roofline.mxu_bundles, case, generation=generation(row), padded=padded
    )
    forward = of_pass("forward")
    found.append(
      forward if is_forward else of_pass("forward_backward") - forward
    )
  return found


def _slots(row, case, is_forward):
  """Returns (key slots of a grid step, slots that a listed key costs)."""
  chip = tpu_rows.chip_of(roofline.device(generation(row)).kinds[0])
  module = sparse_forward if is_forward else sparse_backward
  limit = chip.forward_keys if is_forward else chip.backward_keys
  if case.operation == "indexer_kl_gathered":
    module, limit = kl_gathered, chip.forward_keys
  if case.keys <= limit:
    return 2 * tpu_rows.round_up(case.top_k, tpu_rows.LANES), 1.0
  count, size = tpu_segments.split(case.keys, limit)
  item, items = tpu_segments.list_shape(case.top_k, count, module.LIST_KEYS)
  return 2 * items * item, _waste(case.keys, size, item, case.top_k)


@functools.cache
def _waste(keys, size, item, top_k):
  """Returns slots a listed key, where a segment's keys fill whole items."""
  rng = np.random.default_rng(0)
  starts_G = np.arange(0, keys, size)
  slots = listed = 0
  for query in (np.arange(_SAMPLES) + 0.5) * keys / _SAMPLES:
    visible_G = np.clip(int(query) + 1 - starts_G, 0, size)
    selected = min(top_k, int(query) + 1)
    found_G = rng.multivariate_hypergeometric(visible_G, selected)
    slots += item * int(np.sum(-(-found_G // item)))
    listed += selected
  return slots / listed
