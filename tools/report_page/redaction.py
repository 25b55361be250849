"""Keys and tokens that must not reach a page that people send around.

The trainer writes none, but a report also shows what others wrote: messages of libraries in events, URLs in recipes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SHORTEST = 8  # a value such as "true" would be struck out everywhere
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS")
_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
_URL_FIELD = re.compile(r"([?&][^=&\s]*(?:key|token|secret|signature|password|credential)[^=&\s]*=)[^&\s]+", re.I)


class Redactor:
    """Strikes out, wherever they stand in a text, the values of environment variables that are named like secrets, and
    the credentials of URLs."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        secrets = {value.strip() for name, value in environment.items() if _names_secret(name)}
        # the longest first: one may be part of another
        self._secrets = sorted((s for s in secrets if len(s) >= _SHORTEST), key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text with *** in place of every secret."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return _URL_FIELD.sub(rf"\1{HIDDEN}", _URL_USER.sub(f"{HIDDEN}@", text))

    def value(self, value: Any) -> Any:
        """The same for every string inside a parsed JSON or YAML value, names of fields too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value


def _names_secret(name: str) -> bool:
    """WANDB_API_KEY, HF_TOKEN, OPENAI_APIKEY; not TOKENIZERS_PARALLELISM."""
    return any(part.endswith(_SECRET_WORDS) for part in name.upper().split("_"))
