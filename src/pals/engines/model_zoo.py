"""Models that can be served emulated: shapes shipped as config.json, with a tokenizer trained here in a second.

A folder made once holds what vLLM asks of a model folder, and no weights.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError

VOCABULARY = 16000
CORPUS_FILES = 120
SPECIAL = ("<unk>", "<s>", "</s>")
FORMAT = "2"  # folders of another format are made anew
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def model_names() -> list[str]:
    """Names of all shipped shapes, as on the hub."""
    folder = files("pals.engines") / "model_configs"
    return sorted(p.name.removesuffix(".json").replace("--", "/") for p in folder.iterdir() if p.name.endswith(".json"))


def full_name(name: str) -> str:
    """The hub name for `name`, which may lack the owner, differ in case or stop short where that is unambiguous.

    Raises:
        ConfigError: unknown or ambiguous.
    """
    names, wanted = model_names(), name.lower()
    exact = [n for n in names if plain(name) in (plain(n), plain(n.split("/")[-1]))]
    found = exact or [n for n in names if n.lower().split("/")[1].startswith(wanted) or n.lower().startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"model {name!r} may mean {', '.join(found)}; write one in full. Nothing was started")
    shorts = {n.lower().split("/")[1]: n for n in names}
    near = difflib.get_close_matches(wanted.split("/")[-1], shorts, n=1, cutoff=0.4)
    hint = f"did you mean {shorts[near[0]]!r}? " if near else ""
    raise ConfigError(
        f"no shape of model {name!r} is shipped; {hint}`pals models` lists them, or give a folder with a config.json and "
        "a tokenizer. Nothing was started"
    )


def read_config(model: str) -> tuple[str, dict[str, Any]]:
    """Name and config.json of a shipped model, or of a folder; no tokenizer is made.

    Raises:
        ConfigError: unknown name, or no readable config.json.
    """
    folder = Path(model)
    if not folder.is_dir():
        full = full_name(model)
        return full, shipped_config(full)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {folder / 'config.json'}: {e}. Nothing was started") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'} holds no object. Nothing was started")
    return model, config


def shipped_config(full: str) -> dict[str, Any]:
    """The config.json of a shipped model, by its full name."""
    path = files("pals.engines") / "model_configs" / f"{full.replace('/', '--')}.json"
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def plain(name: str) -> str:
    """A name without case and dashes: people write GPT-2 and gpt2."""
    return re.sub(r"[-_ ]", "", name.lower())


def local_folder(name: str, cache: Path) -> Path:
    """The model folder of `name` in `cache`; made where it is missing (one or two seconds)."""
    full = full_name(name)
    folder = cache / f"{full.replace('/', '--')}-{FORMAT}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    try:
        build_folder(full, fresh)
        fresh.chmod(0o755)
        os.rename(fresh, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def build_folder(full: str, folder: Path) -> None:
    """Write config, tokenizer and canned text of one model into `folder`."""
    config = shipped_config(full)
    tokenizer, canned = train_tokenizer()
    bos, eos = (tokenizer.token_to_id(t) for t in SPECIAL[1:])
    config |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    tokenizer.save(str(folder / "tokenizer.json"))
    length = config.get("max_position_embeddings", config.get("n_positions", 4096))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "model_max_length": length,
        "chat_template": CHAT_TEMPLATE,
    }
    documents = {
        "config.json": config,
        "tokenizer_config.json": described,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
        "canned_ids.json": canned,
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content) + "\n")


def train_tokenizer() -> tuple[Any, list[int]]:
    """A byte-level BPE over the canned text and the standard library's sources, and the canned text in its ids.

    Special tokens get the highest ids, so that "the last legal token" of a grammar is its end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = (files("pals.engines") / "canned_text.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(text), trainer=trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer, list(tokenizer.encode(text, add_special_tokens=False).ids)


def corpus(text: str) -> Iterator[str]:
    """Text to learn from: the canned text, many times, then sources of the standard library in a fixed order."""
    yield from [text] * 20
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:CORPUS_FILES]:
        yield path.read_text(encoding="utf-8", errors="replace")
