"""Checkpoints come back bit for bit, or say which array is damaged."""

import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.training import checkpoint
from dsv32_jax.training import checkpoint_trees
from dsv32_jax.training import checksum
from dsv32_jax.training import stop_signal
from tests.support import save_until_killed


def make_trees(seed: int = 0):
  key = jax.random.key(seed)
  words = jax.random.bits(key, (3, 5), jnp.uint32)
  return {
    "params": nnx.State(
      {
        "layers": {"scale": nnx.Param(jax.random.normal(key, (2, 7)))},
        "table": nnx.Param(jax.random.normal(key, (90, 41), jnp.bfloat16)),
      }
    ),
    "other": {
      "words": words,
      # Every bit pattern of a type, NaNs with payload included.
      "bf16": jax.lax.bitcast_convert_type(
        jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16
      ),
      "fp8": jax.lax.bitcast_convert_type(
        jnp.arange(2**8, dtype=jnp.uint8), jnp.float8_e4m3fn
      ),
      "flags": words % 2 == 0,
      "count": jnp.int32(-3),
      "keys": [jax.random.split(key, 3), jax.random.key(1, impl="rbg")],
    },
  }


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    a, b = (checkpoint_trees.key_bits(leaf, "leaf") for leaf in (a, b))
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder, steps, **config):
  with checkpoint.Checkpointer(
    folder, checkpoint.CheckpointConfig(**config)
  ) as checkpointer:
    for step in steps:
      checkpointer.save(step, make_trees(step), {"step": step, "rate": 0.1})


def data_files(folder, step, item="params"):
  """Files that hold an item's array bytes, the largest first."""
  files = [
    path
    for path in pathlib.Path(folder, str(step), item).rglob("d/*")
    if path.is_file()
  ]
  return sorted(files, key=lambda path: -path.stat().st_size)


def damage(folder, step, how, item="params"):
  """Damages the last saved copy of an item's arrays or its metadata."""
  if how == "flip":
    # The largest file is one array's values; Orbax reads it without a check.
    path = data_files(folder, step, item)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
  elif how == "truncate":
    for path in data_files(folder, step, item):
      os.truncate(path, path.stat().st_size // 2)
  elif how == "remove":
    for path in data_files(folder, step, item):
      path.unlink()
  elif how == "metadata":
    path = pathlib.Path(folder, str(step), item, "_METADATA")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif how == "manifest":
    path = pathlib.Path(folder, str(step), "manifest", "metadata")
    path.write_text(path.read_text().replace("0.1", "0.2"))
  elif how == "no_manifest":
    path = pathlib.Path(folder, str(step), "manifest", "metadata")
    path.unlink()


def test_round_trip_is_bitwise(tmp_path):
  trees = make_trees()
  notes = {"model": {"width": 3}, "position": [1, 2, None], "rate": 1e-3}
  with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
    assert checkpointer.latest_step() is None
    checkpointer.save(7, trees, notes, process_notes={"position": 12})
    # Donating what was saved must not change what is written.
    jax.jit(lambda x: x * 0, donate_argnums=0)(trees["other"].pop("words"))
    checkpointer.wait()
  want = make_trees()
  with checkpoint.Checkpointer(tmp_path / "run", read_only=True) as reader:
    assert reader.steps() == [7]
    assert reader.read_notes() == (7, notes)
    restored = reader.restore(abstract(want))
    assert_same_bits(restored.trees, want)
    assert restored.notes == notes
    assert restored.process_notes == [{"position": 12}]
    assert (restored.step, restored.damaged) == (7, {})
    # One tree alone, laid out like given arrays.
    alone = reader.restore({"params": want["params"]}, step=7)
    assert_same_bits(alone.trees["params"], want["params"])
    keys = restored.trees["other"]["keys"]
    jax.random.normal(keys[0][1])
    assert str(jax.random.key_impl(keys[1])) == "rbg"


def test_restores_to_another_mesh(tmp_path):
  def mesh_of(shape):
    count = int(np.prod(shape))
    return jax.make_mesh(
      shape,
      ("x", "y"),
      (jax.sharding.AxisType.Auto,) * 2,
      devices=jax.devices()[:count],
    )

  value = jax.random.normal(jax.random.key(0), (8, 12))
  before = jax.NamedSharding(mesh_of((2, 4)), jax.P("x", "y"))
  after = jax.NamedSharding(mesh_of((2, 2)), jax.P("y"))
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"params": {"w": jax.device_put(value, before)}})
    checkpointer.wait()
    target = jax.ShapeDtypeStruct((8, 12), value.dtype, sharding=after)
    got = checkpointer.restore({"params": {"w": target}}).trees["params"]["w"]
  assert got.sharding == after
  assert_same_bits(got, value)


def test_keeps_the_newest_and_the_periodic(tmp_path):
  save_steps(tmp_path, range(1, 8), max_to_keep=2, keep_period=3)
  with checkpoint.Checkpointer(tmp_path, read_only=True) as reader:
    assert reader.steps() == [3, 6, 7]


@pytest.mark.parametrize(
  ("how", "item", "reason"),
  [
    ("flip", "params", "checksum of params/table is wrong"),
    ("truncate", "params", "params cannot be read"),
    ("remove", "other", "other cannot be read"),
    ("metadata", "params", "params cannot be read"),
    ("manifest", "params", "manifest does not match its digest"),
    ("no_manifest", "params", "manifest cannot be read"),
  ],
)
# TensorStore calls back after Orbax has given up and closed its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_falls_back(tmp_path, caplog, how, item, reason):
  save_steps(tmp_path, [1, 2])
  damage(tmp_path, 2, how, item)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    with caplog.at_level(logging.WARNING, checkpoint.__name__):
      restored = checkpointer.restore(abstract(make_trees()))
    assert restored.step == 1
    assert_same_bits(restored.trees, make_trees(1))
    assert reason in restored.damaged[2]
    assert f"checkpoint 2 in {tmp_path} is damaged" in caplog.text
    with pytest.raises(ValueError, match=f"no readable checkpoint.*{reason}"):
      checkpointer.restore(abstract(make_trees()), step=2)
    # The run goes on from step 1 and makes step 2 once more.
    checkpointer.save(2, make_trees(2))
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]
    again = checkpointer.restore(abstract(make_trees()))
  assert (again.step, again.damaged) == (2, {})
  assert (tmp_path / "damaged_2").is_dir()


def test_a_flipped_bit_names_the_array(tmp_path):
  values = jax.random.normal(jax.random.key(0), (64, 64))
  trees = {"params": {"block": {"kernel": values}}}
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, trees)
    checkpointer.wait()
    damage(tmp_path, 1, "flip")
    with pytest.raises(
      ValueError, match="checksum of params/block/kernel is wrong"
    ):
      checkpointer.restore(abstract(trees))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda t: t | {"count": jax.ShapeDtypeStruct((), jnp.int16)},
      r"other/count has dtype int32 and int16 is wanted",
    ),
    (
      lambda t: t | {"bf16": jax.ShapeDtypeStruct((2**16,), jnp.float32)},
      r"other/bf16 has dtype bfloat16 and float32 is wanted",
    ),
    (
      lambda t: t | {"words": jax.ShapeDtypeStruct((5, 3), jnp.uint32)},
      r"other/words has shape \[3, 5\] and \[5, 3\] is wanted",
    ),
    (
      lambda t: t | {"extra": jax.ShapeDtypeStruct((1,), jnp.uint32)},
      r"other/extra is not in the checkpoint",
    ),
    (
      lambda t: {k: v for k, v in t.items() if k != "flags"},
      r"other/flags is in the checkpoint but not wanted",
    ),
    (
      lambda t: t | {"keys": [jax.random.split(jax.random.key(0), 3)] * 2},
      r"other/keys/1 has shape \[\] and \[3\] is wanted",
    ),
  ],
)
def test_a_target_that_does_not_fit_is_refused(tmp_path, change, message):
  save_steps(tmp_path, [1, 2])
  target = abstract(make_trees()["other"])
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ValueError, match=message):
      checkpointer.restore({"other": change(target)})
    with pytest.raises(ValueError, match="has no nothing, only"):
      checkpointer.restore({"nothing": target})


