"""vLLM's own options as far as `pals serve` must know them, read as vLLM reads them: underscores are dashes, the last counts."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from pals.core.errors import ConfigError
from pals.runtime.agent import indices_text

PARALLEL = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))
NO_HOSTS: Mapping[str, str] = MappingProxyType({})
LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # where a server on all addresses is asked


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where vLLM's API listens."""

    host: str
    port: int
    https: bool

    @property
    def url(self) -> str:
        """How this machine reaches it."""
        host = LOOPBACK.get(self.host, self.host)
        return f"http{'s' if self.https else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"


def endpoint_of(rest: Sequence[str]) -> Endpoint:
    """The endpoint these options ask for.

    Raises:
        ConfigError: a port that is none.
    """
    host = option(rest, "--host")
    return Endpoint(
        "127.0.0.1" if host is None else host,
        port_of(option(rest, "--port") or "8000"),
        option(rest, "--ssl-certfile") is not None,
    )


def flag_of(argument: str) -> str:
    """The option an argument names, in vLLM's spelling."""
    name = argument.split("=", 1)[0]
    return name.replace("_", "-") if name.startswith("--") else name


def given(rest: Sequence[str], *names: str) -> bool:
    """Whether one of these options is there."""
    return any(flag_of(argument) in names for argument in rest)


def option(rest: Sequence[str], *names: str) -> str | None:
    """The value of the option with these spellings; of several the last one's, as for vLLM."""
    found = None
    for i, argument in enumerate(rest):
        if flag_of(argument) in names:
            if "=" in argument:
                found = argument.split("=", 1)[1]
            elif i + 1 < len(rest):
                found = rest[i + 1]
    return found


def whole(rest: Sequence[str], *names: str, least: int = 0) -> int | None:
    """The same as a whole number.

    Raises:
        ConfigError: it is none, or below `least`.
    """
    text = option(rest, *names)
    if text is None:
        return None
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"{names[0]} {text}: expected a whole number from {least} on. Nothing was started")
    return int(text)


def emulated_boards(visible: str, count: int, rest: list[str]) -> tuple[tuple[int, ...], list[str]]:
    """Which of `count` emulated boards this server uses, and vLLM's options: without any parallelism, all that are visible.

    Raises:
        ConfigError: boards that are not emulated, or fewer than the parallelism needs.
    """
    mine = chosen(visible, "CUDA_VISIBLE_DEVICES") if visible else tuple(range(count))
    if absent := [i for i in mine if i >= count]:
        raise ConfigError(
            f"boards {absent} are not among the {count} emulated ones (0..{count - 1}). Nothing was started"
        )
    sizes = [option(rest, *flags) for flags in PARALLEL]
    if sizes == [None] * len(sizes):
        return mine, [*rest, "--tensor-parallel-size", str(len(mine))]
    if bad := [v for v in sizes if v is not None and not (v.isdigit() and int(v))]:
        raise ConfigError(f"{bad[0]!r} is not a size of a parallel group. Nothing was started")
    needed = prod(int(v) for v in sizes if v is not None)
    if needed > len(mine):
        raise ConfigError(
            f"this parallelism needs {needed} boards, {len(mine)} are there ({indices_text(mine)}); emulate more "
            "(--emulate 8x…) or choose more (--boards). Nothing was started"
        )
    return mine[:needed], rest


def chosen(text: str, where: str) -> tuple[int, ...]:
    """Board indices out of "4,5,6,7".

    Raises:
        ConfigError: not of that form.
    """
    words = [w.strip() for w in text.split(",")]
    if not all(w.isdigit() for w in words) or len(set(words)) != len(words):
        raise ConfigError(f"{where} {text!r}: expected different board indices like 4,5,6,7. Nothing was started")
    return tuple(int(w) for w in words)


def port_of(text: str) -> int:
    """A port number.

    Raises:
        ConfigError: it is none.
    """
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"{text!r} is not a port (1..65535). Nothing was started")
    return int(text)


def check_port(host: str, port: int, what: str, flag: str) -> None:
    """Raise `ConfigError` where the port cannot be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError) as e:
            raise ConfigError(
                f"{what} {port} on {host} cannot be used ({e}); choose another with {flag}. Nothing was started"
            ) from e


def check_ports(api: Endpoint, own: Sequence[tuple[int, str]], hosts: Mapping[str, str] = NO_HOSTS) -> None:
    """Raise `ConfigError` where the API's port or one of PALS's `own` (0: off) is taken, or two are the same.

    PALS's listen on 127.0.0.1, or where `hosts` says.
    """
    check_port(api.host, api.port, "API port", "--port")
    for port, what in own:
        if port == api.port:
            raise ConfigError(
                f"{what} port {port} is the API's too; choose another with --{what}-port (0: off). Nothing was started"
            )
        if port:
            check_port(hosts.get(what, "127.0.0.1"), port, f"{what} port", f"--{what}-port")
