"""What programs that generate share: a checkpoint, its tokenizer, an engine."""

import dataclasses
import functools
import os

from absl import flags
import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax import weights
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import engine as engines
from dsv32_jax.generation.server import text_stream
from dsv32_jax.training import model_checkpoint

_HF = flags.DEFINE_string("hf_checkpoint", None, "Hugging Face folder.")
_ORBAX = flags.DEFINE_string("checkpoint", None, "Orbax checkpoint folder.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "A tokenizer.json; none: the one by the checkpoint.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16"], "Type of weights and compute."
)
_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Tokens of prompt and answer; none: 4096 or the model's."
)
_BATCH = flags.DEFINE_integer("max_batch", 8, "Sequences that run at once.")
_CACHE = flags.DEFINE_float("cache_gib", 1.0, "Memory for the cache, GiB.")
_PAGE = flags.DEFINE_integer("page_size", 64, "Tokens of a page of the cache.")
_CHUNK = flags.DEFINE_integer("prefill_chunk", 256, "Prompt tokens a step.")
_INDEX_KEYS = flags.DEFINE_enum(
  "index_key_format",
  "model",
  ["model", "fp8"],
  "Index keys in --dtype, or as the official 8-bit indexer has them.",
)
_SPECULATE = flags.DEFINE_bool(
  "speculate", False, "Draft tokens with the multi-token prediction module."
)
_MESH = flags.DEFINE_list(
  "mesh",
  [],
  "Devices along axes, as in --mesh=expert:8,fsdp:-1; none: the first device.",
)
# Without these there is no chat.
_CHAT_TOKENS = ("user", "assistant", "think_start", "think_end")


def name() -> str:
  """Returns what the checkpoint is called: the folder that holds it.

  Raises:
    ValueError: not exactly one checkpoint is given.
  """
  if (_HF.value is None) == (_ORBAX.value is None):
    raise ValueError("give one of --hf_checkpoint and --checkpoint")
  path = os.path.abspath(_HF.value or _ORBAX.value)
  if _HF.value is None and os.path.basename(path) == "checkpoints":
    path = os.path.dirname(path)
  return os.path.basename(path) or "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModel:
  """A model that is ready to generate.

  Attributes:
    engine: compiled.
    tokenizer: of the model.
    max_length: tokens of prompt and answer that fit the engine's cache.
    unused_ids: those that the model has beyond the tokenizer.
  """

  engine: engines.Engine
  tokenizer: tokenizers.Tokenizer
  max_length: int
  unused_ids: range


def load() -> LocalModel:
  """Loads what the flags name, and compiles it.

  Raises:
    ValueError, OSError: naming flag or file.
  """
  name()
  dtype = jnp.dtype(_DTYPE.value)
  if dtype == jnp.float32:
    # The CPU computes float32 as such; an accelerator needs to be told. Not by
    # a context: that would hold in this thread alone.
    jax.config.update("jax_default_matmul_precision", "highest")
  tokenizer, mesh = _load_tokenizer(), make_mesh(_MESH.value)
  if _HF.value is not None:
    model = weights.load_hf(_HF.value, dtype=dtype, mesh=mesh)
  else:
    model = model_checkpoint.load_model(_ORBAX.value, dtype=dtype, mesh=mesh)
  if tokenizer.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} ids, the model only"
      f" {model.config.vocab_size}"
    )
  length = _LENGTH.value
  if length is None:
    length = min(4096, model.config.max_length)
  config = engines.EngineConfig(
    max_batch=_BATCH.value,
    page_size=_PAGE.value,
    memory_budget_bytes=int(_CACHE.value * 2**30),
    prefill_chunk=_CHUNK.value,
    max_length=length,
    speculate=_SPECULATE.value,
    index_key_format=_INDEX_KEYS.value,
    # All tokens of an answer, and as many biases as a request may have.
    most_adjusted=length + 1024,
  )
  pages = config.pages_for(model.config, model.compute_dtype)
  engine = engines.Engine(
    model,
    config,
    eos_id=tokenizer.eos_id,
    detokenize=functools.partial(text_stream.decode, tokenizer),
  )
  # So that no request waits for a compilation.
  engine.warm_up()
  return LocalModel(
    engine=engine,
    tokenizer=tokenizer,
    max_length=min(length, pages * config.page_size),
    unused_ids=range(tokenizer.vocab_size, model.config.vocab_size),
  )


def make_mesh(sizes: list[str]) -> jax.sharding.Mesh | None:
  """Makes the mesh of --mesh; ValueError where it is none."""
  if not sizes:
    return None
  found = {}
  for one in sizes:
    axis, _, size = one.strip().partition(":")
    if axis not in sharding.AXES or axis in found:
      raise ValueError(f"--mesh: {one!r} is not one of {sharding.AXES} and :N")
    try:
      found[axis] = int(size)
    except ValueError:
      raise ValueError(f"--mesh: {one!r} has no number of devices") from None
  return sharding.make_mesh(sharding.MeshConfig(**found))


def _load_tokenizer() -> tokenizers.Tokenizer:
  path = _TOKENIZER.value
  if path is None:
    folder = _HF.value or os.path.dirname(os.path.abspath(_ORBAX.value))
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
      raise ValueError(f"{path} does not exist: set --tokenizer")
  tokenizer = tokenizers.load(path)
  for token in _CHAT_TOKENS:
    tokenizer.special_id(token)
  return tokenizer
