"""How many files and connections the process may have open."""

from __future__ import annotations

import logging
import resource
from contextlib import suppress

logger = logging.getLogger(__name__)

# A thousand connections, beside the files of the model and of adapters.
ENOUGH = 4096


def raise_open_files_limit() -> None:
    """Raises what is allowed by default to what may be allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS allows less than it says.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft != resource.RLIM_INFINITY and soft < ENOUGH:
        logger.warning(
            "At most %d files and connections may be open, which is few: raise the limit with"
            " `ulimit -Hn` or where the service is defined.",
            soft,
        )
