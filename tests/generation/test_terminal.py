"""What a terminal and a file get to see of an answer."""

import io

from dsv32_jax.generation import terminal
from dsv32_jax.generation.server import chat_stream


class Screen(io.StringIO):
  """A terminal, as far as a program can tell."""

  def isatty(self):
    return True


DELTAS = [
  chat_stream.Delta(reasoning="I "),
  chat_stream.Delta(reasoning="think"),
  chat_stream.Delta(reasoning=".", content="So\n"),
  chat_stream.Delta(content="\x1b[2J\tbe\r it\x9b"),
]


def show(output, notes):
  printer = terminal.Printer(output, notes)
  for delta in DELTAS:
    printer.show(delta)
  printer.end()
  printer.note("note")
  return output.getvalue(), notes.getvalue()


def test_a_terminal_sees_dimmed_thoughts_and_is_not_controlled():
  shown, notes = show(Screen(), Screen())
  safe = "\ufffd[2J\tbe\ufffd it\ufffd"
  assert shown == f"\x1b[2mI think.\x1b[0m\n\nSo\n{safe}\n"
  assert notes == "\x1b[2mnote\x1b[0m\n"


def test_a_file_gets_the_answer_as_it_is():
  answer = "So\n\x1b[2J\tbe\r it\x9b\n"
  assert show(io.StringIO(), io.StringIO()) == (
    answer,
    "I think.\n\nnote\n",
  )
  assert show(io.StringIO(), Screen()) == (
    answer,
    "\x1b[2mI think.\x1b[0m\n\n\x1b[2mnote\x1b[0m\n",
  )


def test_thoughts_that_are_cut_off_do_not_dim_what_follows():
  screen = Screen()
  printer = terminal.Printer(screen, screen)
  printer.show(DELTAS[0])
  printer.end()
  assert screen.getvalue() == "\x1b[2mI \x1b[0m\n\n\n"
