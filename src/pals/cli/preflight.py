"""What can be known to be wrong before the model is loaded: profile, policy and ranges, from the boards and options given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pals.control.guard import Guard
from pals.control.policies import build_policy
from pals.core.errors import ConfigError
from pals.core.fingerprint import check_fingerprint
from pals.core.quantities import BoardInfo, EngineInfo
from pals.models.profile import Profile
from pals.runtime.agent import load_profile, policy_settings
from pals.runtime.config import Config, ControlConfig
from pals.runtime.node import refuse_existing

ANY_SEQUENCES = 1_000_000  # where the launch limit is vLLM's to choose


def check_before_launch(
    config: Config,
    boards: Sequence[BoardInfo],
    *,
    model: str,
    served_as: str,
    launch_sequences: int | None,
    exact: bool,
) -> None:
    """Make the policy once, as the agent will; `exact`: these are all of the engine's boards, and no others.

    Raises:
        ConfigError: a missing or foreign profile, settings out of range, or a journal that exists.
    """
    info = EngineInfo(
        pid=0, engine="", version="", model=model, parallelism="", boards=(), launch_sequences=0, served_as=served_as
    )
    control = config.of(info).control
    try:
        if config.output.journal:
            refuse_existing(Path(config.output.journal))
        profile, accepted = load_profile(Path(control.profile)) if control.profile else None, tuple[str, ...]()
        if profile is not None:
            accepted = _check_profile(
                profile, boards, control, model=model, launch_sequences=launch_sequences, exact=exact
            )
            launch_sequences = launch_sequences or profile.fingerprint.launch_sequences
        guard = Guard.of(boards, launch_sequences or ANY_SEQUENCES)
        build_policy(control.policy, policy_settings(control), profile, guard, accepted=accepted)
    except ConfigError as e:
        told = re.sub(r"\.? *(Nothing was written|No board was changed)?\.?$", "", str(e))
        raise type(e)(f"{told}. Nothing was started") from e


def _check_profile(
    profile: Profile,
    boards: Sequence[BoardInfo],
    control: ControlConfig,
    *,
    model: str,
    launch_sequences: int | None,
    exact: bool,
) -> tuple[str, ...]:
    """What differs and is accepted, as far as it is known before the launch."""
    measured_on = profile.fingerprint
    here = replace(
        measured_on,
        model=model,
        board=boards[0].name,
        driver=boards[0].driver,
        boards=len(boards) if exact else measured_on.boards,
        launch_sequences=launch_sequences or measured_on.launch_sequences,
    )
    return check_fingerprint(
        measured_on,
        here,
        accept=control.accept_mismatch,
        name=str(control.profile),
        advice="Make one for this engine with `pals profile`.",
    )
