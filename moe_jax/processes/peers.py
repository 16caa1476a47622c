"""Connections between the processes of a run, by which they start together and end together.

Every process keeps a connection to process 0. The system closes it when a process ends, however
that happens, and process 0 tells the others; keep-alive packets detect a machine that is lost. A
process that ends early sends the reason first.

`jax.distributed` detects lost processes too, but it aborts the others with a native stack trace,
and also a process that has waited too long for the others to start.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.errors import ConfigError, UserError
from moe_jax.terminal import shown

_PATIENCE = 5.0
"""Seconds of waiting before a line says so."""

_GRACE = 1.0
"""Seconds in which a process may report the error of another one itself, as of a wrong file."""

_VERDICT = 5.0
"""Seconds to find out whether an exception follows from the end of another process."""

_LINGER = 20.0
"""Largest number of seconds that an ending process waits for the others or for its own threads."""

_FINISHED = {"finished": True}
_LEFT = {"left": True}


class CommonError(ConfigError):
    """An error that all processes raise at the same point, so that each reports it itself."""


class Ending(NamedTuple):
    """Early end of a process.

    Attributes:
      process: index of the process.
      status: its exit status, with which the others end too.
      reason: predicate of a sentence whose subject is the process.
    """

    process: int
    status: int
    reason: str


class Peers:
    """The other processes of a run, seen from one of them.

    When a process ends early, the others print one line and exit with its status.
    """

    def __init__(self, index: int, count: int):
        """Connects nothing yet.

        Args:
          index: index of this process.
          count: number of processes.
        """
        self.index = index
        self.count = count
        others = range(1, count) if index == 0 else [0]
        self._connections: dict[int, socket.socket] = {}
        self._readers: list[threading.Thread] = []
        self._messages = queue.SimpleQueue[dict[str, Any]]()
        self._finished = {process: threading.Event() for process in others}
        self._left: set[int] = set()
        self._ending: Ending | None = None
        self._lock = threading.Lock()
        self._is_ending = threading.Event()
        self._ends_here = threading.Lock()  # held by the thread that ends this process

    def connect(
        self, host: str, port: int, timeout: float, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Waits for all processes.

        Args:
          host: machine of process 0.
          port: port on which process 0 listens.
          timeout: seconds to wait.
          say: prints a line.

        Returns:
          In process 0 an empty dictionary; in the others the message of `start`.

        Raises:
          ConfigError: a process is missing after `timeout`, or it has another number of processes.
        """
        waiting = _Waiting(timeout, say)
        if self.index == 0:
            self._accept(port, waiting)
            message = {}
        else:
            self._reach(host, port, waiting)
            self._send(0, {"process": self.index, "count": self.count})
            # Process 0 is there, and itself waits no longer than this.
            waiting.prolong(timeout + 2 * _PATIENCE)
            while True:
                with contextlib.suppress(queue.Empty):
                    message = self._messages.get(timeout=1.0)
                    break
                waiting.announce("the other processes", "give the address of process 0")
        if "refused" in message:
            raise ConfigError(message["refused"])
        waiting.end(f"all {self.count} processes are there")
        return message

    def start(self, message: Mapping[str, Any]) -> None:
        """Sends a message to the connected processes; in the others, `connect` waits for it."""
        for process in list(self._connections):  # another thread may add one
            self._send(process, message)

    def finish(self) -> None:
        """Waits until all processes have come to their end without an error."""
        if self.index:
            self.start(_FINISHED)
        for finished in self._finished.values():
            finished.wait()
        if not self.index:
            self.start(_FINISHED)

    def leave(self) -> None:
        """Lets all processes go on without each other; after `finish` and the shutdown of jax."""
        self._ends_here.acquire(blocking=False)
        self.start(_LEFT)

    def end(self, error: BaseException) -> None:
        """Ends all processes because of an error in this one, which the caller raises on.

        If the error follows from the end of another process, that end is reported instead, and this
        function does not return.
        """
        status, reason = _status_and_reason(error)
        if status == 1:
            self._is_ending.wait(_VERDICT)
        follows = self._ending is not None and 1 in (status, self._ending.status)
        if follows or not self._ends_here.acquire(blocking=False):
            threading.Event().wait()  # `_end_after` ends the process
        if isinstance(error, CommonError):
            self.start(_LEFT)
        else:
            self._tell(Ending(self.index, status, reason))
        # Interpreters wait at their end for threads, which may wait for the other processes, and
        # jax waits for the other processes too.
        atexit.register(self._exit, status)
        threading.Thread(target=self._exit_later, args=(status,), daemon=True).start()

    def lose(self, process: int) -> None:
        """Ends this process because another one is gone without a message."""
        if process not in self._left:
            reason = "was killed, or its machine is lost; the same command resumes"
            self._end_after(Ending(process, 1, reason))

    def end_after_native_failure(self) -> None:
        """Ends this process, whose native code has given up. Does not return.

        Most often process 0 has ended, which its connection reports as well.
        """
        if not self._is_ending.wait(_VERDICT) and self._ends_here.acquire(blocking=False):
            ending = Ending(self.index, 1, "failed in native code; the same command resumes")
            self._tell(ending)
            self._report(ending)
            self._exit(1)
        time.sleep(_LINGER)  # in which another thread ends the process
        os._exit(1)

    def _accept(self, port: int, waiting: "_Waiting") -> None:
        with _listen(port) as server:
            server.settimeout(0.5)
            while missing := [p for p in self._finished if p not in self._connections]:
                named = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                waiting.announce(f"{named} of {self.count}", "start them with the same command")
                with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                    self._admit(server.accept()[0])

    def _admit(self, connection: socket.socket) -> None:
        """Adds a process that has called; one that does not belong to the run is refused.

        Raises:
          OSError, ValueError, LookupError, TypeError: it sends no or another greeting, or is gone.
          ConfigError: it was started with another number of processes.
        """
        connection.settimeout(_PATIENCE)
        greeting = json.loads(connection.recv(1024))
        connection.settimeout(None)
        process, count = int(greeting["process"]), int(greeting["count"])
        refusal = None
        if count != self.count:
            refusal = f"--num-processes: is {count} in process {process}, {self.count} in process 0"
        elif process not in self._finished or process in self._connections:
            refusal = f"--process-id {process}: is given to two processes"
        if refusal is None:
            self._add(process, connection)
            return
        connection.sendall(_line({"refused": refusal}))
        connection.close()
        if count != self.count:
            raise ConfigError(refusal)

    def _reach(self, host: str, port: int, waiting: "_Waiting") -> None:
        while True:
            try:
                self._add(0, socket.create_connection((host, port), timeout=_PATIENCE))
                return
            except (OSError, UnicodeError) as error:
                reason = (getattr(error, "strerror", None) or str(error)).lower()
                place = f"process 0 at {host}:{port} ({reason})"
                waiting.announce(place, "start it, or give its address to --coordinator")
                time.sleep(0.5)

    def _add(self, process: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._connections[process] = connection
        reader = threading.Thread(target=self._read, args=(process, connection), daemon=True)
        self._readers.append(reader)
        reader.start()

    def _send(self, process: int, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its reader notices that the process is gone
            self._connections[process].sendall(_line(message))

    def _read(self, process: int, connection: socket.socket) -> None:
        """Handles the messages of another process until its connection is closed."""
        with contextlib.suppress(OSError, ValueError), connection.makefile() as lines:
            for line in lines:
                message = json.loads(line)
                if "ending" in message:
                    self._end_after(Ending(*message["ending"]))
                elif message == _FINISHED:
                    self._finished[process].set()
                elif message == _LEFT or "refused" in message:
                    self._left.add(process)
                self._messages.put(message)
        self.lose(process)

    def _tell(self, ending: Ending) -> bool:
        """Tells the others about the first end; False if another one came first."""
        with self._lock:
            if self._ending is not None:
                return False
            self._ending = ending
        self._is_ending.set()
        self.start({"ending": ending})
        return True

    def _end_after(self, ending: Ending) -> None:
        """Ends this process after another one, unless it ends by itself at the same time."""
        if not self._tell(ending):
            return
        time.sleep(_GRACE)
        if self._ends_here.acquire(blocking=False):
            self._report(ending)
            self._exit(ending.status)

    def _report(self, ending: Ending) -> None:
        kind = "error" if ending.status < 128 else "stopped"
        line = shown(f"{kind}: process {ending.process} of {self.count} {ending.reason}")
        # Not `print`: the main thread may hold the lock of stderr, which may be closed as well.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{line}\n".encode())

    def _exit_later(self, status: int) -> None:
        time.sleep(_LINGER)
        self._exit(status)

    def _exit(self, status: int) -> None:
        """Exits without the clean-up of jax; process 0 after the others, which it connects."""
        deadline = time.monotonic() + _LINGER
        for reader in self._readers if self.index == 0 else ():
            if reader is not threading.current_thread():
                reader.join(max(deadline - time.monotonic(), 0.0))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


class _Waiting:
    """Lines about waiting for other processes, and its largest duration."""

    def __init__(self, timeout: float, say: Callable[[str], None]):
        self._timeout = timeout
        self._say = say
        self._start = time.monotonic()
        self._announced: set[str] = set()

    def announce(self, whom: str, advice: str = "") -> None:
        """Says once for each `whom`, after a few seconds, that this process waits.

        Raises:
          ConfigError: the time is over, and `advice` is given.
        """
        waited = time.monotonic() - self._start
        if advice and waited > self._timeout:
            raise ConfigError(
                f"--distributed: waited {self._timeout:.0f} s (--wait) for {whom}; {advice}"
            )
        if waited > min(_PATIENCE, self._timeout / 2) and whom not in self._announced:
            self._announced.add(whom)
            self._say(f"waiting for {whom}, for up to {self._timeout:.0f} s (--wait)")

    def prolong(self, seconds: float) -> None:
        """Waits for so many seconds from now on."""
        self._timeout = time.monotonic() - self._start + seconds

    def end(self, text: str) -> None:
        """Says what ended the waiting, if it was announced."""
        if self._announced:
            self._say(f"{text}, after {time.monotonic() - self._start:.0f} s")


def _status_and_reason(error: BaseException) -> tuple[int, str]:
    """Exit status and `Ending.reason` of a process that ends with `error`."""
    text = " ".join(str(error).split())
    text = f"{text[:500]} ..." if len(text) > 500 else text
    if isinstance(error, UserError):
        return 2, f"ended: {text}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "was stopped by Ctrl-C"
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return error.code, f"was stopped by {signal.Signals(error.code - 128).name}"
    return 1, f"failed: {type(error).__name__}: {text}; the same command resumes"


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _listen(port: int) -> socket.socket:
    """Socket that accepts connections on all networks of this machine.

    Raises:
      ConfigError: the port is in use, or is not allowed.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--coordinator: cannot listen on port {port} ({reason.lower()}); give another port "
            "to all processes"
        ) from None


def _keep_alive(connection: socket.socket) -> None:
    """Lets the system close a connection whose other machine does not answer for 30 seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The names differ between systems, which have longer defaults.
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
