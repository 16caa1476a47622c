"""Log of the hub's client library."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_retries() -> Iterator[None]:
    """Hides the warnings of `huggingface_hub` about each request that it repeats.

    An error that remains is raised, and reported in one line by the caller.
    """
    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
