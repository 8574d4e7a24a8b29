"""Search questions that policies write, answer and verify."""

import dataclasses
import json

import pytest

from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis.search import authored
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import export
from dsv32_jax.agents.synthesis.search import helpful
from tests.support.authors import say

DOCUMENTS = [
  search_index.Document(
    name="lamp",
    title="Argos lamp",
    text="It burns oil.\nIt was made in Delft.\nIts maker is Mulder.\n",
  ),
  search_index.Document(
    name="mulder",
    title="Mulder",
    text="A maker of lamps.\nHe was born in Leiden in 1780.\n",
  ),
]
QUESTION = {
  "question": "A lamp made in Delft burns oil. Where was its maker born?",
  "answer": "Leiden",
  "evidence": [
    {"document": "lamp", "line": "It was made in Delft."},
    {"document": "lamp", "line": "It burns oil."},
    {"document": "mulder", "line": "He was born in Leiden"},
  ],
}
READING = [say("open", document="lamp"), say("open", document="mulder")]
LINE = {"document": "mulder", "line": "He was born in Leiden in 1780."}


def asking(*hand_ins, reading=READING):
  found = [{**QUESTION, **changes} for changes in hand_ins or ({},)]
  return policies.ScriptedPolicy(
    policies.replies(*reading, *(say("hand_in_question", **x) for x in found))
  )


def verifying(judge):
  """A verifier that judges by a function of an answer and of the pass."""
  passes = []

  def script(messages):
    text = messages[1]["content"].partition("Answers:\n")[2]
    passes.append(text)
    verdicts = []
    for line in text.splitlines():
      number, _, answer = line.partition(". ")
      verdict = judge(answer, len(passes))
      quote = LINE if verdict != "unsure" else {"document": "", "line": ""}
      verdicts.append({"number": int(number), "verdict": verdict, **quote})
    return say("hand_in_verdicts", verdicts=verdicts)

  return policies.ScriptedPolicy(script), passes


def truly(answer, number):
  del number
  return "right" if answer == "Leiden" else "wrong"


def answering(**answers):
  async def answer(text):
    return text

  return {
    name: lambda question, source, text=text: answer(text)
    for name, text in answers.items()
  }


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("index") / "given.sqlite"
  search_index.build(path, DOCUMENTS)
  return authored.SearchAuthoringConfig(
    num_tasks=1,
    max_candidates=1,
    corpus=str(path),
    most_mentions=1,  # "Mulder" is mentioned by two.
    depths=(1,),
    breadths=(2,),
    turns=9,
    passes=3,
  )


def made(config, workdir, constructor, answers=(), verifier=None):
  team = authored.Team(
    constructor=constructor,
    answerers=answering(**dict(answers)),
    verifier=verifier or verifying(truly)[0],
  )
  authored.run(config, workdir, lambda: team)
  (row,) = authoring.rows(workdir)
  return row


def test_a_question_is_kept_if_the_truth_alone_is_right(config, tmp_path):
  verifier, passes = verifying(truly)
  answers = {"ann": "Delft", "bob": "delft.", "cor": "", "dan": "1780"}
  row = made(config, tmp_path, asking(), answers, verifier)
  assert row["reason"] == "" and row["entity"] == "lamp"
  # All see each answer once, in orders that do not tell which is whose.
  assert len(passes) == 3 == len(row["verdicts"])
  for text in passes:
    shown = {line.partition(". ")[2] for line in text.splitlines()}
    assert shown == {"Leiden", "Delft", "1780"}
  export.export(tmp_path)
  (task,) = tables.read_jsonl(tmp_path / "tasks.jsonl")
  assert (task["answer"], task["depth"], task["breadth"]) == ("Leiden", 1, 2)
  assert list(tables.read_jsonl(tmp_path / "rejections.jsonl")) == []
  assert export.report(tmp_path)["tasks"] == 1


@pytest.mark.parametrize(
  ("hand_in", "told"),
  [
    ({"question": "Was he born in Leiden?"}, "the question tells its answer"),
    ({"question": "Where was the Argos lamp's maker born?"}, "names what it"),
    ({"answer": "''"}, "an answer has 1 to"),
    ({"answer": "Utrecht"}, "last line of the evidence lacks the answer"),
    ({"evidence": QUESTION["evidence"][:2]}, "1 documents are quoted, not 2"),
    ({"evidence": QUESTION["evidence"][1:]}, "1 lines describe what it starts"),
    (
      {"evidence": [*QUESTION["evidence"], {"document": "x", "line": "y"}]},
      "'x' was quoted and not opened",
    ),
    (
      {"evidence": [{"document": "lamp", "line": "It is new."}] * 3},
      "1 documents are quoted",
    ),
    (
      {
        "evidence": [
          {"document": "lamp", "line": "It is new."},
          *QUESTION["evidence"],
        ]
      },
      "no line of 'lamp' is 'It is new.'",
    ),
  ],
)
def test_what_is_refused_can_be_mended(config, tmp_path, hand_in, told):
  row = made(config, tmp_path, asking(hand_in, {}), {"ann": "Delft"})
  assert row["reason"] == ""
  (refusal,) = row["refusals"]
  assert told in refusal


