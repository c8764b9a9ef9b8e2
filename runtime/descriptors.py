"""How many files, and so sockets, this process may have open."""

from __future__ import annotations

import resource


def raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files to `wanted`, or as far as allowed; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft
