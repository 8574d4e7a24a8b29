"""Results by id: killed at any time, no row lost and none twice."""

import asyncio
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from dsv32_jax.agents import loop
from dsv32_jax.agents import many
from dsv32_jax.agents import results

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_many(path, ids, run, concurrency=3, **options):
  return asyncio.run(
    many.run_many(ids, run, path, concurrency=concurrency, **options)
  )


async def quick(episode_id):
  await asyncio.sleep(0)
  return loop.EpisodeResult(id=episode_id, reward=1.0, finish="done")


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_by_id_and_nothing_runs_twice(tmp_path):
  path, told = tmp_path / "new" / "results.jsonl", []
  rows = run_many(path, ["b", "a"], quick, on_row=told.append)
  assert [row["id"] for row in rows] == ["b", "a"]
  assert rows_of(path) == told and len(told) == 2

  async def never(episode_id):
    raise AssertionError(episode_id)

  assert run_many(path, ["a", "b"], never) == rows[::-1]
  rows = run_many(path, ["a", "c"], quick)
  assert [row["id"] for row in rows_of(path)] == ["b", "a", "c"]


def test_concurrency_is_bounded_and_used(tmp_path):
  running, most = 0, 0

  async def run(episode_id):
    nonlocal running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.001)
    running -= 1
    return loop.EpisodeResult(id=episode_id)

  ids = [str(number) for number in range(30)]
  assert len(run_many(tmp_path / "r", ids, run, concurrency=4)) == 30
  assert most == 4


def test_a_failure_stops_new_episodes_and_is_raised_in_the_end(tmp_path):
  begun = []

  async def run(episode_id):
    begun.append(episode_id)
    if episode_id == "1":
      raise OSError("the endpoint is gone")
    await asyncio.sleep(0.01)
    return loop.EpisodeResult(id=episode_id)

  ids = [str(number) for number in range(10)]
  with pytest.RaisesGroup(OSError) as caught:
    run_many(tmp_path / "r", ids, run)
  assert caught.value.exceptions[0].__notes__ == ["in episode 1"]
  assert begun == ["0", "1", "2"]
  assert sorted(row["id"] for row in rows_of(tmp_path / "r")) == ["0", "2"]
  assert len(run_many(tmp_path / "r", ids, quick)) == 10


def test_bad_arguments(tmp_path):
  with pytest.raises(ValueError, match="not all different"):
    run_many(tmp_path / "r", ["a", "a"], quick)
  with pytest.raises(ValueError, match="concurrency=0"):
    run_many(tmp_path / "r", ["a"], quick, concurrency=0)


def test_a_file_cut_at_any_byte_loses_at_most_its_last_row(tmp_path):
  path = tmp_path / "r"
  with results.ResultsFile(path) as file:
    for number in range(3):
      file.append({"id": f"{number}\u00e9", "text": "a\nb\u2028c"})
  whole = path.read_bytes()
  ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
  assert len(ends) == 3
  for size in range(len(whole) + 1):
    path.write_bytes(whole[:size])
    with results.ResultsFile(path) as file:
      assert len(file.rows) == sum(end <= size for end in ends)
      file.append({"id": "new"})
    with results.ResultsFile(path) as file:
      assert list(file.rows)[-1] == "new"


@pytest.mark.parametrize(
  "content, what",
  [
    ('{"id": "a"}\nnonsense\n', ":2: no row"),
    ('{"id": "a"}\n{"id": "a"}\n', ":2: row_id='a' is no new id"),
    ('{"id": 1}\n', ":1: row_id=1"),
    ("[]\n", ":1: no row"),
    ("\n", ":1: no row"),
  ],
)
def test_a_broken_file_is_refused_and_left_alone(tmp_path, content, what):
  path = tmp_path / "r"
  path.write_text(content)
  with pytest.raises(ValueError, match=what):
    results.ResultsFile(path)
  assert path.read_text() == content


@pytest.mark.parametrize(
  "row", [{}, {"id": 1}, {"id": "a"}, {"id": "b", "x": {1}}]
)
def test_a_bad_row_is_refused(tmp_path, row):
  with results.ResultsFile(tmp_path / "r") as file:
    file.append({"id": "a"})
    with pytest.raises(ValueError, match="row_id="):
      file.append(row)
    with pytest.raises(ValueError):
      file.append({"id": "c", "x": float("nan")})
  assert rows_of(tmp_path / "r") == [{"id": "a"}]


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
  write = os.write

  def full(file, content):
    if len(content) > 20:
      return write(file, content[:20])
    raise OSError(28, "No space left on device")

  path = tmp_path / "r"
  with results.ResultsFile(path) as file:
    file.append({"id": "a"})
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
      file.append({"id": "b", "text": "x" * 25})
    monkeypatch.undo()
    assert rows_of(path) == [{"id": "a"}]
    file.append({"id": "b"})
  assert [row["id"] for row in rows_of(path)] == ["a", "b"]


def test_one_process_at_a_time(tmp_path):
  with (
    results.ResultsFile(tmp_path / "r"),
    pytest.raises(ValueError, match="another process writes it"),
  ):
    results.ResultsFile(tmp_path / "r")
  results.ResultsFile(tmp_path / "r").close()


PROGRAM = """
import asyncio, random, sys
from dsv32_jax.agents import loop, many
async def run(episode_id):
  await asyncio.sleep(random.random() * 0.02)
  messages = [{"role": "user", "content": "x" * random.randrange(200_000)}]
  return loop.EpisodeResult(id=episode_id, finish="done", messages=messages)
ids = [str(number) for number in range(400)]
asyncio.run(many.run_many(ids, run, sys.argv[1], concurrency=8))
"""


def test_killed_again_and_again(tmp_path):
  path, rng = tmp_path / "results.jsonl", random.Random(0)
  command = [sys.executable, "-c", PROGRAM, str(path)]
  sizes = [0]
  for _ in range(4):
    process = subprocess.Popen(command, cwd=ROOT)
    grown = sizes[-1] + rng.randrange(1, 4_000_000)
    limit = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit:
      if path.exists() and path.stat().st_size > grown:
        break
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    sizes.append(path.stat().st_size)
  assert sizes == sorted(sizes) and sizes[1] > 0
  before = path.read_bytes()
  subprocess.run(command, cwd=ROOT, check=True)
  ids = [row["id"] for row in rows_of(path)]
  assert sorted(ids, key=int) == [str(number) for number in range(400)]
  # What was whole is still there, byte for byte.
  assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
