"""The web server: a socket, uvicorn, and an orderly end."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from relax.errors import ConfigError
from relax.serving.endpoint import Endpoint

GRACE_S = 5  # for answers under way to say that the server shuts down


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Binds a socket; port 0: a free one.

    Raises:
      ConfigError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ConfigError(
            f"host {host} and port {port} must be an address that is free here: {error}."
        ) from error
    return sock


def address(sock: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process by the signal."""

    def capture_signals(self):
        return contextlib.nullcontext()


def _server(app) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
    )


def run(app, endpoint: Endpoint, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until Ctrl-C or SIGTERM; then answers under way end with an error.

    Args:
      ready: called when the server accepts requests.
    """

    async def main() -> None:
        server, loop = _server(app), asyncio.get_running_loop()

        def stop() -> None:
            server.should_exit = True
            threading.Thread(target=endpoint.worker.close, daemon=True).start()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not (server.started or task.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await task

    asyncio.run(main())


@contextlib.contextmanager
def running(app, sock: socket.socket) -> Iterator[str]:
    """Serves from a thread within `with running(...) as url`."""
    server = _server(app)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[sock])), name="relax-http", daemon=True
    )
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield address(sock)
    finally:
        server.should_exit = True
        thread.join()
