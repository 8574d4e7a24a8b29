"""The gallery in a real browser: steps, keys, and text that would be markup."""

import json
import pathlib
import shutil
import subprocess
import sys

from playwright import sync_api
import pytest

from experiments import gallery_page

ROOT = pathlib.Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="x()">'


def call(name, arguments):
  return {
    "type": "function",
    "function": {"name": name, "arguments": json.dumps(arguments)},
  }


def episodes():
  """A good one, and one that tries to break out of the page."""
  tool = {"type": "function", "function": {"name": "search", "parameters": {}}}
  yield {
    "id": "first",
    "reward": 1.0,
    "finish": "done",
    "num_turns": 2,
    "seconds": 1.26,
    "messages": [
      {"role": "system", "content": "Be quick.", "tools": [tool]},
      {"role": "user", "content": "What glows?"},
      {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I had better look.",
        "tool_calls": [call("search", {"query": "glow"})],
      },
      {"role": "tool", "content": "bulbs\n" + "x" * 3000},
      {"role": "assistant", "content": "A bulb.", "reasoning_content": "So."},
    ],
  }
  yield {
    "id": HOSTILE,
    "reward": 0.0,
    "finish": "crashed",
    "error": HOSTILE,
    "messages": json.dumps(
      [
        {"role": HOSTILE, "content": HOSTILE},
        {
          "role": "assistant",
          "content": HOSTILE,
          "reasoning_content": HOSTILE,
          "malformed": HOSTILE,
          "tool_calls": [call(HOSTILE, {HOSTILE: HOSTILE})],
        },
        {"role": "tool", "content": "error: " + HOSTILE + "\u2028\ud800"},
      ]
    ),
  }


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.gallery", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gallery")
  lines = [json.dumps(episode) for episode in episodes()]
  (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n")
  output = folder / "page.html"
  done = run(f"--episodes={folder}/episodes.jsonl", f"--output={output}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("2 episodes: ")
  assert HOSTILE not in output.read_text()
  return output.as_uri()


@pytest.fixture(scope="module")
def browser():
  path = next(filter(None, map(shutil.which, BROWSERS)), None)
  if path is None:
    pytest.skip(f"none of {', '.join(BROWSERS)} is on this machine")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=path, args=["--no-sandbox"]
    )
    yield browser
    browser.close()


@pytest.fixture
def page(browser, address):
  page = browser.new_page()
  page.problems = []
  page.on("pageerror", lambda error: page.problems.append(str(error)))
  page.on("console", lambda message: page.problems.append(message.text))
  page.on("request", lambda request: page.problems.append(request.url))
  page.goto(address)
  assert page.problems.pop(0) == address  # the page itself, and nothing else
  yield page
  assert page.problems == []
  page.close()


def visible(page):
  found = page.locator("article")
  return [
    found.nth(place).inner_text()
    for place in range(found.count())
    if found.nth(place).is_visible()
  ]


def test_keys_step_through_an_episode(page):
  assert len(visible(page)) == 1 and "Be quick." in visible(page)[0]
  assert page.locator("#reward").inner_text() == ""
  page.keyboard.press("ArrowRight")
  page.keyboard.press("ArrowRight")
  assert page.locator("#count").inner_text() == "3 of 5"
  assert "I had better look." in visible(page)[2]
  assert '"query": "glow"' in visible(page)[2]
  page.keyboard.press("ArrowLeft")
  assert len(visible(page)) == 2
  page.keyboard.press("End")
  assert len(visible(page)) == 5
  assert page.locator("#reward").inner_text() == "reward 1"
  assert page.locator("#facts").inner_text() == (
    "ended done, turns 2, seconds 1.3"
  )
  page.keyboard.press("Home")
  assert len(visible(page)) == 1
  page.keyboard.press("ArrowLeft")
  assert len(visible(page)) == 1


def test_the_slider_and_the_buttons(page):
  page.locator("#step").fill("4")
  assert len(visible(page)) == 4
  assert "3006 characters" in visible(page)[3]
  page.locator("#on").click()
  assert len(visible(page)) == 5
  page.locator("#back").click()
  assert page.locator("#step").input_value() == "4"


def test_thinking_is_dimmer_than_what_is_said(page):
  page.keyboard.press("End")
  style = "e => [getComputedStyle(e).fontStyle, getComputedStyle(e).opacity]"
  thinking = page.locator(".thinking").last.evaluate(style)
  said = page.locator(".text").last.evaluate(style)
  assert thinking[0] == "italic" and float(thinking[1]) < float(said[1]) == 1


def test_what_was_written_stays_text(page):
  page.keyboard.press("ArrowDown")
  page.keyboard.press("End")
  shown = visible(page)
  assert len(shown) == 3
  assert shown[0].count(HOSTILE) >= 1
  assert shown[1].count(HOSTILE) >= 4
  assert page.evaluate("window.hacked") is None
  assert page.locator("img").count() == 0
  assert page.locator("script").count() == 2
  assert HOSTILE in page.locator("#facts").inner_text()
  assert page.locator("#reward").inner_text() == "reward 0"


def test_an_address_opens_an_episode_at_a_step(browser, address):
  page = browser.new_page()
  page.goto(f"{address}#1.3")
  assert len(visible(page)) == 3
  page.evaluate("location.hash = '#2.2'")
  page.wait_for_function("document.querySelectorAll('article').length == 3")
  assert len(visible(page)) == 2
  page.evaluate("location.hash = '#9.9'")
  page.wait_for_function("document.querySelectorAll('article').length == 5")
  assert len(visible(page)) == 5
  page.close()


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("", "has no episodes"),
    ("{", ":1: "),
    ('{"id": "a", "reward": 1}', ":1 is no episode: it has no messages"),
    ('{"id": 1, "reward": 1, "messages": [{}]}', "id=1 is no text"),
    ('{"id": "a", "reward": NaN, "messages": [{}]}', "reward=nan"),
    ('{"id": "a", "reward": 1, "messages": [1]}', ":1 is no episode"),
    (
      '{"id": "a", "reward": 1, "messages": [{"tool_calls": [{}]}]}',
      ":1 is no episode: 'function'",
    ),
  ],
)
def test_what_is_no_episode(tmp_path, text, told):
  path = tmp_path / "episodes.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"episodes\.jsonl") as raised:
    gallery_page.read(path, 10)
  assert told in str(raised.value)


def test_a_mistake_is_one_line(tmp_path):
  output = tmp_path / "page.html"
  done = run(f"--episodes={tmp_path}/none.jsonl", f"--output={output}")
  assert done.returncode == 1
  assert "none.jsonl" in done.stderr and done.stderr.count("\n") == 1
  assert not output.exists()