def test_what_was_not_read_is_no_evidence(config, tmp_path):
  row = made(config, tmp_path, asking(*[{}] * 9, reading=[]))
  assert row["reason"].startswith("nothing was handed in")
  assert "quoted and not opened" in row["refusals"][0]


@pytest.mark.parametrize(
  ("answers", "judge", "reason"),
  [
    ({"ann": "leiden"}, truly, "ann answers it"),
    ({"ann": "x.Leiden"}, truly, "ann's answer may be right"),
    ({"ann": "Delft"}, lambda *_: "right", "the verification: nothing was"),
    ({"ann": "Delft"}, lambda *_: "wrong", "the truth is judged wrong in pass"),
    (
      {"ann": "Delft"},
      lambda answer, n: "unsure" if n == 2 else truly(answer, n),
      "the truth is judged unsure in pass 2",
    ),
    (
      {"ann": "Delft"},
      lambda answer, n: "right" if answer == "Leiden" else "unsure",
      "a candidate's answer is judged unsure",
    ),
  ],
)
def test_what_is_not_kept_says_why(config, tmp_path, answers, judge, reason):
  verifier, _ = verifying(judge)
  row = made(config, tmp_path, asking(), answers, verifier)
  assert row["status"] == "rejected" and row["reason"].startswith(reason)
  export.export(tmp_path)
  (told,) = tables.read_jsonl(tmp_path / "rejections.jsonl")
  assert told["reason"] == row["reason"]


def test_policies_that_misbehave(config, tmp_path):
  for number, script in enumerate(
    (
      [{"role": "assistant", "content": "Leiden, I think."}],
      [policies.call("open", "{"), policies.call("fly", "{}")] * 9,
      [say("hand_in_question", question="x")] * 9,
      [say("search", query="lamp", page=10**9)] * 9,
    )
  ):
    policy = policies.ScriptedPolicy(policies.replies(*script))
    folder = tmp_path / str(number)
    folder.mkdir()
    row = made(config, folder, policy)
    assert row["reason"].startswith("nothing was handed in")


def test_a_killed_run_makes_no_row_twice(config, tmp_path):
  row = made(config, tmp_path, asking(), {"ann": "Delft"})
  path = tmp_path / authoring.CANDIDATES_FILE
  whole = path.read_bytes()
  path.write_bytes(whole + whole[:40])
  more = dataclasses.replace(config, num_tasks=2, max_candidates=2)
  team = authored.Team(
    constructor=asking(), answerers={}, verifier=verifying(truly)[0]
  )
  authored.run(more, tmp_path, lambda: team)
  rows = authoring.rows(tmp_path)
  assert [x["id"] for x in rows] == ["search-000000", "search-000001"]
  assert rows[0] == row


def test_helpful_prompts_are_judged_by_whoever_is_given(config, tmp_path):
  rubric = [helpful.Criterion(dimension="a", text="The town.", phrases=("x",))]
  path = tmp_path / "prompts.jsonl"
  lines = [
    {"prompt": text, "rubric": helpful.dump(rubric)}
    for text in ("Where was Mulder born?", "Say hello.")
  ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  given = dataclasses.replace(config, prompts=str(path), num_helpful=2)
  answers = answering(plain="No idea.", searching="In Leiden.")
  made(given, tmp_path, asking(), {"ann": "Delft"})
  campaign.run_helpful(
    given,
    tmp_path,
    plain=answers["plain"],
    searching=answers["searching"],
    scorer=lambda question, answer, rubric: float(
      "Mulder" in question and "Leiden" in answer
    ),
  )
  rows = tables.read_jsonl(tmp_path / "helpful.jsonl")
  assert [row["reason"] for row in rows] == ["", "search does not help enough"]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("passes", 0),
    ("depths", (9,)),
    ("breadths", ()),
    ("least_gain", 0.0),
    ("turns", 0),
    ("seconds", 0.0),
  ],
)
def test_bad_numbers_are_told(config, field, value):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(config, **{field: value})
