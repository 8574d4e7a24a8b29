"""Search over a local index: ranking, pages, hostile queries, rewards."""

import asyncio
import json

import pytest

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index

LONG = "".join(f"line {n} of the long text\n" for n in range(400))
DOCUMENTS = [
  search_index.Document(
    name="lamps", title="Lamps", text="A lamp has a bulb.\nKeep it dry.\n"
  ),
  search_index.Document(
    name="bulbs", title="Bulbs", text="A bulb glows.\nA tulip has a bulb too.\n"
  ),
  search_index.Document(name="long", title="Length", text=LONG + "needle\n"),
  *(
    search_index.Document(name=f"n{n}", title=f"Note {n}", text="common word\n")
    for n in range(25)
  ),
]
TASK = {
  "id": "t",
  "question": "What glows?",
  "answer": "A bulb",
  "aliases": ["bulb"],
}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  path = tmp_path_factory.mktemp("index") / "corpus.sqlite"
  identity = search_index.build(path, DOCUMENTS)
  source = search_index.LocalIndex(path)
  assert source.identity == identity
  yield source
  source.close()


def call(environment, name, **arguments):
  step = asyncio.run(
    environment.step(protocol.ToolCall(name=name, arguments=arguments))
  )
  return step.observation


def begun(index, task=TASK, **options):
  environment = search.SearchEnvironment(index, task, **options)
  asyncio.run(environment.reset())
  return environment


def names(index, query, **page):
  page = {"offset": 0, "count": 10} | page
  return [hit.name for hit in index.search_now(query, **page)]


def test_titles_and_phrases_rank_first(index):
  assert names(index, "bulb")[0] == "bulbs"
  assert names(index, '"tulip has"') == ["bulbs"]
  assert names(index, "tulip has needle")[0] == "bulbs"
  assert names(index, "nowhere") == []


def test_search_agrees_with_a_scan(index):
  """Which documents hold any of the words, found otherwise."""
  for query in ("glows", "dry needle", "common", "line 7"):
    words = set(query.split())
    wanted = {
      document.name
      for document in DOCUMENTS
      if words & set((document.text + document.title).lower().split())
      or words & set(document.text.replace(".", "").lower().split())
    }
    assert set(names(index, query, count=100)) == wanted


def test_pages_are_the_whole(index):
  whole = names(index, "common", count=100)
  assert len(whole) == 25
  paged = [
    name
    for offset in range(0, 30, 10)
    for name in names(index, "common", offset=offset)
  ]
  assert paged == whole


@pytest.mark.parametrize(
  "query",
  ['bulb" OR', "bulb NEAR(", "a.bulb*", "bulb\0x", "bulb \ud800", "^bulb"],
)
def test_a_query_is_words_and_never_syntax(index, query):
  assert "bulbs" in names(index, query)


@pytest.mark.parametrize("query", ["", '"', " ** ", "-", "w " * 3 + '""'])
def test_a_query_without_words(index, query):
  if "w" in query:
    assert names(index, query) == []
  else:
    with pytest.raises(tools.ToolError, match="no words"):
      names(index, query)


def test_too_many_words_are_refused(index):
  with pytest.raises(tools.ToolError, match="more than 64"):
    names(index, " ".join(f"w{n}" for n in range(65)))


@pytest.mark.parametrize("text", ["", "a\n", "x" * 99, LONG, "no end\nhere"])
def test_pieces_are_the_text(text):
  pieces = search_index.split(text, 40)
  assert "".join(pieces) == text
  assert all(len(piece) <= 40 for piece in pieces) and pieces


def test_open_and_find_agree_on_pages(index):
  environment = begun(index)
  found = call(environment, "find", document="long", text="NEEDLE")
  assert found.splitlines()[0] == "1 lines hold it"
  page = int(found.splitlines()[1].split()[1].rstrip(":"))
  assert "needle" in call(environment, "open", document="long", page=page)
  assert "needle" not in call(environment, "open", document="long")
  told = call(environment, "open", document="long", page=page + 1)
  assert told == f"error: the document has {page} pages"
  many = call(environment, "find", document="long", text="line", page=2)
  assert many.splitlines()[0] == "400 lines hold it"
  assert many.splitlines()[1].endswith("line 20 of the long text")


