"""What drafts of the multi-token prediction module are worth, at batch 1."""

import dataclasses
import statistics
import time

from flax import nnx
import jax
import numpy as np

from dsv32_jax.data import batch as batch_lib
from dsv32_jax.evals import engine_time
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib

# B batch, T tokens, V states of a chain

STATES, ROWS, LENGTH, STEPS = 64, 16, 64, 200
# Both losses count alike: the module has as few steps as the model to learn in.
STAGE = dataclasses.replace(stages.PRETRAIN, mtp_weight=1.0)
PROMPT = 16
# Runs of each engine, in turn, after one that compiles.
RUNS = 5


def measure_steps(model, length: int, steps: int = 32) -> dict:
  """Times a step that checks a draft against one that has none.

  The first runs two tokens, draws behind both and drafts the next one.

  Args:
    model: Transformer with an MTP module.
    length: tokens in the cache.
    steps: timed of each, in turn.

  Returns:
    `cpu_seconds` (median of all threads) of a step with a draft,
    `plain_cpu_seconds` of one without, and their `ratio`: as many tokens a step
    as that have to come for drafts to pay.
  """
  page_size = 64
  pages = -(-(length + 2 * steps + 4) // page_size)
  engines = []
  for speculate in (False, True):
    config = engine_lib.EngineConfig(
      max_batch=1,
      page_size=page_size,
      num_pages=pages,
      max_length=2 * pages * page_size,
      speculate=speculate,
    )
    engine = engine_time.LongRunning(model, config)
    engine.start(1, length, num_tokens=2 * steps + 2)
    # The second has a draft, which the first step leaves.
    engine.step()
    engine.step()
    engines.append(engine)
  taken = [[_cpu_seconds(engine.step) for engine in engines]]
  taken += [[_cpu_seconds(e.step) for e in engines] for _ in range(steps - 1)]
  plain, drafted = map(statistics.median, zip(*taken))
  if not engines[1].stats()["drafted_tokens"]:
    raise ValueError("no step of the engine had a draft")
  return dict(
    cpu_seconds=drafted, plain_cpu_seconds=plain, ratio=drafted / plain
  )


def measure_trained(model, num_tokens: int) -> dict:
  """Trains a model and its MTP module, and generates with and without drafts.

  Args:
    model: Transformer with an MTP module.
    num_tokens: drawn behind each of 4 prompts, one after the other.

  Returns:
    `parameters` of the model, `training_cpu_seconds`, and `greedy` and
    `sampled`, each as `compare`.
  """
  began = time.process_time()
  model = train(model)
  found = dict(
    parameters=sum(x.size for x in jax.tree.leaves(nnx.state(model))),
    training_cpu_seconds=time.process_time() - began,
  )
  for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
    found[name] = compare(model, num_tokens, temperature)
  return found


def compare(model, num_tokens: int, temperature: float) -> dict:
  """Generates the same tokens with drafts and without.

  Returns:
    `acceptance` (share of drafts that were right), `tokens_per_step`,
    `cpu_seconds` a token (median of RUNS) with drafts, `plain_cpu_seconds`
    without, and `speedup`.

  Raises:
    ValueError: the tokens are not the same.
  """
  prompts_BT = texts(4, PROMPT, seed=10**6)
  asked = [
    requests.Request(
      prompt_ids=ids,
      sampling=requests.SamplingParameters(
        max_tokens=num_tokens, temperature=temperature, seed=seed
      ),
    )
    for seed, ids in enumerate(prompts_BT.tolist())
  ]
  length = -(-(PROMPT + num_tokens) // 64) * 64
  engines = [
    engine_lib.Engine(
      model,
      engine_lib.EngineConfig(
        max_batch=1,
        num_pages=length // 64,
        prefill_chunk=64,
        max_length=length,
        speculate=speculate,
      ),
    )
    for speculate in (False, True)
  ]
  plain, drafting = (engine.generate(asked) for engine in engines)
  if [x.token_ids for x in plain] != [x.token_ids for x in drafting]:
    raise ValueError("drafts changed the tokens")
  taken = [
    [_cpu_seconds(lambda engine=e: engine.generate(asked)) for e in engines]
    for _ in range(RUNS)
  ]
  tokens = len(asked) * num_tokens
  accepted = sum(one.num_accepted for one in drafting)
  plain_seconds, seconds = map(statistics.median, zip(*taken))
  return dict(
    acceptance=accepted / sum(one.num_drafted for one in drafting),
    tokens_per_step=tokens / (tokens - accepted),
    cpu_seconds=seconds / tokens,
    plain_cpu_seconds=plain_seconds / tokens,
    speedup=plain_seconds / seconds,
  )


def train(model):
  """Trains all but the indexer on chains, by the stage of pretraining."""
  config = optimizer_lib.OptimizerConfig(
    schedule=schedule.ScheduleConfig(peak=5e-3), weight_decay=0.0
  )
  optimizer = optimizer_lib.make_optimizer(config)
  graph, state = step_lib.init_state(model, STAGE, optimizer)
  step = step_lib.make_step(graph, STAGE, optimizer)
  state = jax.device_put(state, jax.devices()[0])
  for number in range(STEPS):
    documents = texts(ROWS, LENGTH, seed=number + 1)
    state, _ = step(state, batch_lib.from_documents(documents, LENGTH))
  return step_lib.merge_model(graph, state)


def texts(count: int, length: int, seed: int):
  """Chains in which a token has two successors, one of them nine times in ten.

  Returns:
    int32 tokens_BT below STATES.
  """
  successors_V2 = np.random.default_rng(0).integers(0, STATES, (STATES, 2))
  generator = np.random.default_rng(seed)
  tokens_BT = generator.integers(0, STATES, (count, length))
  for place in range(1, length):
    which_B = (generator.random(count) > 0.9).astype(int)
    tokens_BT[:, place] = successors_V2[tokens_BT[:, place - 1], which_B]
  return tokens_BT.astype(np.int32)


def _cpu_seconds(run) -> float:
  began = time.process_time()
  run()
  return time.process_time() - began
