"""What a profile fits: every difference refuses it, a person may accept some, and what cannot be read is no match."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pals.core.architecture import ModelShape
from pals.core.errors import ProfileMismatchError
from pals.core.fingerprint import check_fingerprint, only_flags_of, raw_digest, shape_digest
from pals.core.quantities import Fingerprint, flags_of, flags_text
from pals.engines.launch_facts import launch_facts
from pals.engines.model_zoo import read_config
from pals.experiments.simulated_node import engine_info
from pals.runtime.channel import AgentChannel, EngineChannel

MINE = Fingerprint(
    engine="vllm", engine_version="0.32.0", engine_build="", model="m", board="H100", driver="590.1", boards=4,
    parallelism="tp4 pp1 dp1 ep0", launch_sequences=64, dtype="bfloat16", config_digest="8ea48ef7dc5b896f",
    flags="enforce_eager=0 kv_cache_dtype=auto quantization=none speculative=none",
)  # fmt: skip


def check(here: Fingerprint, *, accept: bool = False, mine: Fingerprint = MINE) -> tuple[str, ...]:
    return check_fingerprint(mine, here, accept=accept, name="p.json", advice="Make one.")


def test_the_same_place_has_no_differences() -> None:
    assert check(MINE) == ()
    assert check(MINE, accept=True) == ()


def test_every_difference_is_told_in_a_line_of_its_own_and_each_flag_by_its_name() -> None:
    flags = "enforce_eager=1 kv_cache_dtype=auto quantization=none speculative=none"

    with pytest.raises(ProfileMismatchError) as e:
        check(replace(MINE, driver="591.0", flags=flags))
    assert str(e.value).splitlines()[1:] == [
        "  driver: '590.1' in the profile, '591.0' here",
        "  flag enforce_eager: '0' in the profile, '1' here",
        "Make one. Or use it with wider intervals: --accept-mismatch.",
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"engine_version": "0.33.0"}, {"engine_build": "g123"}, {"driver": "591"}, {"launch_sequences": 32},
        {"model": "finetune"}, {"flags": str(MINE.flags).replace("auto", "fp8")},
    ],
)  # fmt: skip
def test_what_moves_figures_by_some_per_cent_may_be_accepted(other: dict[str, Any]) -> None:
    differences = check(replace(MINE, **other), accept=True)

    assert len(differences) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"engine": "sglang"}, {"config_digest": "0"}, {"board": "A100"}, {"boards": 2}, {"parallelism": "tp2 pp2 dp1 ep0"},
        {"dtype": "float32"}, {"flags": str(MINE.flags).replace("quantization=none", "quantization=fp8")},
        {"flags": str(MINE.flags).replace("speculative=none", "speculative=eagle:3")},
    ],
)  # fmt: skip
def test_what_makes_them_figures_of_something_else_is_never_accepted(other: dict[str, Any]) -> None:
    with pytest.raises(ProfileMismatchError, match="never accepted"):
        check(replace(MINE, driver="591", **other), accept=True)
    with pytest.raises(ProfileMismatchError) as e:
        check(replace(MINE, **other))
    assert "--accept-mismatch" not in str(e.value)


def test_another_models_name_is_not_accepted_where_no_digest_shows_the_same_architecture() -> None:
    with pytest.raises(ProfileMismatchError, match="never accepted"):
        check(replace(MINE, model="other"), accept=True, mine=replace(MINE, config_digest=None))


def test_what_an_older_profile_lacks_is_not_compared_but_what_is_unreadable_here_is_a_difference() -> None:
    older = replace(MINE, flags=None, engine_build=None, config_digest=None, dtype=None)

    assert check(MINE, mine=older) == ()
    with pytest.raises(ProfileMismatchError, match=r"flags: .* not readable here"):
        check(older)


def test_flags_are_one_small_line_and_come_back() -> None:
    text = flags_text({"b": True, "a": 8192, "c": "fp8 e4m3", "d": False})

    assert text == "a=8192 b=1 c=fp8e4m3 d=0"
    assert flags_of(text) == {"a": "8192", "b": "1", "c": "fp8e4m3", "d": "0"}
    assert only_flags_of(text, "a=2048 z=1") == "a=2048 b=1 c=fp8e4m3 d=0"
    assert only_flags_of(None, "a=1") is None


def shape_of(model: str, **other: Any) -> ModelShape:
    return ModelShape.from_config({**read_config(model)[1], **other})


def test_a_digest_follows_sizes_and_formats_and_nothing_else() -> None:
    qwen = shape_digest(shape_of("Qwen/Qwen3-30B-A3B"))

    assert qwen == shape_digest(shape_of("Qwen/Qwen3-30B-A3B", _name_or_path="/models/x", transformers_version="9"))
    assert qwen != shape_digest(shape_of("Qwen/Qwen3-30B-A3B", num_experts_per_tok=4))
    assert qwen != shape_digest(shape_of("Qwen/Qwen3-30B-A3B", quantization_config={"quant_method": "fp8"}))
    assert qwen != shape_digest(shape_of("mistralai/Mixtral-8x7B-v0.1"))
    assert (
        raw_digest({"x": 1, "_name_or_path": "a"}) == raw_digest({"x": 1, "_name_or_path": "b"}) != raw_digest({"x": 2})
    )


def test_a_simulated_engine_says_what_a_profile_compares() -> None:
    info = engine_info("m", boards=2, launch_sequences=64, shape=shape_of("Qwen/Qwen3-30B-A3B"), step_tokens=8192)

    assert (info.version, info.step_tokens) == ("simulated", 8192)
    assert info.flags == "chunked_prefill=1 max_num_batched_tokens=8192 prefix_caching=1"
    assert info.config_digest == shape_digest(shape_of("Qwen/Qwen3-30B-A3B"))


def vllm_config(**model: Any) -> Any:
    config = read_config("Qwen/Qwen3-30B-A3B")[1]
    hf = SimpleNamespace(to_dict=lambda: config)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            **{
                "hf_config": hf,
                "hf_text_config": hf,
                "dtype": "torch.bfloat16",
                "enforce_eager": True,
                "quantization": None,
            }
            | model
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=2048, enable_chunked_prefill=True, async_scheduling=None
        ),
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name="NONE")),
        speculative_config=SimpleNamespace(method="eagle", num_speculative_tokens=3),
    )


def test_vllms_settings_are_probed_and_what_a_release_lacks_is_unknown() -> None:
    facts = launch_facts(vllm_config(), async_scheduling=True)

    flags = flags_of(str(facts.flags))
    assert (flags["enforce_eager"], flags["max_num_batched_tokens"], flags["async_scheduling"]) == ("1", "2048", "1")
    assert (flags["speculative"], flags["compilation_mode"]) == ("eagle:3", "NONE")
    assert flags["kv_cache_dtype"] == flags["cudagraph_mode"] == "unknown"
    assert facts.dtype == "bfloat16"
    assert facts.shape == shape_of("Qwen/Qwen3-30B-A3B")
    assert facts.config_digest == shape_digest(shape_of("Qwen/Qwen3-30B-A3B"))


def test_a_model_that_cannot_be_sized_still_has_a_digest_and_nothing_raises() -> None:
    odd = SimpleNamespace(to_dict=lambda: {"hidden": 1})

    facts = launch_facts(vllm_config(hf_config=odd, hf_text_config=odd))
    assert facts.shape is None
    assert str(facts.config_digest).startswith("raw-")
    assert launch_facts(object()).config_digest is None
    assert set(flags_of(str(launch_facts(object()).flags)).values()) == {"unknown"}


def test_the_channel_carries_the_facts_and_an_older_plugins_file_is_still_read(tmp_path: Path) -> None:
    info = replace(
        engine_info("m", boards=1, launch_sequences=64, shape=shape_of("deepseek-ai/DeepSeek-V3"), step_tokens=8192),
        capabilities={"preempt": True},
    )
    engine = EngineChannel(tmp_path, info, name="e")
    assert AgentChannel(engine.path).info == info

    raw = engine.path.read_bytes()
    short = raw.replace(b', "step_tokens": 8192', b" " * len(b', "step_tokens": 8192'))
    engine.path.write_bytes(short)
    assert AgentChannel(engine.path).info == replace(info, step_tokens=None)
    engine.path.write_bytes(raw.replace(b'"step_tokens"', b'"unknown_one"'))
    with pytest.raises(ValueError, match=r"another PALS version .*unknown_one is unknown"):
        AgentChannel(engine.path)


def test_prefix_caching_is_the_load_s_matter_and_no_mismatch() -> None:
    a, b = (replace(MINE, flags=f"chunked_prefill=1 prefix_caching={on}") for on in (0, 1))

    assert a.differences(b) == []
    assert a.differences(replace(b, flags="chunked_prefill=0 prefix_caching=1")) != []
