"""Whether a profile may be used here: every difference of fingerprint refuses it, some even where a person accepts a mismatch.

A person may accept what moves the figures by some per cent and what the online correction then finds: another build,
driver, launch batch or flag. Not what makes them figures of something else: power of other boards, step times of another
model, weight format, parallelism or of speculative decoding. No widened interval covers those, and a budget rests on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from pals.core.architecture import ModelShape
from pals.core.errors import ProfileMismatchError
from pals.core.quantities import Fingerprint, flags_of, flags_text

#: Differences that are never accepted.
NEVER_ACCEPTED = frozenset(
    {
        *("engine", "config_digest", "board", "boards", "parallelism", "dtype"),
        *("flag quantization", "flag speculative"),
    }
)
#: Keys of a config.json that say where a model came from or how it answers, not what a step of it costs.
_NAMES = ("name", "path", "version", "token_id", "architectures", "label", "commit", "auto_map", "dtype")


def check_fingerprint(mine: Fingerprint, here: Fingerprint, *, accept: bool, name: str, advice: str) -> tuple[str, ...]:
    """Differences between a profile's fingerprint and this place that are accepted; none where `accept` is False.

    Args:
        mine: the profile's.
        here: what the profile would be used for.
        accept: whether a person accepted a mismatch.
        name: the profile's file, for the message.
        advice: how to make a profile for this place, a sentence.

    Raises:
        ProfileMismatchError: names every difference, and whether `--accept-mismatch` would do.
    """
    told = mine.differences(here)
    if not told:
        return ()
    final = [d for d in told if d.split(":")[0] in _final(mine, here)]
    if accept and not final:
        return tuple(told)
    if accept:
        may = f"These are never accepted, as no interval covers them: {', '.join(d.split(':')[0] for d in final)}."
    elif final:
        may = ""
    else:
        may = " Or use it with wider intervals: --accept-mismatch."
    raise ProfileMismatchError(
        f"{name} was measured on something else; it is not used and nothing was written:\n  "
        + "\n  ".join(told)
        + f"\n{may if accept else advice + may}"
    )


def _final(mine: Fingerprint, here: Fingerprint) -> frozenset[str]:
    """What may not differ; a model's name too, where no digest shows that it is the same architecture."""
    alike = mine.config_digest is not None and mine.config_digest == here.config_digest
    return NEVER_ACCEPTED if alike else NEVER_ACCEPTED | {"model"}


def only_flags_of(mine: str | None, here: str | None) -> str | None:
    """The flags of `mine`, those that `here` knows with its values: for a place that has not all of an engine's settings."""
    if mine is None or here is None:
        return mine
    known = flags_of(here)
    return flags_text({k: known.get(k, v) for k, v in flags_of(mine).items()})


def shape_digest(shape: ModelShape) -> str:
    """16 hexadecimal digits of a model's sizes and weight formats: equal where a step costs the same.

    Fields at their default are left out, so that one more field does not make every older profile another model's.
    """
    usual = {f.name: f.default for f in fields(shape) if f.default is not MISSING}
    return _digest({k: v for k, v in asdict(shape).items() if k not in usual or usual[k] != v})


def raw_digest(config: Mapping[str, Any]) -> str:
    """The same of a config.json whose sizes are not understood: all it says, without names and paths."""
    return "raw-" + _digest({k: v for k, v in config.items() if not any(word in k for word in _NAMES)})


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
