"""Search tasks: the corpus, chains, verification, resuming, the exports."""

import asyncio
import dataclasses
import importlib
import inspect
import itertools
import json
import random

from pyarrow import parquet
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import answering
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import constructing
from dsv32_jax.agents.synthesis.search import export
from dsv32_jax.agents.synthesis.search import helpful
from dsv32_jax.agents.synthesis.search import pipeline
from dsv32_jax.agents.synthesis.search import python_docs
from dsv32_jax.agents.synthesis.search import questions
from dsv32_jax.agents.synthesis.search import reading
from dsv32_jax.agents.synthesis.search import verifying

CONFIG = pipeline.SearchSynthesisConfig(
  num_tasks=4,
  num_helpful=30,
  modules=("email", "http", "json", "xml"),
  workers=1,
)
PART = questions.Part


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("search")
  campaign.run(CONFIG, workdir)
  campaign.run_helpful(CONFIG, workdir)
  export.export(workdir)
  return workdir


@pytest.fixture(scope="module")
def library(workdir):
  return pipeline.library(str(workdir / campaign.CORPUS_FILE))


def rows(workdir, name="candidates.jsonl"):
  lines = (workdir / name).read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines if line]


def kept(workdir):
  return [row for row in rows(workdir) if not row["reason"]]


def live(name):
  """The class itself, which the corpus was not made from."""
  module, _, label = name.rpartition(".")
  return getattr(importlib.import_module(module), label)


def live_defaults(function):
  parameters = inspect.signature(function).parameters.values()
  return {
    x.name: None if x.default is x.empty else x.default
    for x in parameters
    if x.name not in ("self", "cls")
    and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
  }


@pytest.mark.parametrize(
  "name",
  [
    "json.decoder.JSONDecoder",
    "json.decoder.JSONDecodeError",
    "email.header.Header",
    "http.cookiejar.CookieJar",
    "xml.sax.saxutils.XMLGenerator",
    "builtins.KeyError",
  ],
)
def test_documents_agree_with_the_interpreter(library, name):
  entity, value = library[1][name], live(name)
  assert entity.bases == tuple(
    f"{base.__module__}.{base.__qualname__}" for base in value.__bases__
  )
  public = {
    key
    for key, member in vars(value).items()
    if inspect.isfunction(member)
    and (key == "__init__" or not key.startswith("_"))
  }
  assert public <= {x.name for x in entity.functions}
  for key in public:
    shown = entity.function(key)
    wanted = live_defaults(vars(value)[key])
    assert list(shown.defaults) == list(wanted)
    for parameter, default in wanted.items():
      text = shown.defaults[parameter]
      if isinstance(default, (str, int, bytes)):
        module = importlib.import_module(entity.module)
        assert eval(text, vars(module)) == default  # a literal or a constant


def test_the_whole_standard_library_has_a_corpus():
  topics = list(itertools.islice(python_docs.documents(modules=("none",)), 300))
  names = [document.name for document in topics]
  assert "topic:with" in names and "builtins.KeyError" in names
  assert len(set(names)) == len(names) > 100


def some_chains():
  rng = random.Random(0)
  value = lambda: (rng.choice(("read", "x_1", "Handler")),)
  for _ in range(200):
    draw = lambda forms: rng.choice(sorted(forms))
    clues = tuple(PART(draw(questions.CLUES), value()) for _ in range(3))
    hops = []
    for _ in range(rng.randint(0, 3)):
      kind = draw(questions.HOPS)
      hops.append(PART(kind, value() if kind == "sibling" else ()))
    ask = draw(questions.ASKS)
    number = {"default": 2, "module": 0}.get(ask, 1)
    values = tuple(itertools.chain(*(value() for _ in range(number))))
    yield questions.Chain(
      clues=clues[: rng.randint(1, 3)],
      hops=tuple(hops),
      ask=PART(ask, values),
    )


def test_a_question_is_read_back():
  for chain in some_chains():
    assert questions.parse(questions.write(chain)) == chain
  for text in ("", "Who?", questions.write(chain) + " More?"):
    with pytest.raises(ValueError, match=r"question|none of"):
      questions.parse(text)


def test_kept_tasks_are_right_in_the_interpreter(workdir):
  """By the classes themselves, which neither builder nor verifier saw."""
  assert len(kept(workdir)) == CONFIG.num_tasks
  checked = 0
  for row in kept(workdir):
    document = row["evidence"][-1]["document"]
    ask, value = row["chain"]["ask"], live(document)
    if ask["kind"] == "module":
      assert value.__module__ == row["answer"]
    elif ask["kind"] == "default":
      function, parameter = ask["values"]
      default = live_defaults(getattr(value, function))[parameter]
      if isinstance(default, (str, int)):
        namespace = vars(importlib.import_module(value.__module__))
        assert eval(row["answer"], namespace) == default
    elif ask["kind"] == "last":
      parameters = live_defaults(getattr(value, ask["values"][0]))
      assert list(parameters)[-1] == row["answer"]
    else:
      assert ask["values"][0] in live_defaults(getattr(value, row["answer"]))
    checked += 1
    assert row["depth"] == len(row["chain"]["hops"])
    assert row["breadth"] == len(row["chain"]["clues"])
    assert set(row["answers"]) == set(answering.ANSWERERS)
    for answer in row["answers"].values():
      assert not search.is_right(answer, row)
  assert checked == CONFIG.num_tasks


