"""Episodes on a Ray cluster of two nodes on this machine."""

import asyncio
import json
import os
import pathlib

import pytest
import ray
from ray import cluster_utils

from dsv32_jax.agents import loop
from dsv32_jax.agents import many
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import ray_workers
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index

pytestmark = [
  pytest.mark.slow,
  # Ray forks its daemons, which execute another program at once; where an
  # earlier test started JAX in this process, JAX warns of every fork.
  pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),
]
IDS = [f"e{number}" for number in range(12)]


@pytest.fixture(scope="module")
def cluster():
  os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
  made = cluster_utils.Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "include_dashboard": False},
  )
  made.add_node(num_cpus=1)
  root = str(pathlib.Path(__file__).resolve().parents[2])
  ray.init(
    address=made.address,
    log_to_driver=False,
    runtime_env={"env_vars": {"PYTHONPATH": root}},
  )
  yield made
  ray.shutdown()
  made.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp("ray") / "corpus.sqlite"
  documents = [
    search_index.Document(name=f"d{n}", title=f"T{n}", text=f"word{n}\n")
    for n in range(12)
  ]
  search_index.build(path, documents)
  return str(path)


def player(corpus, marks=None):
  """Returns what a worker makes once: a function that plays an episode.

  Args:
    corpus: path of the index.
    marks: folder; an episode that finds no mark of its own leaves one and ends
      its worker, as a crash would.
  """

  def make_run():
    index = search_index.LocalIndex(corpus)
    node = ray.get_runtime_context().get_node_id()

    async def run(episode_id):
      number = episode_id[1:]
      if marks is not None and number in ("3", "8"):
        mark = pathlib.Path(marks, number)
        if not mark.exists():
          mark.touch()
          os._exit(1)
      query = json.dumps({"query": f"word{number}"})
      answer = json.dumps({"answer_text": f"d{number}"})
      script = policies.replies(
        policies.call("search", query), policies.call("submit_result", answer)
      )
      task = {"id": number, "question": "Where?", "answer": f"d{number}"}
      episode = await loop.run_episode(
        policies.ScriptedPolicy(script),
        lambda: search.SearchEnvironment(index, task),
        episode_id=episode_id,
      )
      await asyncio.sleep(0.2)
      episode.result.error = node
      return episode.result

    return run

  return make_run


def without_clock(rows):
  return [{**row, "seconds": 0, "error": ""} for row in rows]


def test_both_nodes_play_what_one_process_would(cluster, corpus, tmp_path):
  rows = ray_workers.run_many(
    IDS, player(corpus), tmp_path / "ray.jsonl", workers=2, concurrency=2
  )
  assert len({row["error"] for row in rows}) == 2
  assert all(row["reward"] == 1.0 for row in rows)
  alone = player(corpus)()
  here = asyncio.run(
    many.run_many(IDS, alone, tmp_path / "here.jsonl", concurrency=1)
  )
  assert without_clock(rows) == without_clock(here)


def test_a_worker_that_dies_loses_no_episode(cluster, corpus, tmp_path):
  path = tmp_path / "ray.jsonl"
  marks = tmp_path / "marks"
  marks.mkdir()
  run = player(corpus, str(marks))
  rows = ray_workers.run_many(IDS, run, path, workers=2, tries=5)
  assert [row["id"] for row in rows] == IDS
  assert sorted(x.name for x in marks.iterdir()) == ["3", "8"]
  assert all(row["reward"] == 1.0 for row in rows)
  lines = path.read_text().splitlines()
  assert sorted(json.loads(x)["id"] for x in lines) == sorted(IDS)
  again = ray_workers.run_many(IDS, run, path, workers=1)
  assert again == rows and path.read_text().splitlines() == lines


def test_what_a_run_raises_is_raised(cluster, tmp_path):
  def make_run():
    async def run(episode_id):
      if episode_id == "e1":
        raise ValueError("this policy is broken")
      return loop.EpisodeResult(id=episode_id)

    return run

  with pytest.raises(ExceptionGroup) as raised:
    ray_workers.run_many(IDS, make_run, tmp_path / "x.jsonl", workers=1)
  (error,) = raised.value.exceptions
  assert "this policy is broken" in str(error)


def test_mistakes(cluster, tmp_path):
  with pytest.raises(ValueError, match="workers=0 must be positive"):
    ray_workers.run_many(IDS, None, tmp_path / "x.jsonl", workers=0)
