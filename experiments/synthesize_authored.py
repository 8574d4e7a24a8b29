"""The families of experiments.synthesize that a model writes."""

from dsv32_jax.agents import endpoint
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import sandbox
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.synthesis.general import authored as general


def policy(base_url: str, model: str) -> policies.Policy:
  """Returns the model behind a server.

  Raises:
    ValueError: it is not said which.
  """
  if not base_url or not model:
    raise ValueError(
      f"config.base_url={base_url!r} and config.model={model!r} must name a"
      " server and its model"
    )
  # Of the agents' extra, and needed for this alone.
  import openai

  return endpoint.EndpointPolicy(openai.AsyncOpenAI(base_url=base_url), model)


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


# As synthesize.FAMILIES.
FAMILIES = {
  "authored": (general.GeneralAuthoringConfig, _general),
}
