"""The step after which all processes stop when one of them receives a signal."""

import atexit
import itertools
import signal
from typing import Any

import jax
from jax._src import distributed


def heed_sigterm() -> None:
    """Lets SIGTERM stop all processes after a step that they agree on; see `all_stop`.

    It replaces the handler of Python for the rest of the process. Before, SIGTERM unwinds.
    """
    _preemption_manager()


def request_stop() -> None:
    """Does what SIGTERM does to this process after `heed_sigterm`."""
    signal.raise_signal(signal.SIGTERM)


def all_stop() -> bool:
    """True in all processes at the same call, once one of them has received SIGTERM.

    All processes must make the same calls. Later ones may be False again.
    """
    return _preemption_manager().reached_sync_point(next(_calls))


def release() -> None:
    """Undoes `heed_sigterm`, if it was called; must be called before jax shuts its client down."""
    while _managers:
        _managers.pop().shutdown()


_calls = itertools.count(1)
_managers: list[Any] = []
"""The manager of preemption of jax, which nothing else may use; empty before the first use.

Orbax asks it too, about steps that are written later than they are made. A number that is below an
earlier one leads to a common stop that is past.
"""


def _preemption_manager() -> Any:
    if not _managers:
        state = distributed.global_state
        if state.preemption_sync_manager is None:
            jax.config.update("jax_enable_preemption_service", True)
            state.initialize_preemption_sync_manager()
        _managers.append(state.preemption_sync_manager)
        state.preemption_sync_manager = None  # for Orbax: no preemption
        atexit.register(release)  # processes that jax joined without `join.joined`
    return _managers[0]
