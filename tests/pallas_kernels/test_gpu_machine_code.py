"""Machine code of the kernels for Hopper, compiled with no GPU at hand.

Needs the CUDA plugin of JAX, which needs no GPU to compile.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_compile
from pallas_kernels.decode_scores import gpu as decode_gpu
from pallas_kernels.index_select import gpu as index_gpu
from pallas_kernels.index_select import gpu_search
from pallas_kernels.indexer_kl import gathered_gpu
from pallas_kernels.indexer_kl import masked_gpu as masked_kl
from pallas_kernels.masked_attention import gpu as masked_gpu
from pallas_kernels.masked_attention import gpu_backward as masked_backward
from pallas_kernels.sparse_mla import gpu as sparse_gpu
from pallas_kernels.sparse_mla import gpu_backward as sparse_backward

# Of a block on Hopper.
MAX_SHARED_BYTES = 232448
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
compiled = pytest.mark.skipif(
  not any(importlib.util.find_spec(name) for name in PLUGINS),
  reason=f"none of {PLUGINS} is installed",
)


def test_reads_machine_code():
  kernel = gpu_compile.Kernel(
    name="made_up",
    sass="""
      /*0000*/  IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x0a0b */
      /*0010*/  @!P0 LDG.E R207, desc[UR4][R2.64] ;
      /*0020*/  @P1 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
      /*0030*/  USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xd0 ;
      /*0040*/  USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
      /*0050*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
    """,
    registers=168,
    spill_bytes=0,
    shared_bytes=0,
    warnings=(),
  )
  assert kernel.opcodes() == {"IMAD": 1, "LDG": 1, "HGMMA": 2, "USETMAXREG": 2}
  assert kernel.register_shares() == [208, 40]
  assert kernel.highest_register() == 207


def test_compile_refuses_other_targets(tmp_path):
  with pytest.raises(ValueError, match="target="):
    gpu_compile.compile_for(jnp.sin, target="z80", folder=tmp_path)
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="not empty"):
    gpu_compile.compile_for(jnp.sin, target="h200", folder=tmp_path)


def search_program(keys):
  ordered_CP = jax.ShapeDtypeStruct((64, keys), jnp.int32)
  return functools.partial(gpu_search.best, top_k=2048), [ordered_CP]


def types(*shapes):
  return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def index_program(dtype):
  return index_gpu.scores, [
    jax.ShapeDtypeStruct((64, 64, 128), dtype),
    jax.ShapeDtypeStruct((4096, 128), dtype),
    jax.ShapeDtypeStruct((64, 64), jnp.float32),
    jax.ShapeDtypeStruct((64,), jnp.int32),
  ]


def decode_program(page_size, dtype=jnp.float8_e4m3fn):
  pages, scale_PZ = 4096 // page_size, None
  if dtype == jnp.float8_e4m3fn:
    scale_PZ = jax.ShapeDtypeStruct((2 * pages, page_size), jnp.float32)
  return decode_gpu.scores, [
    jax.ShapeDtypeStruct((2, 64, 128), dtype),
    jax.ShapeDtypeStruct((2, 64), jnp.float32),
    jax.ShapeDtypeStruct((2 * pages, page_size, 128), dtype),
    scale_PZ,
    jax.ShapeDtypeStruct((2, pages), jnp.int32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
  ]


def sparse_program():
  arrays = types((1, 8, 128, 512), (1, 8, 128, 64), (1, 99, 512), (1, 99, 64))
  indices_BTN = jax.ShapeDtypeStruct((1, 8, 2048), jnp.int32)
  forward = functools.partial(sparse_gpu.forward, scale=0.1)
  return forward, [*arrays, indices_BTN]


def sparse_backward_program():
  arrays = types((1, 8, 128, 512), (1, 8, 128, 64), (1, 99, 512), (1, 99, 64))
  out = jax.ShapeDtypeStruct((1, 8, 128, 512), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 8, 128), jnp.float32)
  indices_BTN = jax.ShapeDtypeStruct((1, 8, 2048), jnp.int32)

  def backward(*arrays):
    return sparse_backward.backward(*arrays[:5], 0.1, *arrays[5:])

  return backward, [*arrays, indices_BTN, out, lse, out]


def gathered_kl_program():
  trained = types((1, 8, 64, 128), (1, 99, 128))
  trained.append(jax.ShapeDtypeStruct((1, 8, 64), jnp.float32))
  constants = types(
    (1, 8, 128, 512), (1, 8, 128, 64), (1, 99, 512), (1, 99, 64)
  )
  constants.append(jax.ShapeDtypeStruct((1, 8, 128), jnp.float32))
  constants.append(jax.ShapeDtypeStruct((1, 8, 2048), jnp.int32))
  weight_BT = jax.ShapeDtypeStruct((1, 8), jnp.float32)
  evaluate = functools.partial(gathered_gpu.evaluate, 0.1)
  return evaluate, [trained, constants, weight_BT]


def masked_kl_program():
  trained = types((1, 128, 64, 128), (1, 512, 128))
  trained.append(jax.ShapeDtypeStruct((1, 128, 64), jnp.float32))
  constants = types((1, 128, 16, 192), (1, 512, 16, 192))
  constants.append(jax.ShapeDtypeStruct((1, 128, 16), jnp.float32))
  constants.append(jax.ShapeDtypeStruct((1, 128), jnp.int32))
  constants.append(jax.ShapeDtypeStruct((1, 128, 16), jnp.uint32))
  weight_BT = jax.ShapeDtypeStruct((1, 128), jnp.float32)
  evaluate = functools.partial(masked_kl.evaluate, 0.1)
  return evaluate, [trained, [*constants, None, None], weight_BT]


def masked_backward_program(width, value_width, key_heads):
  arrays = types(
    (1, 512, 4, width),
    (1, 512, key_heads, width),
    (1, 512, key_heads, value_width),
  )
  sees = [
    jax.ShapeDtypeStruct((1, 512), jnp.int32),
    jax.ShapeDtypeStruct((1, 512, 16), jnp.uint32),
  ]
  out = jax.ShapeDtypeStruct((1, 512, 4, value_width), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 512, 4), jnp.float32)

  def backward(query, key, value, slots, mask, out, lse, d_out):
    sees = (slots, mask, None, None)
    return masked_backward.backward(
      query, key, value, sees, 0.1, out, lse, d_out
    )

  return backward, [*arrays, *sees, out, lse, out]


def masked_program(width, value_width):
  arrays = types(
    (1, 512, 4, width), (1, 512, 4, width), (1, 512, 4, value_width)
  )
  slots_BT = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  mask_BTW = jax.ShapeDtypeStruct((1, 512, 16), jnp.uint32)

  def forward(query_BTHQ, key_BSGQ, value_BSGV, slots_BT, mask_BTW):
    sees = (slots_BT, mask_BTW, None, None)
    return masked_gpu.forward(query_BTHQ, key_BSGQ, value_BSGV, sees, 0.1)

  return forward, [*arrays, slots_BT, mask_BTW]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
  ("program", "opcodes", "registers"),
  [
    (index_program(jnp.bfloat16), [{"HGMMA": 16, "UTMALDG": 5}], 112),
    (index_program(jnp.float8_e4m3fn), [{"QGMMA": 8, "UTMALDG": 5}], 112),
    (decode_program(32), [{"QGMMA": 4}], 112),
    (decode_program(64), [{"QGMMA": 4}], 112),
    (decode_program(256), [{"QGMMA": 4}], 112),
    (decode_program(64, jnp.bfloat16), [{"HGMMA": 8}], 112),
    (search_program(32768), [{"HGMMA": None}], 128),
    (sparse_program(), [{"HGMMA": 44, "LDGSTS": 36, "UTMALDG": 3}], 232),
    (
      sparse_backward_program(),
      [{"HGMMA": 100, "LDGSTS": 72, "REDG": 24}],
      200,
    ),
    (
      gathered_kl_program(),
      [
        {"HGMMA": 72, "LDGSTS": 72, "REDG": None},
        {"HGMMA": 8, "LDGSTS": 16, "REDG": None},
        {"HGMMA": 16, "LDGSTS": 16, "REDG": 16},
      ],
      200,
    ),
    (
      masked_kl_program(),
      # The masses, the scores, and gradients of queries and keys.
      [{"HGMMA": 12}, {"HGMMA": 16}, {"HGMMA": 12}, {"HGMMA": 12}],
      232,
    ),
    (masked_program(192, 128), [{"HGMMA": 20, "UTMALDG": 8}], 232),
    (masked_program(256, 256), [{"HGMMA": 20, "UTMALDG": 7}], 232),
    (masked_backward_program(192, 128, 4), [{"HGMMA": 24}, {"HGMMA": 28}], 240),
    (masked_backward_program(128, 128, 1), [{"HGMMA": 20}, {"HGMMA": 24}], 240),
  ],
  ids=[
    "scores-bf16",
    "scores-fp8",
    "decode-32",
    "decode-64",
    "decode-256",
    "decode-bf16",
    "search",
    "sparse",
    "sparse-backward",
    "gathered-kl",
    "masked-kl",
    "masked-192",
    "masked-256",
    "masked-backward-192",
    "masked-backward-128",
  ],
)
def test_machine_code(tmp_path, program, opcodes, registers):
  function, arguments = program
  _, kernels = gpu_compile.compile_for(
    function, *arguments, target="h200", folder=tmp_path / "dump"
  )
  counts = [kernel.opcodes() for kernel in kernels]
  wanted = [{x: own.get(x) for x in opcodes[0]} for own in counts]
  assert sorted(wanted, key=str) == sorted(opcodes, key=str)
  for kernel, own in zip(kernels, counts, strict=True):
    # Registers stay in registers: nothing is kept in a thread's memory.
    assert kernel.spill_bytes == 0
    assert not {"LDL", "STL"} & set(own)
    assert kernel.warnings == ()
    assert 0 < kernel.shared_bytes <= MAX_SHARED_BYTES
    assert kernel.highest_register() < registers
