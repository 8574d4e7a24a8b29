"""experiments.generate: one answer, standard input, a chat at a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from experiments import common
from experiments import generate
from experiments import local_model
from tests.support import served_model

FIGURES = re.compile(
  r"\[\d+ prompt tokens, first token after [\d.]+ s; (\d+) tokens in [\d.]+ s,"
  r" [\d.]+ tokens/s\]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate") / "tiny"
  folder.mkdir()
  served_model.save_checkpoint(folder)
  return folder


def command(folder, *flags):
  return [
    *(sys.executable, "-m", "experiments.generate", "--dtype=float32"),
    *(f"--checkpoint={folder / 'checkpoints'}", "--page_size=8"),
    *("--prefill_chunk=32", "--max_length=128", "--seed=1", *flags),
  ]


def one_shot(folder, *flags, stdin=None, num_devices=1):
  done = subprocess.run(
    command(folder, *flags),
    input=stdin,
    check=False,
    capture_output=True,
    env=served_model.environment(num_devices),
  )
  return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_answer_by_flag_and_by_standard_input(folder):
  flags = ("--mode=completion", "--max_tokens=20")
  code, text, notes = one_shot(folder, "--prompt=hi there", *flags)
  assert code == 0 and len(text) > 10 and text.endswith("\n")
  assert int(FIGURES.fullmatch(notes.strip()).group(1)) == 20
  assert "\x1b" not in notes
  code, again, _ = one_shot(folder, *flags, stdin=b"hi there")
  assert code == 0 and again == text
  # A chat with thinking that is cut off has no answer, but thoughts.
  flags = ("--mode=thinking", "--max_tokens=20", "--prompt=hi there")
  code, text, notes = one_shot(folder, *flags)
  assert code == 0 and text == "\n"
  thoughts, figures = notes.split("\n\n[")
  assert len(thoughts) > 10 and FIGURES.fullmatch("[" + figures.strip())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mesh_and_drafts_change_no_token(folder):
  flags = ("--mode=completion", "--max_tokens=20", "--prompt=hi there")
  flags = (*flags, "--max_length=40")
  _, text, _ = one_shot(folder, *flags)
  flags = (*flags, "--mesh=expert:2", "--speculate")
  code, other, notes = one_shot(folder, *flags, num_devices=2)
  assert code == 0, notes
  assert other == text


@pytest.mark.parametrize(
  "sizes", [["expert"], ["expert:x"], ["x:1"], ["fsdp:1", "fsdp:2"], ["data:3"]]
)
def test_what_is_no_mesh_is_told(sizes):
  with pytest.raises(ValueError, match="mesh"):
    local_model.make_mesh(sizes)


class Terminal:
  """A program at a terminal of its own, and what it shows there."""

  def __init__(self, arguments):
    self._end, theirs = pty.openpty()
    self.shown = ""
    self._process = subprocess.Popen(
      # What runs in a shell's background hands on that interrupts are ignored.
      ["env", "--default-signal=INT", *arguments],
      stdin=theirs,
      stdout=theirs,
      stderr=theirs,
      env={**served_model.environment(), "TERM": "dumb"},
      start_new_session=True,
    )
    os.close(theirs)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._process.poll() is None:
      self._process.kill()
    self._process.wait(60)
    os.close(self._end)

  def until(self, pattern, meanwhile=lambda: None):
    """Reads on until a pattern was shown; returns what came with it.

    Calls `meanwhile` first and whenever nothing was shown for five seconds.
    """
    deadline = time.monotonic() + 400
    meanwhile()
    while not (found := re.search(pattern, self.shown, re.DOTALL)):
      assert time.monotonic() < deadline, self.shown
      if select.select([self._end], [], [], 5)[0]:
        self.shown += os.read(self._end, 4096).decode("utf-8", "replace")
      else:
        meanwhile()
    part = self.shown[: found.end()]
    self.shown = self.shown[found.end() :]
    return part

  def write(self, text):
    os.write(self._end, text.encode())

  def interrupt(self):
    self._process.send_signal(signal.SIGINT)

  def wait(self):
    return self._process.wait(120)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chat_at_a_terminal(folder):
  flags = ("--mode=thinking", "--max_tokens=25", "--system=hi")
  with Terminal(command(folder, *flags)) as shown:
    shown.until("> $")
    shown.write("hi there\n")
    said = shown.until(r"\[.*tokens/s\]\x1b\[0m\r\n> $")
    # Dimmed thoughts, plain again, dimmed figures; nothing else moves it.
    assert re.findall(r"\x1b[^m]*m", said) == ["\x1b[2m", "\x1b[0m"] * 2
    assert int(FIGURES.search(said).group(1)) == 25
    shown.write("\n")
    shown.until("> $")
    shown.write("x9 " * 70 + "\n")
    assert "exceed max_length=128" in shown.until("error: .*> $")
    # The question that was too long is not part of it.
    shown.write("what is it?\n")
    prompts = re.compile(r"\[(\d+) prompt tokens")
    first, then = (
      int(prompts.search(text).group(1))
      for text in (said, shown.until(r"tokens/s\].*> $"))
    )
    assert first < then < 2 * first + 25
    shown.write("\x04")
    assert shown.wait() == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_ends_an_answer_and_not_the_chat(folder):
  flags = ("--mode=thinking", "--max_length=250")
  with Terminal(command(folder, *flags)) as shown:
    shown.until("> $")
    shown.write("hi there\n")
    shown.until(r"\x1b\[2m.")
    shown.interrupt()
    said = shown.until(r"tokens/s\].*> $")
    assert int(FIGURES.search(said).group(1)) < 230
    # One that comes between the prompt and the wait for a key is not noticed.
    shown.until("> $", meanwhile=shown.interrupt)
    shown.write("\x04")
    assert shown.wait() == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_single_answer_that_is_stopped_is_no_success(folder):
  flags = ("--mode=thinking", "--max_length=250", "--prompt=hi")
  with Terminal(command(folder, *flags)) as shown:
    shown.until(r"\x1b\[2m.")
    shown.interrupt()
    shown.until(r"tokens/s\]")
    assert shown.wait() == 130


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--prompt= "], "the text is empty"),
    (["--prompt=hi"], "give one of --hf_checkpoint"),
    (["--prompt=hi", "--checkpoint=/nowhere/checkpoints"], "tokenizer.json"),
  ],
)
def test_mistakes_are_told(flags, message):
  common.parse_flags(flags)
  with pytest.raises(ValueError, match=message):
    generate.main([])