@pytest.mark.parametrize(
  ("name", "arguments", "told"),
  [
    ("open", {"document": "no"}, "no document"),
    ("open", {"document": "lamps", "page": 0}, "minimum"),
    ("open", {"document": "lamps", "page": True}, "integer"),
    ("find", {"document": "lamps", "text": " "}, "empty"),
    ("search", {"query": "bulb", "site": "x"}, "site"),
    ("search", {}, "query"),
    ("delete", {}, "no tool"),
    ("submit_result", {"answer_text": "x" * 20_001}, "more than 20000"),
  ],
)
def test_what_is_wrong_is_told(index, name, arguments, told):
  environment = begun(index)
  assert call(environment, name, **arguments).startswith("error: ")
  assert told in call(environment, name, **arguments)
  assert asyncio.run(environment.verify()) == 0.0


@pytest.mark.parametrize(
  ("answer", "reward"),
  [
    ("a bulb", 1.0),
    ("'Bulb'.", 1.0),
    ("  A \n BULB ", 1.0),
    ("a tulip bulb", 0.0),
    ("", 0.0),
  ],
)
def test_rewards(index, answer, reward):
  environment = begun(index)
  call(environment, "submit_result", answer_text=answer)
  assert asyncio.run(environment.verify()) == reward


def test_a_scorer_stands_in_for_the_answer(index):
  task = {"id": "t", "question": "Why?"}
  environment = begun(index, task, scorer=lambda q, a: 0.25 * (q == "Why?"))
  assert asyncio.run(environment.verify()) == 0.0
  call(environment, "submit_result", answer_text="because")
  assert asyncio.run(environment.verify()) == 0.25
  with pytest.raises(ValueError, match="neither an answer nor a scorer"):
    begun(index, task)


def test_snapshots_go_back(index):
  environment = begun(index)
  call(environment, "search", query="bulb")
  snapshot = json.loads(json.dumps(environment.snapshot()))
  call(environment, "submit_result", answer_text="a bulb")
  with pytest.raises(RuntimeError, match="done"):
    call(environment, "search", query="bulb")
  other = search.SearchEnvironment(index, TASK)
  with pytest.raises(RuntimeError, match="no episode"):
    other.snapshot()
  asyncio.run(other.restore(snapshot))
  assert other.snapshot() == snapshot
  call(other, "submit_result", answer_text="a bulb")
  assert asyncio.run(other.verify()) == 1.0
  with pytest.raises(ValueError, match="snapshot"):
    asyncio.run(other.restore(snapshot | {"task": "u"}))


def test_an_episode_ends_after_its_steps(index):
  limits = search.SearchLimits(max_steps=2)
  environment = begun(index, limits=limits)
  step = protocol.ToolCall(name="search", arguments={"query": "bulb"})
  assert not asyncio.run(environment.step(step)).done
  assert asyncio.run(environment.step(step)).done
  with pytest.raises(ValueError, match="hits=0"):
    search.SearchLimits(hits=0)


def test_an_episode_through_the_loop(index):
  script = policies.replies(
    policies.call("search", '{"query": "glows"}', reasoning="look"),
    policies.call("open", '{"document": "bulbs"}', reasoning="read"),
    policies.call("submit_result", '{"answer_text": "bulb"}', reasoning="done"),
  )
  episode = asyncio.run(
    loop.run_episode(
      policies.ScriptedPolicy(script),
      lambda: search.SearchEnvironment(index, TASK),
      episode_id="e",
    )
  )
  assert (episode.result.finish, episode.result.reward) == ("done", 1.0)
  assert "A bulb glows." in episode.result.messages[5]["content"]


def test_another_corpus_is_refused(index):
  with pytest.raises(ValueError, match="its corpus is"):
    search.SearchEnvironment(index, TASK | {"corpus": "0" * 64})


def test_what_is_no_index(tmp_path):
  path = tmp_path / "corpus.sqlite"
  with pytest.raises(ValueError, match="is no index"):
    search_index.LocalIndex(path)
  path.write_bytes(b"no database")
  with pytest.raises(ValueError, match="is no index"):
    search_index.LocalIndex(path)
  with pytest.raises(ValueError, match="at least one"):
    search_index.build(path, [])
  with pytest.raises(ValueError, match="two documents are named 'lamps'"):
    search_index.build(path, DOCUMENTS[:1] * 2)
  assert path.read_bytes() == b"no database"
