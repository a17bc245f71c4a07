"""References to secrets inside option values: ${env:NAME} and ${secret:scope/key}; the secrets themselves stay outside
of every settings file and of the settings in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

REFERENCE = re.compile(r"\$\{(?:env:([A-Za-z_][A-Za-z0-9_]*)|secret:([^/{}\s]+)/([^/{}\s]+))\}")
# Option names whose values are secrets. Kafka's …token.endpoint.url and its like end otherwise.
_SECRET_NAME = re.compile(r"(password|passphrase|secret|token|private\.key|keystore\.key|account\.key)$", re.IGNORECASE)
# Fields of a JAAS line: password="…", clientSecret='…', or without quotes up to a blank or semicolon.
_SECRET_FIELD = re.compile(r"\w*(?:password|secret|token)\w*\s*=\s*(\"[^\"]*\"?|'[^']*'?|[^\s;]*)", re.IGNORECASE)


def literal_secrets(options: Mapping[str, str]) -> list[str]:
    """The names of the options that hold a secret in plain text, in whole or in part, instead of a reference."""
    return [name for name, value in options.items() if not all(map(_is_reference, _secrets_in(name, value)))]


def resolve(
    options: Mapping[str, str], secret_of: Callable[[str, str], str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """The options with every reference replaced, and what is wrong with those that could not be, one line each.

    secret_of: (scope, key) -> the secret; default the secret scopes of Databricks, asked only where one is referred to.
    """
    problems: set[str] = set()

    def secret(match: re.Match[str]) -> str:
        name, scope, key = match.groups()
        if name is not None:
            if name not in os.environ:
                problems.add(f"set the environment variable {name}")
            return os.environ.get(name, "")
        try:
            return (secret_of or _databricks_secret)(scope, key)
        except ImportError:
            problems.add(f"${{secret:{scope}/{key}}} can be read on Databricks only; elsewhere write ${{env:NAME}}")
        except Exception as error:
            # The text of a foreign error could carry anything.
            problems.add(
                f"the secret {scope}/{key} cannot be read ({type(error).__name__}); check scope, key and rights"
            )
        return ""

    return {name: REFERENCE.sub(secret, value) for name, value in options.items()}, sorted(problems)


def _databricks_secret(scope: str, key: str) -> str:
    # Part of every Databricks runtime; elsewhere the module is missing, or it has no workspace to ask.
    from databricks.sdk.runtime import dbutils

    return str(dbutils.secrets.get(scope=scope, key=key))


def _secrets_in(name: str, value: str) -> list[str]:
    if _SECRET_NAME.search(name):
        return [value]
    if name.lower().endswith("jaas.config"):
        return [field.strip("\"'") for field in _SECRET_FIELD.findall(value)]
    return []


def _is_reference(text: str) -> bool:
    return REFERENCE.fullmatch(text.strip()) is not None
