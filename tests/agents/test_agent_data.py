"""The documented columns are those of the files, and episodes come back."""

import asyncio
import json
import pathlib
import re

from pyarrow import parquet
import pytest

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import episodes
from dsv32_jax.agents import loop
from dsv32_jax.agents import many
from dsv32_jax.agents import tables
from dsv32_jax.agents.synthesis.code import pipeline as code
from dsv32_jax.agents.synthesis.general import export as general
from dsv32_jax.agents.synthesis.interpreter import pipeline as interpreter
from dsv32_jax.agents.synthesis.search import export as search

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "agent_data.md"
SCHEMAS = {
  "General tasks: `tasks`": general.TASK_SCHEMA,
  "Search tasks: `tasks`": search.TASK_SCHEMA,
  "Code tasks: `tasks`": code.TASK_SCHEMA,
  "Interpreter tasks: `tasks`": interpreter.TASK_SCHEMA,
  "Solutions and walks: `trajectories`": general.TRAJECTORY_SCHEMA,
  "Episodes: `episodes`": episodes.SCHEMA,
}
TYPES = {"text": "string", "JSON": "string", "int": "int64", "float": "double"}


def documented():
  """Returns of each section its columns and their types."""
  sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
  row = re.compile(r"^\| `(\w+)` \| (\w+) \|", re.MULTILINE)
  return {x.partition("\n")[0]: row.findall(x) for x in sections}


@pytest.mark.parametrize("section", SCHEMAS)
def test_the_page_has_the_columns(section):
  wanted = [(x.name, str(x.type)) for x in SCHEMAS[section]]
  found = [(name, TYPES[kind]) for name, kind in documented()[section]]
  assert found == wanted


def test_the_page_has_the_supervised_data():
  row = {
    "id": "a",
    "mode": "reasoning",
    "task": "t",
    "reward": 1.0,
    "finish": "answered",
    "num_turns": 1,
    "num_bad_calls": 0,
    "num_context_changes": 0,
    "messages": [
      {"role": "user", "content": "q"},
      {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ],
  }
  ((kept,), _) = cold_start.sft_rows([row])
  assert [name for name, _ in documented()["Supervised data: `sft.jsonl`"]] == (
    list(kept)
  )


def result(number):
  return loop.EpisodeResult(
    id=f"e{number}",
    reward=number / 3,
    finish="done",
    error="\u00e9 \n",
    num_turns=number,
    seconds=0.5,
    messages=[{"role": "user", "content": "\u4e2d <think> \u2028"}] * number,
  )


def test_episodes_come_back_from_both_files(tmp_path):
  async def run(episode_id):
    return result(int(episode_id[1:]))

  source = tmp_path / "running.jsonl"
  ids = [f"e{number}" for number in range(300)]
  asyncio.run(many.run_many(ids, run, source, concurrency=3))
  episodes.export(source, tmp_path / "episodes")
  table = parquet.read_table(tmp_path / "episodes.parquet")
  assert table.schema.equals(episodes.SCHEMA)
  lines = list(tables.read_jsonl(tmp_path / "episodes.jsonl"))
  assert table.to_pylist() == lines
  found = sorted(map(episodes.load, lines), key=lambda x: int(x.id[1:]))
  assert found == [result(number) for number in range(300)]


def test_what_is_no_episode(tmp_path):
  source = tmp_path / "x.jsonl"
  source.write_text(json.dumps({"id": "a"}) + "\n")
  with pytest.raises(ValueError, match=r"x\.jsonl:1: no field 'reward'"):
    episodes.export(source, tmp_path / "y")
  assert not (tmp_path / "y.jsonl").exists()
  with pytest.raises(ValueError, match="over its source"):
    episodes.export(source, tmp_path / "x")


def test_a_row_of_other_columns_is_refused(tmp_path):
  with pytest.raises(ValueError, match="a row has the columns"):
    tables.write(tmp_path / "t", [{"id": "a"}], general.TRAJECTORY_SCHEMA)
  assert list(tmp_path.iterdir()) == [tmp_path / "t.partial"]
  with pytest.raises(ValueError, match=r"l\.jsonl:2"):
    (tmp_path / "l.jsonl").write_text('{"a": 1}\n[1]\n')
    list(tables.read_jsonl(tmp_path / "l.jsonl"))