def test_mistakes_are_told(tmp_path):
  with pytest.raises(FileNotFoundError, match="is missing"):
    checkpoint.Checkpointer(tmp_path / "none", read_only=True)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
      checkpointer.restore({})
    checkpointer.save(5, {"params": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match="step=5 is not newer than 5"):
      checkpointer.save(5, {"params": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match="step=4 is not newer than 5"):
      checkpointer.save(4, {"params": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"params/a is a numpy\.ndarray"):
      checkpointer.save(6, {"params": {"a": np.ones(3)}})
    with pytest.raises(ValueError, match="params/a has no elements"):
      checkpointer.save(6, {"params": {"a": jnp.ones((0, 3))}})
    with pytest.raises(ValueError, match="cannot name a saved tree"):
      checkpointer.save(6, {"manifest": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match="notes must fit in JSON"):
      checkpointer.save(6, {"params": {"a": jnp.ones(3)}}, {"a": jnp.ones(3)})
    with pytest.raises(FileNotFoundError, match="no checkpoint of step=6"):
      checkpointer.restore({}, step=6)
  with pytest.raises(ValueError, match=r"checkpoint\.every_steps=0"):
    checkpoint.CheckpointConfig(every_steps=0)


def test_a_failed_save_is_not_silent(tmp_path):
  folder = tmp_path / "run"
  checkpointer = checkpoint.Checkpointer(folder)
  checkpointer.save(1, {"params": {"a": jnp.ones(3)}})
  checkpointer.wait()
  shutil.rmtree(folder)
  folder.write_text("a file where the folder has to be")
  with pytest.raises((OSError, ValueError)):
    checkpointer.save(2, {"params": {"a": jnp.ones(3)}})
    checkpointer.wait()


# Moments drawn once, over a little more than a save takes.
DELAYS = np.random.default_rng(3).uniform(0.0, 0.4, 8).round(3).tolist()


@pytest.mark.parametrize(
  "delay",
  [*DELAYS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in DELAYS[2:])],
)
def test_kill_during_save(tmp_path, delay):
  command = [
    sys.executable,
    "-m",
    save_until_killed.__name__,
    str(tmp_path / "run"),
  ]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if int(line) == 3:
        break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    started = [int(line) for line in process.stdout if line.endswith("\n")]
  newest = max(started, default=3)
  with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
    restored = checkpointer.restore(abstract(save_until_killed.make_trees(0)))
    assert newest - 2 <= restored.step <= newest
    assert restored.damaged == {}
    assert_same_bits(
      restored.trees, save_until_killed.make_trees(restored.step)
    )
    step = restored.step + 1
    checkpointer.save(step, save_until_killed.make_trees(step))
  assert not list((tmp_path / "run").glob("*tmp*"))


def test_checksum_sees_every_single_change():
  generator = np.random.default_rng(0)
  words = generator.integers(0, 2**32, size=(3, 5), dtype=np.uint32)
  variants = {"plain": words, "turned": words[:, ::-1], "cut": words[:, :4]}
  for place in np.ndindex(words.shape):
    for bit in (0, 13, 31):
      changed = words.copy()
      changed[place] ^= np.uint32(1 << bit)
      variants[f"{place}{bit}"] = changed
  arrays = {name: jnp.asarray(value) for name, value in variants.items()}
  sums = checksum.checksums(arrays)
  assert len(set(sums.values())) == len(sums)
  assert all(len(value) == 16 for value in sums.values())
  floats = jax.lax.bitcast_convert_type(arrays["plain"], jnp.float32)
  assert checksum.checksums({"a": floats})["a"] == sums["plain"]


def test_checksum_matches_its_description():
  """Written again in Python integers."""

  def mix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)

  values = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float16)
  first = second = 0
  for place, word in enumerate(values.view(np.uint16).ravel().tolist()):
    mixed = mix((word + 0x85EBCA77 + place * 0x9E3779B1) % 2**32)
    first += mixed
    second += mix(mixed ^ 0x85EBCA77)
  want = f"{first % 2**32:08x}{second % 2**32:08x}"
  assert checksum.checksums({"a": jnp.asarray(values)}) == {"a": want}


def test_stop_signal_sets_a_flag():
  before = signal.getsignal(signal.SIGTERM)
  with stop_signal.StopSignal() as stop:
    assert not stop.agreed()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert stop.agreed()
  assert signal.getsignal(signal.SIGTERM) is before
