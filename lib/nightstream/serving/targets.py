"""The servers that hold a key-value copy, by their addresses."""

from __future__ import annotations

import re
from typing import Literal

from nightstream.errors import SettingsError
from nightstream.serving.key_value import Target
from nightstream.serving.postgres_target import PostgresTarget
from nightstream.serving.redis_target import RedisTarget

Kind = Literal["postgresql", "redis"]
SCHEMES = {"postgresql": ("postgresql", "postgres"), "redis": ("redis", "rediss", "unix")}


def target_of(kind: Kind, url: str, table: str, prefix: str) -> Target:
    """The target, not connected yet.

    Args:
        kind: of the server.
        url: its address, with the password in it.
        table: name in PostgreSQL, with its schema or without.
        prefix: what stands before the user's id in a key of Redis.

    Returns:
        A target; it may be made anew in a process elsewhere from the same arguments.

    Raises:
        SettingsError: the address is none of such a server. It is not shown.
    """
    schemes = SCHEMES[kind]
    scheme, _, rest = url.partition("://")
    # The clients would take a part of such a password for a host or a port, and name it in their errors.
    if scheme not in schemes or rest.count("@") != re.split("[/?#]", rest)[0].count("@") or rest.count("@") > 1:
        example = "postgresql://user:${env:NAME}@host:5432/database"
        if kind == "redis":
            example = "redis://user:${env:NAME}@host:6379/0"
        raise SettingsError(
            [
                f"sync.url is no address for sync.target {kind}; write {example}, "
                "and what is neither letter nor digit in a password as %40, %2F, …"
            ]
        )
    return PostgresTarget(url, table) if kind == "postgresql" else RedisTarget(url, prefix)
