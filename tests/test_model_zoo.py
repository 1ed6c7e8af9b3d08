"""The shipped models: names are forgiving and errors helpful; a folder is made once and vLLM's libraries read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pals.core.errors import ConfigError
from pals.engines.model_zoo import full_name, local_folder, model_names

PROMISED = (  # noqa: SIM905 - a list of names reads best as words
    "Mixtral-8x7B Mixtral-8x22B Qwen3-30B-A3B Qwen3-235B-A22B DeepSeek-V3 OLMoE-1B-7B Qwen1.5-MoE-A2.7B deepseek-moe-16b "
    "Phi-3.5-MoE Llama-3.1-8B Llama-3.1-70B Llama-2-7b Mistral-7B gpt2"
).split()


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_model_is_known_by_its_short_name(name: str) -> None:
    assert name.lower() in full_name(name).lower()
    assert full_name(full_name(name).upper()) == full_name(name)


def test_a_mistyped_or_ambiguous_name_gets_help() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'mistralai/Mixtral-8x7B-v0\.1'"):
        full_name("Mixtrel-8x7B-v0.1")
    with pytest.raises(ConfigError, match="may mean"):
        full_name("mixtral")


def test_the_tokenizer_speaks_the_canned_text_and_special_tokens_lie_on_top(olmoe: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(olmoe))
    config = json.loads((olmoe / "config.json").read_text())
    canned = json.loads((olmoe / "canned_ids.json").read_text())

    assert tokenizer.decode(canned).startswith("A language model turns electricity into text")
    assert tokenizer.eos_token_id == config["eos_token_id"] == len(tokenizer) - 1 < config["vocab_size"]
    assert "user: hi" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_a_folder_is_made_once(olmoe: Path) -> None:
    before = (olmoe / "tokenizer.json").stat().st_mtime_ns

    assert local_folder("allenai/OLMoE-1B-7B-0924", olmoe.parent) == olmoe
    assert (olmoe / "tokenizer.json").stat().st_mtime_ns == before
    assert len(model_names()) == 14
