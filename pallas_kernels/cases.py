"""The shared table of problems that every implementation must solve.

`CHECKS` are small and odd: partial tiles, rows that see nothing, one key head,
a NaN. `BENCHMARKS` are what is timed and scheduled: "real" is one chip's share
of DeepSeek-V3.2, "long" that against its longest context of 131072 keys,
"small" what a CPU does in seconds. `TOLERANCES` is the only place that says how
far a result may be from "ref".
"""

import dataclasses
from typing import NamedTuple

OPERATIONS = (
  "index_select",
  "masked_attention",
  "sparse_mla",
  "indexer_kl",
  "indexer_kl_gathered",
  "expert_ffn",
  "decode_scores",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Sizes of one problem; an operation reads those that it has.

  Attributes:
    operation: one of `OPERATIONS`.
    name: of the case within its operation.
    batch: sequences.
    queries: queries of a sequence (tokens, for `expert_ffn`).
    keys: keys of a sequence.
    heads: attention heads.
    key_heads: 1 or `heads`.
    width: query and key width, or the model width of `expert_ffn`.
    value: value width, or the experts' width of `expert_ffn`.
    latent: latent width of the absorbed form.
    rope: rotary width of the absorbed form.
    index_heads: heads of the indexer.
    index_width: width of the indexer's queries and keys.
    top_k: keys a query selects, or experts a token has.
    experts: experts of the layer.
    page: keys of a page of the cache.
    sparsity: a mask of one key in 2**sparsity; 0 is no mask.
    segments: whether there are documents.
    ragged: queries at random slots and lists of random length, padding among
      them; otherwise the queries are the last ones of a causal sequence.
    key_scale: whether keys have a scale each, as quantised ones do.
    nan: whether one key is NaN.
    dtypes: input types that the case is run in.
  """

  operation: str
  name: str
  batch: int = 1
  queries: int
  keys: int = 0
  heads: int = 0
  key_heads: int = 0
  width: int = 0
  value: int = 0
  latent: int = 0
  rope: int = 0
  index_heads: int = 0
  index_width: int = 0
  top_k: int = 0
  experts: int = 0
  page: int = 0
  sparsity: int = 0
  segments: bool = False
  ragged: bool = False
  key_scale: bool = False
  nan: bool = False
  dtypes: tuple[str, ...] = ("float32", "bfloat16")

  def __post_init__(self):
    if self.operation not in OPERATIONS:
      raise ValueError(f"{self.operation=} is not one of {OPERATIONS}")

  @property
  def sizes(self) -> dict[str, int]:
    """The sizes that are not at zero, for a line of a report."""
    fields = dataclasses.asdict(self)
    return {k: v for k, v in fields.items() if type(v) is int and v}


INDEX_DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


def _index(name, batch, queries, keys, heads, width, top_k, **options):
  return Case(
    operation="index_select",
    name=name,
    batch=batch,
    queries=queries,
    keys=keys,
    index_heads=heads,
    index_width=width,
    top_k=top_k,
    **{"dtypes": INDEX_DTYPES} | options,
  )


def _attend(name, batch, queries, keys, heads, width, value, **options):
  return Case(
    operation="masked_attention",
    name=name,
    batch=batch,
    queries=queries,
    keys=keys,
    heads=heads,
    width=width,
    value=value,
    **{"key_heads": heads} | options,
  )


def _sparse(name, batch, queries, keys, heads, latent, rope, top_k, **options):
  return Case(
    operation="sparse_mla",
    name=name,
    batch=batch,
    queries=queries,
    keys=keys,
    heads=heads,
    latent=latent,
    rope=rope,
    top_k=top_k,
    **options,
  )


def _kl(name, queries, keys, heads, width, index, **options):
  return Case(
    operation="indexer_kl",
    name=name,
    queries=queries,
    keys=keys,
    heads=heads,
    width=width,
    index_heads=index[0],
    index_width=index[1],
    **{"key_heads": heads} | options,
  )


def _kl_gathered(name, queries, keys, heads, widths, index, top_k, **options):
  return Case(
    operation="indexer_kl_gathered",
    name=name,
    queries=queries,
    keys=keys,
    heads=heads,
    latent=widths[0],
    rope=widths[1],
    index_heads=index[0],
    index_width=index[1],
    top_k=top_k,
    **options,
  )


def _experts(name, tokens, experts, top_k, width, value, **options):
  return Case(
    operation="expert_ffn",
    name=name,
    queries=tokens,
    experts=experts,
    top_k=top_k,
    width=width,
    value=value,
    **options,
  )


def _decode(name, batch, keys, page, heads, width, **options):
  return Case(
    operation="decode_scores",
    name=name,
    batch=batch,
    queries=1,
    keys=keys,
    page=page,
    index_heads=heads,
    index_width=width,
    **{"dtypes": INDEX_DTYPES} | options,
  )


CHECKS = (
  _index("causal", 1, 37, 37, 4, 16, 8),
  _index("odd_tiles", 2, 19, 331, 8, 32, 40, ragged=True, segments=True),
  _index("decode", 3, 1, 300, 4, 16, 64, ragged=True, key_scale=True),
  _index("fewer_than_k", 1, 9, 20, 2, 8, 64, ragged=True),
  _index("nan", 1, 21, 45, 4, 8, 7, nan=True),
  _index("lanes", 1, 16, 256, 8, 128, 96),
  _attend("causal", 1, 37, 37, 2, 24, 16),
  _attend("odd_tiles", 2, 139, 301, 2, 24, 16, ragged=True, sparsity=2),
  _attend("mqa", 2, 9, 70, 4, 24, 16, key_heads=1, ragged=True, sparsity=1),
  _attend(
    "segments", 2, 20, 65, 3, 8, 8, ragged=True, sparsity=1, segments=True
  ),
  _attend("decode", 3, 1, 300, 4, 24, 16, ragged=True),
  _attend("lanes", 1, 128, 256, 2, 192, 128, sparsity=2),
  _sparse("causal", 1, 17, 17, 4, 32, 8, 6),
  _sparse("odd", 2, 9, 131, 4, 32, 8, 24, ragged=True),
  _sparse("decode", 3, 1, 200, 16, 32, 8, 64, ragged=True),
  _sparse("lanes", 1, 8, 256, 16, 128, 64, 128, ragged=True),
  _kl("causal", 33, 33, 2, 16, (4, 8)),
  _kl("masked", 21, 150, 3, 16, (4, 8), ragged=True, sparsity=2),
  _kl("mqa", 9, 70, 4, 24, (4, 8), key_heads=1, ragged=True, segments=True),
  _kl("lanes", 32, 256, 2, 128, (8, 128), sparsity=2),
  _kl_gathered("odd", 9, 131, 4, (32, 8), (4, 8), 24, ragged=True),
  _kl_gathered("lanes", 8, 256, 8, (128, 64), (8, 128), 128),
  _experts("uneven", 53, 7, 3, 24, 40, ragged=True),
  _experts("one_token", 1, 4, 2, 16, 8),
  _experts("lanes", 64, 4, 2, 128, 256),
  _decode("odd", 3, 300, 32, 5, 24, ragged=True),
  _decode("lanes", 3, 1000, 64, 8, 128, ragged=True),
)

_BF16 = {"dtypes": ("bfloat16",)}
_FP8 = {"dtypes": ("float8_e4m3fn",)}
_F32 = {"dtypes": ("float32",)}

BENCHMARKS = {
  "small": (
    _index("prefill", 1, 128, 2048, 8, 32, 256, **_F32),
    _attend("prefill", 1, 256, 1024, 4, 48, 32, sparsity=2, **_F32),
    _sparse("prefill", 1, 128, 1024, 8, 128, 32, 256, **_F32),
    _kl("prefill", 128, 1024, 4, 48, (8, 32), sparsity=2, **_F32),
    _kl_gathered("prefill", 64, 1024, 8, (128, 32), (8, 32), 256, **_F32),
    _experts("tokens", 512, 8, 2, 256, 128, **_F32),
    _decode("decode", 4, 2048, 64, 8, 32, **_F32),
  ),
  "real": (
    _index(
      "prefill_32k",
      1,
      2048,
      32768,
      64,
      128,
      2048,
      dtypes=("bfloat16", "float8_e4m3fn"),
    ),
    _index("decode_32k", 16, 1, 32768, 64, 128, 2048, **_BF16),
    _attend("train_4k", 1, 4096, 4096, 16, 192, 128, sparsity=1),
    _attend("prefill_32k", 1, 2048, 32768, 16, 192, 128, sparsity=4, **_BF16),
    _sparse("prefill_32k", 1, 512, 32768, 128, 512, 64, 2048, **_BF16),
    _sparse("heads_16", 1, 512, 32768, 16, 512, 64, 2048, **_BF16),
    _sparse("decode_32k", 16, 1, 32768, 128, 512, 64, 2048, **_BF16),
    _kl("dense_4k", 2048, 4096, 16, 192, (64, 128), **_BF16),
    _kl("sparse_32k", 512, 32768, 16, 192, (64, 128), sparsity=4, **_BF16),
    _kl_gathered(
      "sparse_32k", 256, 32768, 128, (512, 64), (64, 128), 2048, **_BF16
    ),
    _experts("share", 4096, 16, 8, 7168, 2048, **_BF16),
    _decode("decode_32k", 16, 32768, 64, 64, 128, **_FP8),
  ),
  "long": (
    _index("prefill_128k", 1, 2048, 131072, 64, 128, 2048, **_BF16),
    _attend("prefill_128k", 1, 8192, 131072, 16, 192, 128, sparsity=6, **_BF16),
    _sparse("prefill_128k", 1, 512, 131072, 128, 512, 64, 2048, **_BF16),
    _kl("sparse_128k", 512, 131072, 16, 192, (64, 128), sparsity=6, **_BF16),
    _kl_gathered(
      "sparse_128k", 256, 131072, 128, (512, 64), (64, 128), 2048, **_BF16
    ),
    _decode("decode_128k", 16, 131072, 64, 64, 128, **_FP8),
  ),
}


class Tolerance(NamedTuple):
  """How far a result may be from "ref", relative to the largest value of it.

  Attributes:
    measured: the worst error of "xla" on CPU over `CHECKS`, seed 0; that of
      masked_attention is without the cases "decode" and "lanes".
    bound: what fails.
  """

  measured: float
  bound: float


# Both directions, by operation and input type. "ref" runs in float32 on the
# same rounded inputs, so a bfloat16 entry is the rounding of the outputs.
TOLERANCES = {
  ("index_select", "float32"): Tolerance(1.6e-07, 1e-5),
  ("index_select", "bfloat16"): Tolerance(1.2e-07, 1e-5),
  ("index_select", "float8_e4m3fn"): Tolerance(1.2e-07, 1e-5),
  ("masked_attention", "float32"): Tolerance(4.8e-07, 1e-5),
  ("masked_attention", "bfloat16"): Tolerance(4.3e-03, 2e-2),
  ("sparse_mla", "float32"): Tolerance(9.0e-07, 1e-5),
  ("sparse_mla", "bfloat16"): Tolerance(3.7e-03, 2e-2),
  ("indexer_kl", "float32"): Tolerance(1.7e-06, 1e-5),
  ("indexer_kl", "bfloat16"): Tolerance(2.6e-03, 2e-2),
  ("indexer_kl_gathered", "float32"): Tolerance(3.3e-07, 1e-5),
  ("indexer_kl_gathered", "bfloat16"): Tolerance(3.1e-03, 2e-2),
  ("expert_ffn", "float32"): Tolerance(8.1e-07, 1e-5),
  ("expert_ffn", "bfloat16"): Tolerance(3.4e-03, 2e-2),
  ("decode_scores", "float32"): Tolerance(3.0e-07, 1e-5),
  ("decode_scores", "bfloat16"): Tolerance(1.2e-07, 1e-5),
  ("decode_scores", "float8_e4m3fn"): Tolerance(1.4e-07, 1e-5),
}
