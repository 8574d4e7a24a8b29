"""An ASGI application behind a real socket, in a thread of the test."""

import contextlib
import socket
import threading
import time

import uvicorn

from dsv32_jax.generation.server import connection


@contextlib.contextmanager
def serving(app, http=connection.Connection):
  """Yields the address of the application; its end is waited for."""
  with socket.create_server(("127.0.0.1", 0)) as bound:
    port = bound.getsockname()[1]
    config = uvicorn.Config(
      app, http=http, ws="none", log_level="critical", lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
      while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
      yield f"http://127.0.0.1:{port}"
    finally:
      server.should_exit = True
      thread.join(60)
    assert not thread.is_alive()
