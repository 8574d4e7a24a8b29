"""The families of experiments.synthesize that a model writes."""

import asyncio
import contextlib
import functools
import os

from dsv32_jax.agents import endpoint
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import sandbox
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.synthesis.general import authored as general
from dsv32_jax.agents.synthesis.interpreter import authored as interpreter
from dsv32_jax.agents.synthesis.interpreter import pipeline
from dsv32_jax.agents.synthesis.search import answering
from dsv32_jax.agents.synthesis.search import authored as search
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import export as search_export
from dsv32_jax.verifiers import rubric


def policy(base_url: str, model: str) -> policies.Policy:
  """Returns the model behind a server.

  Raises:
    ValueError: it is not said which, or it does not answer.
  """
  if not base_url or not model:
    raise ValueError(
      f"config.base_url={base_url!r} and config.model={model!r} must name a"
      " server and its model"
    )
  # Of the agents' extra, and needed for this alone.
  import openai

  # Servers of one's own ask for no key; without any the client refuses.
  key = os.environ.get("OPENAI_API_KEY", "none")
  try:
    with contextlib.suppress(openai.APIStatusError):
      openai.OpenAI(base_url=base_url, api_key=key).models.list()
  except openai.APIConnectionError as error:
    raise ValueError(f"config.base_url={base_url!r}: {error}") from error
  client = openai.AsyncOpenAI(base_url=base_url, api_key=key)
  return endpoint.EndpointPolicy(client, model)


def _general(config, workdir, bar):
  """Has databases with tools and tasks written."""
  author = policy(config.base_url, config.model)
  box = workspaces.sandbox(sandbox.probe().require())
  general.run(config, workdir, author, author, box, bar("task"))
  general.export(workdir, box)
  found = general.report(workdir)
  return found, (
    f"{found['environments']} environments, {found['tasks']} tasks of"
    f" {found['candidates']} candidates"
  )


def _search(config, workdir, bar):
  """Has questions written, answered and verified; then helpful prompts."""
  make = lambda: policy(config.base_url, config.model)
  make()  # Says at once what is missing.
  search.run(
    config, workdir, lambda: search.team_of_one(make(), config), bar("task")
  )
  one = make()
  campaign.run_helpful(
    config,
    workdir,
    bar("prompt"),
    plain=answering.policy_without_tools(one),
    searching=answering.policy_answerer(one, limits=config.limits()),
    scorer=functools.partial(_rubric_score, make),
  )
  search_export.export(workdir)
  found = search_export.report(workdir)
  return found, (
    f"{found['tasks']} tasks of {found['candidates']} candidates,"
    f" {found['helpful_kept']} of {found['helpful_prompts']} helpful prompts"
  )


def _interpreter(config, workdir, bar):
  """Has problems written that only code answers."""
  author = policy(config.base_url, config.model)
  box = sandbox.Sandbox(sandbox.probe().require())
  interpreter.run(config, workdir, author, author, box, bar("task"))
  pipeline.export(workdir, config.num_trajectories)
  found = pipeline.report(workdir)
  return found, f"{found['tasks']} tasks of {found['candidates']} candidates"


def _rubric_score(make, question, answer, criteria):
  """Scores an answer by the model's grades; in a thread, with its own loop."""

  def judge(messages):
    text = "\n\n".join(message["content"] for message in messages)
    return asyncio.run(policies.ask(make(), text))

  graded = rubric.rubric_score(
    judge,
    question,
    answer,
    [rubric.Criterion(text=x.text, weight=x.weight) for x in criteria],
  )
  return graded.value


# As synthesize.FAMILIES.
FAMILIES = {
  "authored": (general.GeneralAuthoringConfig, _general),
  "interpreter_authored": (
    interpreter.InterpreterAuthoringConfig,
    _interpreter,
  ),
  "search_authored": (search.SearchAuthoringConfig, _search),
}
