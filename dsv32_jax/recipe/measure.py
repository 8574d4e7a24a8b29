"""Measures the trained stages on files that training never saw.

Names of models are stages (config.STAGES); names of selections are `dense`,
`dsa` (the indexer's top k), `random` and `window`.
"""

import itertools
import os

from flax import nnx
import numpy as np
import tqdm

from dsv32_jax.data import corpus
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.evals import attention_mass
from dsv32_jax.evals import decode_time
from dsv32_jax.evals import held_out
from dsv32_jax.generation import sample
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.recipe import config as config_lib
from dsv32_jax.recipe import record
from dsv32_jax.training import metrics
from dsv32_jax.training import model_checkpoint

# R rows, L layers, T tokens, P positions

SELECTIONS = ("dense", "dsa", "random", "window")
# Which model stands for a selection after training with it.
TRAINED_WITH = {
  "dense": "dense",
  "dsa": "sparse",
  "random": "random",
  "window": "window",
}
# The dense model, its indexer warmed up: every selection before it is trained.
BEFORE = "dense_warmup"
CURVE_POINTS = 16


def run(config: config_lib.RecipeConfig, workdir: str) -> dict:
  """Measures what is not measured yet.

  Args:
    config: of the recipe, all stages of which are trained.
    workdir: its folder.

  Returns:
    JSON-able results, by part: `held_out`, `mass`, `generation`,
    `training`, and `seconds` of every part of the whole run.
  """
  rows = Rows(config, workdir)
  parts = {
    "held_out": lambda: measure_losses(config, workdir, rows),
    "mass": lambda: measure_mass(config, workdir, rows),
    "generation": lambda: measure_generation(config, workdir, rows),
  }
  results = {
    name: record.once(workdir, name, find) for name, find in parts.items()
  }
  results["training"] = {
    name: training_curve(workdir, name) for name in config_lib.STAGES
  }
  results["seconds"] = record.all_seconds(workdir)
  return results


class Rows:
  """Held-out rows, one a file, encoded when first asked for.

  Attributes:
    tokenizer: of the run.
  """

  def __init__(self, config: config_lib.RecipeConfig, workdir: str):
    self._config = config
    self.tokenizer = tokenizer_lib.load(
      os.path.join(workdir, config_lib.TOKENIZER_FILE)
    )
    self._tokens_RT = None

  @property
  def tokens_RT(self) -> np.ndarray:
    """int32, the opening token first."""
    if self._tokens_RT is None:
      documents = corpus.stdlib_documents().held_out
      # By content hash: names would put a whole package first.
      documents = sorted(documents, key=lambda document: document.sha256)
      self._tokens_RT = held_out.document_rows(
        (
          [self.tokenizer.bos_id, *self.tokenizer.encode(document.text)]
          for document in documents
        ),
        self._config.measure.length,
        max_rows=self._config.measure.rows,
      )
      if len(self._tokens_RT) < 2:
        raise ValueError(
          f"one held-out file has {self._config.measure.length} tokens: too few"
          " for an interval"
        )
    return self._tokens_RT


def selectors(config: config_lib.RecipeConfig) -> dict:
  """The selections by name; all but dense take index_top_k keys."""
  top_k = config.model.index_top_k
  return {
    "dense": selection.DENSE,
    "dsa": selection.TopK(top_k),
    "random": selection.Random(top_k, seed=config.seed),
    "window": selection.Window(top_k),
  }


def load(workdir: str, stage: str):
  """Loads a stage's model."""
  return model_checkpoint.load_model(
    os.path.join(workdir, stage, "checkpoints")
  )


def options_of(config, name: str) -> attention.AttentionOptions:
  """The attention of a selection."""
  return attention.AttentionOptions(select=selectors(config)[name])


def progress(title: str):
  """Wraps an iterable in a progress bar."""
  return lambda steps: tqdm.tqdm(
    list(steps), desc=title, ascii=True, mininterval=0.5
  )


