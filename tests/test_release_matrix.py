"""The page of the release matrix says what failed, and the cause of a dead server is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.release_features import FeatureError, cause, exact
from benchmarks.release_matrix import page_of

from pals.engines.openai_client import RequestResult, RequestSpec


def test_a_failure_is_counted_and_what_was_not_reached_is_not_claimed() -> None:
    good = {"version": "0.32.0", "starts": "13 s", "streaming": "40 of 40 exact"}
    bad = {"version": "0.33.0", "starts": "FAILED: missing module frob"}

    page = page_of([good, bad])

    assert "| starts | 13 s | FAILED: missing module frob |" in page
    assert "| streaming | 40 of 40 exact | not tried |" in page
    assert "1 failures." in page
    assert "No failures." in page_of([good])


def test_a_dead_servers_missing_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "serve.log").write_text("pals: vLLM ended\n")
    assert cause(tmp_path) == "pals: vLLM ended"
    (tmp_path / "vllm.log").write_text("Traceback\nModuleNotFoundError: No module named 'frob'\n")
    assert cause(tmp_path) == "missing module frob"
    (tmp_path / "vllm.log").write_text("Traceback\n  ValueError: weights need 671 GB\n")
    assert cause(tmp_path) == "ValueError: weights need 671 GB"


def test_one_missing_token_is_a_failure() -> None:
    specs = [RequestSpec(at_s=0.0, prompt_tokens=5, output_tokens=7)] * 2
    whole = RequestResult(spec=specs[0], sent_s=0.0, output_tokens=7)
    short = RequestResult(spec=specs[0], sent_s=0.0, output_tokens=6)

    assert exact(specs, [whole, whole]) == "2 of 2 exact"
    with pytest.raises(FeatureError, match="1 of 2"):
        exact(specs, [whole, short])
