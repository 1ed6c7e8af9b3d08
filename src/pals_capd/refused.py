"""Why a request, a file or a start is refused: one word for programs, one message for people."""

from __future__ import annotations


class Refused(Exception):
    """Nothing was changed; `word` is the error of the reply, `facts` go with it."""

    def __init__(self, word: str, message: str, **facts: object) -> None:
        super().__init__(message)
        self.word, self.facts = word, facts


class ConfigError(Exception):
    """The policy file, an option or another capd keeps this one from starting; nothing was changed."""