def test_every_rejection_has_a_reason_and_its_record(workdir):
  rejected = [row for row in rows(workdir) if row["reason"]]
  rejected += [row for row in rows(workdir, "helpful.jsonl") if row["reason"]]
  recorded = rows(workdir, "rejections.jsonl")
  assert [x["id"] for x in recorded] == [x["id"] for x in rejected]
  reasons = {row["reason"] for row in recorded}
  assert any(reason.endswith(" answers it") for reason in reasons)
  assert "it is answered well without search" in reasons


def test_the_verifier_refuses_what_is_wrong(workdir, library):
  index, entities = library
  row = kept(workdir)[0]
  chain = questions.parse(row["question"])
  walk = lambda task: asyncio.run(verifying.walk(index, task, random.Random(1)))
  assert walk(row).calls[-1][0] == "submit_result"
  verifying.scan(entities, chain, row["answer"])
  with pytest.raises(constructing.Rejection, match="another answer"):
    walk(row | {"answer": "wrong"})
  with pytest.raises(constructing.Rejection, match="another answer"):
    verifying.scan(entities, chain, "wrong")
  vague = dataclasses.replace(chain, clues=(PART("methods", ("2",)),))
  with pytest.raises(constructing.Rejection, match="several classes fit"):
    verifying.scan(entities, vague, row["answer"])
  absent = dataclasses.replace(chain, clues=(PART("method", ("n0ne",)),))
  with pytest.raises(constructing.Rejection, match="no class fits"):
    verifying.scan(entities, absent, row["answer"])
  with pytest.raises(constructing.Rejection, match="finds 0 classes"):
    walk(row | {"question": questions.write(absent)})
  evidence = [{**row["evidence"][0], "line": "It is so."}]
  with pytest.raises(constructing.Rejection, match="a quoted line"):
    asyncio.run(verifying.check_evidence(index, evidence))


@pytest.mark.parametrize(
  ("candidate", "answer", "told"),
  [
    ("`None`", "None", "answers it"),
    ("decoder", "json.decoder", "may be right"),
    ("json.decoder.JSONDecoder", "json.decoder", "may be right"),
    ("0x10", "16", "may be right"),
    ("''", "b''", ""),
    ("17", "16", ""),
    ("", "16", ""),
  ],
)
def test_only_surely_wrong_answers_pass(candidate, answer, told):
  check = lambda: verifying.check_answers(answer, {"ann": candidate})
  if told:
    with pytest.raises(constructing.Rejection, match=f"ann.*{told}"):
      check()
  else:
    assert check() is None


def test_a_policy_that_knows_has_the_question_rejected(workdir, library):
  row = kept(workdir)[0]
  script = policies.replies(
    policies.call("submit_result", json.dumps({"answer_text": row["answer"]}))
  )
  knows = answering.policy_answerer(policies.ScriptedPolicy(script))
  assert asyncio.run(knows(row["question"], library[0])) == row["answer"]
  tail = [row["entity"]] * (1 + int(row["id"].split("-")[1]))
  again = pipeline.synthesize(
    CONFIG,
    str(workdir / campaign.CORPUS_FILE),
    tail,
    len(tail) - 1,
    {"knows": knows},
  )
  assert again["question"] == row["question"]
  assert again["reason"] == "knows answers it"


def test_a_run_goes_on_where_it_was(workdir, tmp_path):
  fewer = dataclasses.replace(CONFIG, num_tasks=2, num_helpful=7)
  campaign.run(fewer, tmp_path)
  campaign.run_helpful(fewer, tmp_path)
  for name in ("candidates.jsonl", "helpful.jsonl"):
    with (tmp_path / name).open("a") as file:
      file.write('{"id": "search-0000')
  campaign.run(CONFIG, tmp_path)
  campaign.run_helpful(CONFIG, tmp_path)
  for name in ("candidates.jsonl", "helpful.jsonl", "corpus.sqlite"):
    same = (tmp_path / name).read_bytes() == (workdir / name).read_bytes()
    assert same, name
  with pytest.raises(ValueError, match="was made with seed=0, not 1"):
    campaign.run(dataclasses.replace(CONFIG, seed=1), tmp_path)