def measure_losses(config, workdir, rows: Rows) -> dict:
  """Scores every selection before and after training with it.

  Returns:
    `before` and `after`, by selection: `loss`, `accuracy`, `tokens`,
    `row_losses` [R] (over positions past top_k as `late_row_losses`) and
    `position_losses` [P], means over equal parts of the row.
  """
  before = load(workdir, BEFORE)
  graph = nnx.split(before)[0]
  found = {"before": {}, "after": {}}
  for name in SELECTIONS:
    scorer = held_out.PmapScorer(graph, options_of(config, name))
    after = load(workdir, TRAINED_WITH[name])
    for when, model in (("before", before), ("after", after)):
      batches = held_out.batches_of_rows(
        rows.tokens_RT, config.measure.batch_size
      )
      scores = scorer(model, batches, progress(f"held-out {name} {when}"))
      found[when][name] = describe(scores, config.model.index_top_k)
  return found


def describe(scores: held_out.Scores, top_k: int) -> dict:
  """Turns scores into numbers for JSON; see measure_losses."""
  length = scores.loss_RT.shape[1]
  points = min(CURVE_POINTS, length)
  edges_P = np.linspace(0, length, points + 1).astype(int)
  masked_RT = scores.loss_RT * scores.mask_RT
  curve = [
    float(masked_RT[:, a:b].sum() / max(scores.mask_RT[:, a:b].sum(), 1))
    for a, b in itertools.pairwise(edges_P)
  ]
  return scores.summary() | {
    "row_losses": scores.row_losses().tolist(),
    "late_row_losses": scores.row_losses(top_k).tolist(),
    "position_losses": curve,
    "position_edges": edges_P.tolist(),
  }


def measure_mass(config, workdir, rows: Rows) -> dict:
  """Attention mass kept, of the dense model and of the sparsely trained one.

  Returns:
    By model (`before`, `after`) and selection: [L,R] nested lists.
  """
  chosen = {k: v for k, v in selectors(config).items() if k != "dense"}
  top_k = config.model.index_top_k
  measurer, found = None, {}
  for when, stage in (("before", BEFORE), ("after", "sparse")):
    model = load(workdir, stage)
    if measurer is None:
      measurer = attention_mass.make_measure(nnx.split(model)[0], chosen, top_k)
    mass = attention_mass.measure(
      model,
      rows.tokens_RT[: config.measure.mass_rows],
      measurer,
      top_k=top_k,
      batch_size=1,
      progress=progress(f"attention mass {when}"),
    )
    found[when] = {name: value.tolist() for name, value in mass.items()}
  return found


def measure_generation(config, workdir, rows: Rows) -> dict:
  """Times a decoded token, and continues a held-out file.

  Times are of the sparsely trained model, whichever way it attends. Samples
  are of the model trained with the selection.

  Returns:
    `positions`; `seconds` by selection, one for each position; `prompt`;
    `samples` by selection.
  """
  settings, tokenizer = config.measure, rows.tokenizer
  prompt_ids = rows.tokens_RT[0, : settings.prompt_tokens].tolist()
  sampling = sample.SamplingConfig(
    temperature=settings.temperature, top_p=settings.top_p, seed=config.seed
  )
  positions = list(settings.decode_positions)
  found = {
    "positions": positions,
    "seconds": {},
    "prompt": tokenizer.decode(prompt_ids, skip_special_tokens=True),
    "samples": {},
  }
  timed = load(workdir, "sparse")
  for name in ("dense", "dsa"):
    decoder = sample.Decoder(timed, options_of(config, name))
    found["seconds"][name] = decode_time.time_per_token(
      decoder,
      positions,
      num_tokens=settings.decode_tokens,
      progress=progress(f"time a token, {name}"),
    )
    decoder.load(load(workdir, TRAINED_WITH[name]))
    new_ids = sample.generate(
      decoder,
      prompt_ids,
      num_tokens=settings.new_tokens,
      sampling=sampling,
      eos_id=tokenizer.eos_id,
      # As timed before, so that nothing is compiled again.
      capacity=positions[0],
    )
    found["samples"][name] = tokenizer.decode(new_ids, skip_special_tokens=True)
  return found


def training_curve(workdir: str, stage: str) -> dict:
  """Reads a stage's losses: `step`, `lm_loss` and `indexer_kl` lists."""
  rows = metrics.read_rows(os.path.join(workdir, stage, metrics.METRICS_FILE))
  return {"step": [row["step"] for row in rows]} | {
    key: [row[key] for row in rows]
    for key in ("lm_loss", "indexer_kl")
    if key in rows[0]
  }
