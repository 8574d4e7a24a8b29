"""Which Hugging Face tensor holds which parameter: one table, both ways.

A Hugging Face matrix is [out, in] and lies in one file entry; a parameter of
ours has its contracted axes first, its heads apart, and its layers and experts
stacked. Each tensor is looked at as `view` (a reshape), and each of its parts
(a window on the view's rows of a head) is transposed by `order` into one slot
of a stacked parameter.

Row layouts: q_b rows of a head are [nope | rope], kv_b rows of a head are
[key | value], kv_a rows are [latent | rope], and the indexer's rows are
[rope | nope]; ours keep each of these orders.
"""

from collections.abc import Iterator
import dataclasses
import math

from dsv32_jax.model import config as config_lib

# D width, U query latent, C latent, H heads, N nope, R rope, V value,
# I index heads, K index width, E experts, F width of an expert or mlp

IGNORED_SUFFIX = ".self_attn.rotary_emb.inv_freq"
SCALE_SUFFIX = "_scale_inv"
INDEXER = ".self_attn.indexer."
LAYER_PREFIX = "model.layers."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Where a piece of a tensor goes.

  Attributes:
    path: of the parameter in the nnx state.
    index: place in the parameter's leading stack axes.
    window: rows of a head, first and last + 1, on axis 1 of the view; None
      for the whole tensor.
  """

  path: tuple[str, ...]
  index: tuple[int, ...] = ()
  window: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One tensor of a Hugging Face checkpoint.

  Attributes:
    name: its name there.
    shape: its shape there, [out, in] or [width].
    view: the reshape of it that `order` and the windows refer to. Its first
      axis is the first, or the major part of the first, of `shape`.
    order: transpose from the view's axes to the parameter's.
    parts: the slots it fills; none for a copy.
    is_fp8: block-scaled float8 in the official fp8 checkpoint.
    may_be_fp8: accepted as such when read.
    is_float32: float32 whatever the type of the other weights.
    copy_of: name of the tensor this one repeats bit for bit, or None.
  """

  name: str
  shape: tuple[int, ...]
  view: tuple[int, ...]
  order: tuple[int, ...]
  parts: tuple[Part, ...]
  is_fp8: bool = False
  may_be_fp8: bool = False
  is_float32: bool = False
  copy_of: str | None = None

  @property
  def scale_name(self) -> str:
    """Name of the tensor's block scales."""
    return self.name + SCALE_SUFFIX

  @property
  def scale_shape(self) -> tuple[int, ...]:
    """Shape of its block scales, one for each 128 x 128 weights."""
    return tuple(-(-size // 128) for size in self.shape)

  @property
  def rows_per_step(self) -> int:
    """Rows of the tensor in one step along the view's first axis."""
    return self.shape[0] // self.view[0]

  def slot_shape(self, part: Part) -> tuple[int, ...]:
    """Shape of the parameter slot that a part fills."""
    sizes = list(self.view)
    if part.window is not None:
      sizes[1] = part.window[1] - part.window[0]
    return tuple(sizes[axis] for axis in self.order)


def _parts(paths: str | dict[str, tuple[int, int]]) -> tuple[Part, ...]:
  if isinstance(paths, str):
    return (Part(path=tuple(paths.split("."))),)
  return tuple(
    Part(path=tuple(path.split(".")), window=window)
    for path, window in paths.items()
  )


def _vector(name: str, path: str, width: int, **flags) -> Tensor:
  return Tensor(
    name=name,
    shape=(width,),
    view=(width,),
    order=(0,),
    parts=_parts(path),
    **flags,
  )


def _matrix(name: str, path: str, out_in: tuple[int, int], **flags) -> Tensor:
  """[out, in] there, [in, out] here."""
  return Tensor(
    name=name,
    shape=out_in,
    view=out_in,
    order=(1, 0),
    parts=_parts(path),
    **flags,
  )


def _heads(name: str, paths, view: tuple[int, int, int]) -> Tensor:
  """[heads * rows, in] there, [in, heads, rows] here; always quantised."""
  return Tensor(
    name=name,
    shape=(view[0] * view[1], view[2]),
    view=view,
    order=(2, 0, 1),
    parts=_parts(paths),
    is_fp8=True,
    may_be_fp8=True,
  )


_FP8 = {"is_fp8": True, "may_be_fp8": True}


def _attention(config: config_lib.ModelConfig) -> Iterator[Tensor]:
  D, H = config.width, config.num_heads
  U, C = config.query_latent_width, config.latent_width
  N, R, V = config.nope_width, config.rope_width, config.value_width
  yield _vector("input_layernorm.weight", "attention_norm.scale", D)
  yield _vector("post_attention_layernorm.weight", "ffn_norm.scale", D)
  here, ours = "self_attn.", "attention."
  yield _matrix(here + "q_a_proj.weight", ours + "query_down", (U, D), **_FP8)
  yield _vector(here + "q_a_layernorm.weight", ours + "query_norm.scale", U)
  yield _heads(here + "q_b_proj.weight", ours + "query_up", (H, N + R, U))
  yield _matrix(
    here + "kv_a_proj_with_mqa.weight",
    ours + "latent_down",
    (C + R, D),
    **_FP8,
  )
  yield _vector(here + "kv_a_layernorm.weight", ours + "latent_norm.scale", C)
  yield _heads(
    here + "kv_b_proj.weight",
    {ours + "key_up": (0, N), ours + "value_up": (N, N + V)},
    (H, N + V, C),
  )
  yield Tensor(
    name=here + "o_proj.weight",
    shape=(D, H * V),
    view=(D, H, V),
    order=(1, 2, 0),
    parts=_parts(ours + "output"),
    **_FP8,
  )


def _indexer(config: config_lib.ModelConfig) -> Iterator[Tensor]:
  D, U = config.width, config.query_latent_width
  heads, width = config.index_heads, config.index_width
  here, ours = "self_attn.indexer.", "attention.indexer."
  yield _heads(here + "wq_b.weight", ours + "query", (heads, width, U))
  yield _matrix(here + "wk.weight", ours + "key", (width, D), **_FP8)
  norm = {"width": width, "is_float32": True}
  yield _vector(here + "k_norm.weight", ours + "key_norm.scale", **norm)
  yield _vector(here + "k_norm.bias", ours + "key_norm.bias", **norm)
  yield _matrix(here + "weights_proj.weight", ours + "weight", (heads, D))


def _mlp(here: str, ours: str, width: int, hidden: int) -> Iterator[Tensor]:
  wide, narrow = (hidden, width), (width, hidden)
  yield _matrix(here + "gate_proj.weight", ours + "gate", wide, **_FP8)
  yield _matrix(here + "up_proj.weight", ours + "up", wide, **_FP8)
  yield _matrix(here + "down_proj.weight", ours + "down", narrow, **_FP8)


def _place(
  tensor: Tensor, prefix: str, base: tuple[str, ...], index: tuple[int, ...]
) -> Tensor:
  parts = tuple(
    dataclasses.replace(part, path=base + part.path, index=index)
    for part in tensor.parts
  )
  return dataclasses.replace(tensor, name=prefix + tensor.name, parts=parts)


def _layer(
  config: config_lib.ModelConfig,
  number: int,
  base: tuple[str, ...],
  index: tuple[int, ...],
  *,
  is_moe: bool,
) -> Iterator[Tensor]:
  """Yields a layer's tensors; expert tensors have one more stack index."""
  prefix = f"{LAYER_PREFIX}{number}."
  rows = [*_attention(config), *_indexer(config)]
  width, hidden = config.width, config.expert_width
  if is_moe:
    bias = {"width": config.num_experts, "is_float32": True}
    router = (config.num_experts, width)
    rows.append(_matrix("mlp.gate.weight", "ffn.router", router))
    rows.append(
      _vector("mlp.gate.e_score_correction_bias", "ffn.expert_bias", **bias)
    )
    if config.num_shared_experts:
      shared = hidden * config.num_shared_experts
      rows.extend(_mlp("mlp.shared_experts.", "ffn.shared.", width, shared))
  else:
    rows.extend(_mlp("mlp.", "ffn.", width, config.ffn_width))
  for row in rows:
    yield _place(row, prefix, base, index)
  if is_moe:
    for expert in range(config.num_experts):
      for row in _mlp(f"mlp.experts.{expert}.", "ffn.", width, hidden):
        yield _place(row, prefix, base, (*index, expert))


def _mtp(config: config_lib.ModelConfig) -> Iterator[Tensor]:
  number, width = config.num_layers, config.width
  prefix = f"{LAYER_PREFIX}{number}."
  yield _vector(prefix + "enorm.weight", "mtp.embedding_norm.scale", width)
  yield _vector(prefix + "hnorm.weight", "mtp.hidden_norm.scale", width)
  # The official checkpoint leaves eh_proj unquantised; others may not.
  yield _matrix(
    prefix + "eh_proj.weight",
    "mtp.projection",
    (width, 2 * width),
    may_be_fp8=True,
  )
  yield from _layer(config, number, ("mtp", "block"), (), is_moe=True)
  yield _vector(
    prefix + "shared_head.norm.weight", "mtp.final_norm.scale", width
  )
  copies = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
  }
  shape = (config.vocab_size, width)
  for name, original in copies.items():
    yield Tensor(
      name=prefix + name,
      shape=shape,
      view=shape,
      order=(0, 1),
      parts=(),
      copy_of=original,
    )


def tensors(config: config_lib.ModelConfig) -> Iterator[Tensor]:
  """Yields every tensor of a model's checkpoint, layer by layer.

  A generator, so that a check may stop at the first one missing before a
  hostile config makes the list long.
  """
  table = (config.vocab_size, config.width)
  yield Tensor(
    name="model.embed_tokens.weight",
    shape=table,
    view=table,
    order=(0, 1),
    parts=_parts("embed.table"),
  )
  for number in range(config.num_layers):
    is_moe = number >= config.num_dense_layers
    base = "moe_layers" if is_moe else "dense_layers"
    place = number - config.num_dense_layers if is_moe else number
    yield from _layer(config, number, (base,), (place,), is_moe=is_moe)
  yield _vector("model.norm.weight", "final_norm.scale", config.width)
  yield _matrix("lm_head.weight", "head.kernel", table)
  if config.num_mtp_layers:
    yield from _mtp(config)


def num_parameters(config: config_lib.ModelConfig) -> int:
  """Counts the numbers in a model's parameters and router biases."""
  return sum(math.prod(row.shape) for row in tensors(config) if row.parts)
