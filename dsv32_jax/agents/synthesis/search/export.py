"""What a synthesis of search tasks leaves for others; docs/agent_data.md."""

import collections
from collections.abc import Iterator
import itertools
import json
import pathlib
from typing import Any

import pyarrow as pa

from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.general import campaign as folders
from dsv32_jax.agents.synthesis.general import export as general_export
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import constructing

_TEXT, _NUMBER = pa.string(), pa.int64()
TASK_SCHEMA = pa.schema(
  {
    "id": _TEXT,
    "kind": _TEXT,
    "question": _TEXT,
    "prompt": _TEXT,
    "tools": _TEXT,
    "answer": _TEXT,
    "rubric": _TEXT,
    "corpus": _TEXT,
    "entity": _TEXT,
    "depth": _NUMBER,
    "breadth": _NUMBER,
    "evidence": _TEXT,
    "answers": _TEXT,
  }
)


def export(workdir: pathlib.Path) -> None:
  """Writes every derived file; each appears when it is whole."""
  tables.write(workdir / "tasks", task_rows(workdir), TASK_SCHEMA)
  tables.write(
    workdir / "trajectories",
    trajectory_rows(workdir),
    general_export.TRAJECTORY_SCHEMA,
  )
  tables.write_jsonl(workdir / "rejections.jsonl", rejection_rows(workdir))


def task_rows(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the rows of tasks.parquet: questions, then helpful prompts."""
  source = search_index.LocalIndex(workdir / campaign.CORPUS_FILE)
  shown = json.dumps(search.descriptions())
  for row in itertools.chain(_kept(workdir), _kept_helpful(workdir)):
    yield {
      "id": row["id"],
      "kind": "rubric" if "rubric" in row else "question",
      "question": row["question"],
      "prompt": search.prompt(row),
      "tools": shown,
      "answer": row.get("answer", ""),
      "rubric": json.dumps(row.get("rubric", [])),
      "corpus": source.identity,
      "entity": row.get("entity", ""),
      "depth": row.get("depth", 0),
      "breadth": row.get("breadth", 0),
      "evidence": json.dumps(row.get("evidence", [])),
      "answers": json.dumps(row["answers"], ensure_ascii=False),
    }
  source.close()


def trajectory_rows(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the walks that verified the questions, as conversations."""
  for row in _walked(workdir):
    text = json.dumps(row["messages"], ensure_ascii=False)
    yield {"id": row["id"], "reward": 1.0, "messages": text}


def rejection_rows(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields what was not kept, and why."""
  names = ("id", "entity", "depth", "breadth", "question", "answer", "answers")
  names += ("score_without", "score_with", "refusals", "verdicts", "reason")
  for row in _all(workdir):
    if row["reason"]:
      yield {name: row[name] for name in names if name in row}


def report(workdir: pathlib.Path) -> dict[str, Any]:
  """Counts what the folder holds.

  Returns:
    JSON-able numbers. `baselines` are shares of the questions that the corpus
    bears out (verified by scan, evidence and walks) which each scripted
    answerer gets right, kept or not; `seconds` of processor time.
  """
  candidates = list(folders.read(workdir / campaign.CANDIDATES_FILE))
  helpful = list(folders.read(workdir / campaign.HELPFUL_FILE))
  kept = [row for row in candidates if not row["reason"]]
  answered = [row for row in candidates if "answers" in row]
  right = collections.Counter(
    name
    for row in answered
    for name, text in row["answers"].items()
    if search.is_right(text, row)
  )
  seconds = folders.read(workdir / folders.SECONDS_FILE)
  count = lambda rows, name: dict(
    sorted(collections.Counter(str(row[name]) for row in rows).items())
  )
  return {
    "candidates": len(candidates),
    "tasks": len(kept),
    "verified": len(answered),
    "helpful_prompts": len(helpful),
    "helpful_kept": sum(not row["reason"] for row in helpful),
    "depths": count(kept, "depth"),
    "breadths": count(kept, "breadth"),
    "domains": constructing.domains(row["entity"] for row in kept),
    "rejections": dict(
      collections.Counter(
        row["reason"] for row in [*candidates, *helpful] if row["reason"]
      ).most_common()
    ),
    "calls_of_a_walk": _spread(
      [len(x["messages"]) // 2 - 1 for x in _walked(workdir)]
    ),
    "baselines": {
      name: right[name] / len(answered)
      for name in (answered[0]["answers"] if answered else ())
    },
    "seconds": round(sum(row["seconds"] for row in seconds), 1),
  }


def _spread(values: list[int]) -> dict[str, float]:
  if not values:
    return {}
  mean = round(sum(values) / len(values), 1)
  return {"least": min(values), "mean": mean, "greatest": max(values)}


def _all(workdir):
  yield from folders.read(workdir / campaign.CANDIDATES_FILE)
  yield from folders.read(workdir / campaign.HELPFUL_FILE)


def _kept(workdir):
  for row in folders.read(workdir / campaign.CANDIDATES_FILE):
    if not row["reason"]:
      yield row


def _walked(workdir):
  """Kept questions with a walk; those that a model wrote have none."""
  return (row for row in _kept(workdir) if "messages" in row)


def _kept_helpful(workdir):
  for row in folders.read(workdir / campaign.HELPFUL_FILE):
    if not row["reason"]:
      yield row
