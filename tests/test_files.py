"""Files of the run directory: nobody else's are written, replaced whole, and growing ones are kept in bounds."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pals.core.errors import ConfigError
from pals.engines.vllm_launcher import keep_small
from pals.runtime.channel import AgentChannel, EngineChannel
from pals.runtime.files import check_folder, keep_whole_lines, own_folder, replace_file, state_dir
from tests.worlds import engine_info


def test_a_run_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "a" / "run")

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o775, True), (0o1777, False), (0o755, False)])
def test_a_folder_that_others_may_write_is_refused_unless_it_is_sticky(
    tmp_path: Path, mode: int, refused: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)

    if refused:
        with pytest.raises(ConfigError, match="written by other users"):
            check_folder(folder)
        with pytest.raises(ConfigError, match="written by other users"):
            EngineChannel(folder, engine_info(), name="x")
    else:
        check_folder(folder)


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder = tmp_path / "run"
    folder.mkdir()
    os.chown(folder, 12345, 12345)

    with pytest.raises(ConfigError, match="belongs to user 12345"):
        own_folder(folder)


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")

    with pytest.raises(ConfigError, match="cannot be made"):
        own_folder(tmp_path / "run")


def test_no_planted_link_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "run" / "status.json"
    own_folder(path.parent)
    path.symlink_to(victim)
    (path.parent / f".status.json.{os.getpid()}.new").symlink_to(victim)

    replace_file(path, b"new")

    assert victim.read_text() == "mine"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["status.json"]
    engine = EngineChannel(path.parent, engine_info(), name="real")
    (path.parent / "link.channel").symlink_to(engine.path)
    with pytest.raises(OSError, match="symbolic links"):
        AgentChannel(path.parent / "link.channel")


@pytest.mark.parametrize(
    ("content", "kept"),
    [(b"a\nb\nhalf", b"a\nb\n"), (b"a\n", b"a\n"), (b"half", b""), (b"", b""), (b"a\n" + b"x" * 200_000, b"a\n")],
)
def test_a_cut_line_is_taken_off(tmp_path: Path, content: bytes, kept: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)

    keep_whole_lines(path)

    assert path.read_bytes() == kept


def test_a_log_above_its_limit_moves_aside_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100)
        keep_small(path, limit_bytes=100)
        assert path.stat().st_size == 100
        writer.write(b"y")
        keep_small(path, limit_bytes=100)
        writer.write(b"after")

    assert path.read_bytes() == b"after"
    assert (tmp_path / "vllm.log.1").read_bytes() == b"x" * 100 + b"y"


def test_what_grows_lies_on_disk_unless_a_run_directory_was_given() -> None:
    assert state_dir({"PALS_RUN_DIR": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert state_dir({"PALS_RUN_DIR": "/run/a", "PALS_STATE_DIR": "/var/a"}) == Path("/var/a")
    expected = Path("/var/lib/pals") if os.geteuid() == 0 else Path("/b/pals")
    assert state_dir({"XDG_STATE_HOME": "/b"}) == expected
