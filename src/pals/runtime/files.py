"""Files that other users of the machine must not get at: folders of our own, and files replaced without following links."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pals.core.errors import ConfigError


def own_folder(folder: Path) -> Path:
    """Make `folder` for this user alone where it is missing, check it where it is there, and return it.

    Raises:
        ConfigError: it cannot be made or written, or other users could plant files in it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"the run directory {folder} cannot be made ({e.strerror}: {e.filename}); set PALS_RUN_DIR to a folder of your "
            "own. Nothing was started"
        ) from e
    check_folder(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"the run directory {folder} cannot be written; set PALS_RUN_DIR to a folder of your own. Nothing was started"
        )
    return folder


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` where somebody else could plant or exchange files in `folder`; one that is missing is fine."""
    try:
        facts = (os.lstat(folder), os.stat(folder))
    except FileNotFoundError:
        return
    except OSError as e:
        raise ConfigError(f"the run directory {folder}: {e.strerror}; set PALS_RUN_DIR to a folder of your own") from e
    foreign = [f.st_uid for f in facts if f.st_uid not in (os.geteuid(), 0)]
    if foreign:
        raise ConfigError(
            f"the run directory {folder} belongs to user {foreign[0]}, not to this one ({os.geteuid()}); set PALS_RUN_DIR to "
            "a folder of your own. Nothing was started"
        )
    mode = facts[1].st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        raise ConfigError(
            f"the run directory {folder} can be written by other users (mode {stat.S_IMODE(mode):o}); "
            f"chmod go-w {folder}, or set PALS_RUN_DIR to a folder of your own. Nothing was started"
        )


def read_token(path: Path) -> str:
    """The token in `path`, which its owner alone may read.

    Raises:
        ConfigError: no file, open to others, or no token of 16 to 512 printable characters in it.
    """
    advice = f"make one with (umask 077; openssl rand -hex 32 > {path}). Nothing was started"
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:  # a pipe must not block
            facts = os.fstat(f.fileno())
            text = f.read(1024).decode("ascii").strip() if stat.S_ISREG(facts.st_mode) else ""
    except OSError as e:
        raise ConfigError(f"the token file {path} cannot be read ({e.strerror}); {advice}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"the token file {path} holds no plain ASCII text; {advice}") from e
    if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"the token file {path} is open to other users (mode {stat.S_IMODE(facts.st_mode):o}): chmod 600 {path}, and "
            "make another token if somebody may have read it. Nothing was started"
        )
    if not 16 <= len(text) <= 512 or not all("!" <= c <= "~" for c in text):
        raise ConfigError(f"the token file {path} must hold one token of 16 to 512 characters without spaces; {advice}")
    return text


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` anew, atomically, readable for this user alone; no link is followed, nor any file of others written."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where what grows is kept, on disk: $PALS_STATE_DIR, else $PALS_RUN_DIR, else /var/lib/pals (root), $XDG_STATE_HOME/pals."""
    if given := environ.get("PALS_STATE_DIR") or environ.get("PALS_RUN_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/pals")
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local/state") / "pals"


def keep_whole_lines(path: Path) -> None:
    """Cut off what follows the last line end of a regular file: a line that could not be written whole."""
    with path.open("r+b") as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            return
        size = f.seek(0, os.SEEK_END)
        while size:
            start = max(0, size - 65536)
            f.seek(start)
            at = f.read(size - start).rfind(b"\n")
            if at >= 0:
                f.truncate(start + at + 1)
                return
            size = start
        f.truncate(0)
