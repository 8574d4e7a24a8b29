"""Text from a checkpoint: a single answer, or a chat in the terminal.

python -m experiments.generate --hf_checkpoint=DIR --prompt='Hello'
python -m experiments.generate --hf_checkpoint=DIR < question.txt
python -m experiments.generate --hf_checkpoint=DIR --mode=thinking

Without a prompt, and at a terminal, it is a chat: Ctrl-C ends an answer, Ctrl-D
the program. Thinking is dimmed; where the output is no terminal, thinking and
figures go to the error output.
"""

import contextlib
import readline  # edits the lines of input()
import signal
import sys

from absl import flags

from dsv32_jax.agents import conversation as conversations
from dsv32_jax.generation import requests
from dsv32_jax.generation import terminal
from dsv32_jax.generation.server import chat_stream
from dsv32_jax.generation.server import replies
from experiments import common
from experiments import local_model

_PROMPT = flags.DEFINE_string(
  "prompt", None, "What to answer; none: the standard input, or a chat."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "chat",
  ["chat", "thinking", "completion"],
  "Answer a message, think before it, or go on with the text as it stands.",
)
_SYSTEM = flags.DEFINE_string("system", None, "System message of a chat.")
_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "Of an answer; none: what is left of --max_length."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0: the likeliest token.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Nucleus to draw from.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Likeliest tokens to draw from.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Least share of the likeliest.")
_SEED = flags.DEFINE_integer("seed", None, "Of the draws; none: a new one.")


class Session:
  """A conversation, or in completion mode texts apart from each other."""

  def __init__(self, model: local_model.LocalModel):
    self._model, self._num_answers = model, 0
    self._printer = terminal.Printer(sys.stdout, sys.stderr)
    mode = _MODE.value
    self._thinking = mode == "thinking"
    self._conversation = None
    if mode != "completion":
      self._conversation = conversations.Conversation(model.tokenizer, mode)
      if _SYSTEM.value is not None:
        self._conversation.add({"role": "system", "content": _SYSTEM.value})

  def answer(self, text: str) -> terminal.Answer:
    """Shows an answer; where it cannot be, the conversation is as it was."""
    if self._conversation is None:
      tokenizer = self._model.tokenizer
      return self._draw([tokenizer.bos_id, *tokenizer.encode(text)], None)
    conversation = self._conversation.fork()
    conversation.add({"role": "user", "content": text})
    drawn = self._draw(
      conversation.prompt_ids(),
      chat_stream.ChatStream(thinking=self._thinking, with_tools=False),
    )
    conversation.add_completion(drawn.token_ids, drawn.logprobs)
    self._conversation = conversation
    return drawn

  def _draw(self, prompt_ids, chat) -> terminal.Answer:
    most = _TOKENS.value
    if most is None:
      most = max(1, self._model.max_length - len(prompt_ids))
    sampling = requests.SamplingParameters(
      max_tokens=most,
      temperature=_TEMPERATURE.value,
      top_p=_TOP_P.value,
      top_k=_TOP_K.value,
      min_p=_MIN_P.value,
      seed=None if _SEED.value is None else _SEED.value + self._num_answers,
      # Of padded embeddings, which stand for nothing.
      banned_ids=self._model.unused_ids,
    )
    self._num_answers += 1
    with interruptible() as is_stopped:
      drawn = terminal.answer(
        self._model.engine,
        requests.Request(prompt_ids=prompt_ids, sampling=sampling),
        replies.Choice(self._model.tokenizer, (), chat),
        self._printer,
        is_stopped,
      )
    self._printer.note(drawn.figures())
    return drawn


@contextlib.contextmanager
def interruptible():
  """Yields a function that says whether Ctrl-C was pressed.

  It must not come in the middle of a step.
  """
  pressed = []
  before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
  try:
    yield lambda: bool(pressed)
  finally:
    signal.signal(signal.SIGINT, before)


def chat(session: Session) -> None:
  """Answers line by line until the input ends."""
  # Its codes would stand where the answer begins.
  readline.parse_and_bind("set enable-bracketed-paste off")
  while True:
    try:
      line = input("> ")
      if line.strip():
        session.answer(line)
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()
    except ValueError as error:
      sys.stderr.write(f"error: {error}\n")


def main(argv):
  del argv
  text = _PROMPT.value
  if text is None and not sys.stdin.isatty():
    text = sys.stdin.read()
  if text is not None and not text.strip():
    raise ValueError("--prompt or the standard input: the text is empty")
  session = Session(local_model.load())
  if text is None:
    chat(session)
    return 0
  stopped = session.answer(text).finish_reason == "cancelled"
  return 128 + signal.SIGINT if stopped else 0


if __name__ == "__main__":
  common.run(main)