def test_tables_hold_the_same_and_play_again(workdir, library):
  for name in ("tasks", "trajectories"):
    table = parquet.read_table(workdir / f"{name}.parquet").to_pylist()
    assert table == rows(workdir, f"{name}.jsonl")
  tasks = {row["id"]: row for row in rows(workdir, "tasks.jsonl")}
  trajectories = rows(workdir, "trajectories.jsonl")
  assert len(trajectories) == CONFIG.num_tasks
  for row in trajectories:
    messages = json.loads(row["messages"])
    assert chat.encode_messages(messages[:-1], "chat")
    assert messages[1]["content"] == tasks[row["id"]]["prompt"]
    environment = search.SearchEnvironment(library[0], tasks[row["id"]])
    assert asyncio.run(play(environment, messages)) == row["reward"] == 1.0


async def play(environment, messages):
  await environment.reset()
  for call, result in zip(messages[2::2], messages[3::2], strict=True):
    ((name, text),) = chat.tool_calls(call)
    step = await environment.step(
      protocol.ToolCall(name=name, arguments=json.loads(text))
    )
    assert step.observation == result["content"]
  return await environment.verify()


def test_search_helps_those_that_are_kept(workdir, library):
  tasks = [
    row for row in rows(workdir, "tasks.jsonl") if row["kind"] == "rubric"
  ]
  assert len(tasks) >= 10
  for row in tasks:
    row["rubric"] = json.loads(row["rubric"])
    scores = []
    for answer in json.loads(row["answers"]).values():
      environment = helpful.environment(library[0], row)
      asyncio.run(environment.reset())
      call = protocol.ToolCall(
        name="submit_result", arguments={"answer_text": answer}
      )
      asyncio.run(environment.step(call))
      scores.append(asyncio.run(environment.verify()))
    assert scores[1] - scores[0] >= CONFIG.least_gain
  reasons = {
    row["question"]: row["reason"] for row in rows(workdir, "helpful.jsonl")
  }
  small_talk = [text for text, _ in helpful._SMALL_TALK if text in reasons]
  assert small_talk
  for text in small_talk:
    assert reasons[text] == "it is answered well without search"


def test_the_offline_score():
  rubric = [
    helpful.Criterion(
      dimension="a", text="x", weight=3, phrases=("one", "two")
    ),
    helpful.Criterion(dimension="b", text="y", most_chars=12),
  ]
  score = lambda text: helpful.phrase_score("q", text, rubric)
  assert score("") == 0.0
  assert score("ONE and two more") == 0.75
  assert score("one \n two") == 1.0
  assert score("one") == (3 * 0.5 + 1) / 4
  assert helpful.load(json.loads(json.dumps(helpful.dump(rubric)))) == rubric
  with pytest.raises(ValueError, match="nothing that can be seen"):
    helpful.Criterion(dimension="a", text="x")


def test_existing_prompts_take_the_place_of_ours(workdir, tmp_path):
  rubric = [
    helpful.Criterion(dimension="a", text="x", phrases=("strict=True",))
  ]
  path = tmp_path / "prompts.jsonl"
  asked = ["`JSONDecoder` options?", "Hello!"]
  lines = [{"prompt": x, "rubric": helpful.dump(rubric)} for x in asked]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  (tmp_path / "corpus.sqlite").symlink_to(workdir / "corpus.sqlite")
  config = dataclasses.replace(CONFIG, prompts=str(path))
  campaign.run_helpful(config, tmp_path)
  found = rows(tmp_path, "helpful.jsonl")
  assert [row["question"] for row in found] == asked
  assert [row["reason"] for row in found] == ["", "search does not help enough"]
  assert found[0]["score_with"] == 1.0 and found[0]["score_without"] == 0.0
  for wrong in ("{}", '{"prompt": "a", "rubric": []}', '{"prompt": "a"}'):
    path.write_text(wrong)
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: no prompt"):
      helpful.read_prompts(path)


def test_the_report(workdir):
  found = export.report(workdir)
  assert found["tasks"] == CONFIG.num_tasks <= found["verified"]
  assert found["candidates"] == found["tasks"] + sum(
    bool(row["reason"]) for row in rows(workdir)
  )
  assert found["helpful_prompts"] == CONFIG.num_helpful
  assert set(found["baselines"]) == set(answering.ANSWERERS)


@pytest.mark.parametrize(
  ("field", "value"),
  [("num_tasks", 0), ("depths", ()), ("breadths", (0,)), ("least_gain", 2.0)],
)
def test_what_cannot_be_made(field, value):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(CONFIG, **{field: value})


def test_reading_what_is_no_class():
  assert reading.read("Module json\n") is None
  assert reading.classes("Class A of module b\n") == []
  with pytest.raises(constructing.Rejection, match="describes no class"):
    document = search_index.Document(name="x", title="x", text="x")
    asyncio.run(
      constructing.construct(
        Shelf(document), "x", depth=0, breadth=1, rng=random.Random(0)
      )
    )


class Shelf:
  """A browser of one document."""

  def __init__(self, document):
    self.document = document

  async def entity(self, name):
    assert name == self.document.name
    return reading.read(self.document.text)
