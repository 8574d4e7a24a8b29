"""The variants that a model writes, over a socket and a server of scripts."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import helpful
from tests.support import authors
from tests.support import scripted_server

ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(variant, workdir, *flags):
  return [
    *(sys.executable, "-m", "experiments.synthesize"),
    f"--config=configs/synthesize.py:{variant}",
    *(f"--workdir={workdir}", *flags),
  ]


def environment():
  return {**os.environ, "OPENAI_API_KEY": "none"}


def run(variant, workdir, *flags):
  return subprocess.run(
    command(variant, workdir, *flags),
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def general(messages):
  """Writes an environment, or solves a task."""
  if "Build an environment" in messages[1]["content"]:
    return policies.replies(*authors.whole())(messages)
  return authors.solver(messages)


@pytest.mark.slow
def test_general(tmp_path):
  with scripted_server.serving(general) as url:
    done = run(
      "authored",
      tmp_path,
      f"--config.base_url={url}",
      "--config.model=script",
      "--config.num_tasks=1",
      "--config.max_candidates=1",
      "--config.turns=20",
      "--config.attempts=2",
    )
  assert done.returncode == 0, done.stderr
  assert "1 environments, 1 tasks of 1 candidates" in done.stdout
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["solution_calls"] == [9]
  assert "memory_bytes" in report["memory_bound"]
  assert (tmp_path / "tasks.parquet").exists()


def interpreter(messages):
  """Writes a problem, guesses wrong, solves with the kernel."""
  code = "print(sum(n * n % 97 for n in range(5000)))"
  text = next(m["content"] for m in messages if m["role"] == "user")
  if "Hand it in" in text:
    return authors.say(
      "hand_in_problem",
      statement=f"{text[:60]} Add up n * n modulo 97 for n from 0 to 4999.",
      files={},
      solution=code,
      tolerance=0,
    )
  if "no tools" in text:
    return {"content": "1"}
  if messages[-1]["role"] != "tool":
    return authors.say("python", code=code)
  return authors.say("submit_result", answer_text=messages[-1]["content"])


@pytest.mark.slow
def test_interpreter(tmp_path):
  with scripted_server.serving(interpreter) as url:
    done = run(
      "interpreter_authored",
      tmp_path,
      f"--config.base_url={url}",
      "--config.model=script",
      "--config.num_tasks=1",
      "--config.max_candidates=1",
      "--config.turns=9",
    )
  assert done.returncode == 0, done.stderr
  assert "1 tasks of 1 candidates" in done.stdout
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["trajectories_rewarded"] == 1


@pytest.mark.slow
def test_a_killed_run_loses_and_repeats_nothing(tmp_path):
  asked = []

  def script(messages):
    if len(messages) == 2 and "Hand it in" in messages[1]["content"]:
      asked.append(messages[1]["content"][:60])
    return interpreter(messages)

  path = tmp_path / "candidates.jsonl"
  with scripted_server.serving(script) as url:
    flags = (
      f"--config.base_url={url}",
      "--config.model=script",
      "--config.num_tasks=3",
      "--config.concurrency=1",
    )
    killed = subprocess.Popen(
      command("interpreter_authored", tmp_path, *flags),
      cwd=ROOT,
      env=environment(),
      stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not path.exists() or b"\n" not in path.read_bytes():
      assert time.monotonic() < deadline and killed.poll() is None
      time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before, first = path.read_bytes(), asked[0]
    assert before.count(b"\n") < 3
    done = run("interpreter_authored", tmp_path, *flags)
  assert done.returncode == 0, done.stderr
  assert path.read_bytes().startswith(before)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row["id"] for row in rows] == [
    f"interpreter-{number:06d}" for number in range(3)
  ]
  # What had its row was not asked for again.
  assert asked.count(first) == 1 and len(set(asked)) == 3
  assert "3 tasks of 3 candidates" in done.stdout


def search(messages):
  """Knows one thing once it has searched, and grades who says it."""
  text = "".join(m["content"] for m in messages if m["role"] == "user")
  if "Criteria:" in text:
    answer = text.partition("Answer:")[2]
    return {"content": json.dumps({"1": float("Leiden" in answer)})}
  with_tools = "Find the answer with the tools" in text
  if with_tools and messages[-1]["role"] != "tool":
    return authors.say("search", query="Mulder")
  if with_tools:
    return authors.say("submit_result", answer_text="In Leiden.")
  return {"content": "I cannot say."}


@pytest.mark.slow
def test_search(tmp_path):
  """The second source: a model answers with and without search, and grades."""
  index, prompts = tmp_path / "index.sqlite", tmp_path / "prompts.jsonl"
  search_index.build(
    index,
    [search_index.Document(name="m", title="Mulder", text="Born in Leiden.")],
  )
  criterion = helpful.Criterion(dimension="a", text="Says where.", most_chars=9)
  rubric = helpful.dump([criterion])
  row = {"prompt": "Where was Mulder born?", "rubric": rubric}
  prompts.write_text(json.dumps(row) + "\n")
  with scripted_server.serving(search) as url:
    done = run(
      "search_authored",
      tmp_path,
      f"--config.base_url={url}",
      "--config.model=script",
      "--config.max_candidates=1",
      f"--config.corpus={index}",
      f"--config.prompts={prompts}",
      "--config.num_helpful=1",
    )
  assert done.returncode == 0, done.stderr
  assert "0 tasks of 1 candidates, 1 of 1 helpful prompts" in done.stdout
  (told,) = (tmp_path / "rejections.jsonl").read_text().splitlines()
  assert "the episode ended with answered" in json.loads(told)["reason"]


def test_without_a_server_it_says_so(tmp_path):
  done = run("authored", tmp_path)
  assert done.returncode == 1
  assert done.stderr.count("\n") == 1
  assert "config.base_url='' and config.model=''" in done.stderr
