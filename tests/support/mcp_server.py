"""A server of the Model Context Protocol over stdin and stdout, for tests."""

import os
import sys
import time

from mcp.server import MCPServer
from mcp.server.mcpserver import exceptions

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def add_note(text: str) -> str:
  """Keeps a note; says how many there are."""
  notes.append(text)
  return f"{len(notes)} notes"


@server.tool()
def read_notes(first: int = 0) -> list[str]:
  """Returns the notes from a number on."""
  if first > len(notes):
    raise exceptions.ToolError("there are not so many notes")
  return notes[first:]


@server.tool()
def nap(seconds: float) -> str:
  """Sleeps."""
  time.sleep(seconds)
  return "awake"


@server.tool()
def leave() -> str:
  """Ends the server."""
  os._exit(3)


if __name__ == "__main__":
  with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\n")
  server.run("stdio")
