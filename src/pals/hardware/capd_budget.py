"""The agent's budget, told to capd: it cuts at once what no longer fits, and holds it on when the agent is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pals.core.errors import PalsError
from pals.hardware.capd_client import CapdClient


class CapdBudget:
    """Tells capd what it does not know yet; what goes wrong is said once, and tried again at the next call."""

    def __init__(self, client: CapdClient, say: Callable[[str], None]) -> None:
        self._client, self._say = client, say
        self._told: tuple[float | None, frozenset[str]] = (None, frozenset())
        self._epoch: int | None = None  # at which it was told: a capd that began anew is told again
        self._complaint: str | None = None

    def keep(self, watts: float | None, uuids: Sequence[str]) -> None:
        """These boards may be limited to `watts` together (None: to anything) from now on; never raises."""
        wanted = (watts, frozenset(uuids)) if watts is not None and uuids else (None, frozenset[str]())
        try:
            epoch = self._client.hello.epoch
            if self._epoch is None:
                self._warn_of_another(wanted)
            if wanted == self._told and (epoch == self._epoch or wanted[0] is None):
                self._epoch = epoch
                return
            self._client.request("budget", watts=wanted[0], boards=sorted(wanted[1]))
            self._told, self._epoch, self._complaint = wanted, self._client.hello.epoch, None
        except (PalsError, ValueError) as e:
            self._complain(f"{e}. The agent keeps to its budget itself")

    def end(self) -> None:
        """The boards are released and the agent ends in order: nothing is to be kept any more; never raises."""
        if self._told[0] is None:
            return
        try:
            self._client.request("budget", watts=None, boards=[])
            self._told = (None, frozenset())
        except (PalsError, ValueError) as e:
            self._say(f"capd's budget of {self._told[0]:.0f} W stays in force: {e}")

    def _warn_of_another(self, wanted: tuple[float | None, frozenset[str]]) -> None:
        """Say, at the start, where a budget is in force that this agent will not replace."""
        there = self._client.read()["budget"]
        if there["watts"] is not None and wanted[0] is None:
            self._say(
                f"capd holds a budget of {there['watts']:.0f} W over {len(there['boards'])} boards that this agent did not set; it "
                "stays in force. `pals caps release --all` lifts it"
            )

    def _complain(self, why: str) -> None:
        if why != self._complaint:
            self._complaint = why
            self._say(why)
