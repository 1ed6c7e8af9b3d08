"""Trace readers: every format in its own writing, the committed files whole, and whatever does not fit named with its row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import data_folder
from pals.plant.servegen import read_client_models
from pals.plant.traces import COMMITTED, read_lengths, read_trace, trace_path

TRACES = data_folder() / "traces"
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0781490,110,27
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
2024-05-10 02:00:00+02:00,76,15
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_azure_2023_counts_from_its_first_request(tmp_path: Path) -> None:
    w = read_trace(write(tmp_path, AZURE_2023))

    assert w.arrival_s == pytest.approx([0.0, 0.052, 0.098189], abs=1e-6)
    assert w.prompt_tokens.tolist() == [4808, 3180, 110]
    assert w.output_tokens.tolist() == [10, 8, 27]
    assert w.prefix_tokens.tolist() == [0, 0, 0]


def test_azure_2024_has_time_zones_and_any_number_of_digits(tmp_path: Path) -> None:
    text = AZURE_2024.replace("2024-05-10 02:00:00+02:00", "2024-05-10 02:00:00.5+02:00")

    assert read_trace(write(tmp_path, text)).arrival_s == pytest.approx([0.0, 0.007405, 0.49007], abs=1e-6)
    with pytest.raises(ConfigError, match=r"row 3: its time lies before that of the first row"):
        read_trace(write(tmp_path, AZURE_2024))


def test_burstgpt_counts_from_its_first_row_and_leaves_out_failed_requests(tmp_path: Path) -> None:
    v1 = read_trace(write(tmp_path, BURSTGPT))
    with_session = [
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,7,1.5,ChatGPT,472,18,490,Conversation log",
        "5.5,,2,ChatGPT,10,20,30,API log",
    ]
    v2 = read_trace(write(tmp_path, "\n".join(with_session)))

    assert v1.arrival_s.tolist() == [0.0, 113.0]
    assert v1.output_tokens.tolist() == [18, 276]
    assert v2.arrival_s.tolist() == [0.0, 0.5]


def test_mooncakes_prefixes_are_those_of_a_cache_that_never_evicts(tmp_path: Path) -> None:
    requests = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 9]},
        {"timestamp": 1500, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 9]},  # all of it is held
        {
            "timestamp": 2000,
            "input_length": 600,
            "output_length": 5,
            "hash_ids": [8, 1],
        },  # known, but not from the start
    ]
    w = read_trace(write(tmp_path, "\n".join(map(json.dumps, requests)), "m.jsonl"))

    assert w.arrival_s.tolist() == [0.0, 1.5, 1.5, 2.0]
    assert w.prefix_tokens.tolist() == [0, 1024, 1030, 0]


def test_the_committed_mooncake_prefixes_are_the_published_ones() -> None:
    ours, theirs = read_trace(TRACES / "mooncake_synthetic.jsonl.gz"), read_trace(TRACES / "mooncake_synthetic.csv.gz")

    assert np.array_equal(ours.prefix_tokens, theirs.prefix_tokens)
    assert ours.prefix_tokens.sum() > 10_000_000


def test_lengths_come_from_lists_tables_and_conversations(tmp_path: Path) -> None:
    pairs = [{"input_tokens": 7, "output_tokens": 9.0}]
    talk = [
        {"conversations": [{"from": "human", "value": "x" * 41}, {"from": "gpt", "value": "y" * 8}, {"from": "human", "value": "z"}]},
        {"conversations": [{"from": "gpt", "value": "alone"}]},
    ]  # fmt: skip
    for text, name, expected in [
        (json.dumps(pairs), "l.json", (7, 9)),
        (json.dumps(talk), "share.json", (11, 2)),
        ("input_tokens,output_tokens\n7,9\n", "l.csv", (7, 9)),
        ("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n7,9,16,0.8\n", "v.csv", (7, 9)),
        ("arrival_s,input_tokens,output_tokens\n3,7,9\n", "t.csv", (7, 9)),
    ]:
        prompt, output = read_lengths(write(tmp_path, text, name)).draw(2, np.random.default_rng(0))
        assert (prompt.tolist(), output.tolist()) == ([expected[0]] * 2, [expected[1]] * 2), name


def test_lengths_alone_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lengths without arrival times; say when requests arrive"):
        read_trace(trace_path("vidur-arxiv", TRACES))


def test_gzipped_files_read_alike_whatever_they_are_called(tmp_path: Path) -> None:
    packed = tmp_path / "trace.csv"
    packed.write_bytes(gzip.compress(AZURE_2023.encode()))

    assert read_trace(packed).prompt_tokens.tolist() == [4808, 3180, 110]


@pytest.mark.parametrize(("name", "requests", "rate"), [
    ("azure-2023-conv", 19366, 5.53), ("azure-2023-code", 8819, 2.57), ("mooncake-synthetic", 3993, 3.91),
])  # fmt: skip
def test_committed_traces_are_whole(name: str, requests: int, rate: float) -> None:
    w = read_trace(trace_path(name, TRACES), name=name)

    assert len(w) == requests
    assert w.rate_per_s == pytest.approx(rate, abs=0.005)
    assert name in COMMITTED


def test_runs_of_a_real_server_are_traces_too() -> None:
    path = data_folder() / "llmservingsim-vllm-ground-truth" / "RTX4090__Llama-3.1-8B__requests.csv.gz"

    assert len(read_trace(path)) == 300


HEADER = "arrival_s,input_tokens,output_tokens\n"


@pytest.mark.parametrize(("text", "told"), [
    ("", r"trace\.csv is empty"),
    (HEADER, r"trace\.csv holds no request"),
    (HEADER + "0,1,1\n-1,1,1\n", r"trace\.csv, row 2: the time -1 lies before the start; count times"),
    (HEADER + "1700000000,1,1\n", r"row 1: the first request comes after 1\.7e\+09 s, as in Unix times; count times"),
    (HEADER + "5,1,1\n4.5,1,1\n", r"row 2: the time falls from 5 s to 4\.5 s; sort the file by time"),
    (HEADER + "0,1.5,1\n", r"row 1: input_tokens is '1\.5', not a whole number"),
    (HEADER + "0,1,many\n", r"row 1: output_tokens is 'many', not a whole number"),
    (HEADER + "0,1,inf\n", r"row 1: output_tokens is 'inf', not a whole number"),
    (HEADER + "0,1,0\n", r"row 1: a request with 0 output tokens"),
    (HEADER + "0,3000000000,1\n", r"row 1: a request with 3000000000 prompt tokens"),
    (HEADER + "nan,1,1\n", r"row 1: arrival_s is 'nan', which is no time"),
    (HEADER + "0,1\n", r"row 1: 2 values where the header names 3"),
    ("arrival_s,input_tokens,output_tokens,user\n0,1,1,a\n", r"row 0: unknown column 'user'.* remove it"),
    ("arrival_s,input_tokens,output_tokens,cached_prefix_tokens_inf\n0,5,1,6\n", r"row 1: 6 cached of 5 prompt tokens"),
    ("when,prompt,output\n0,1,1\n", r"row 0: the columns when, prompt, output are of no known format; rename them"),
    (AZURE_2023.replace("2023-11-16 18:17:04.0319600", "yesterday"), r"row 2: TIMESTAMP is 'yesterday', which is no time"),
])  # fmt: skip
def test_what_does_not_fit_is_named_with_its_row(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(("lines", "told"), [
    ([{"timestamp": 0, "input_length": 5, "output_length": 1}, {"timestamp": -1}], "row 2: input_length is missing; add it"),
    ([{"timestamp": 0, "input_length": 5, "output_length": 1, "user": 3}], "row 1: unknown key 'user'"),
    ([{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": 3}], "row 1: hash_ids is no list"),
    ([{"timestamp": "0", "input_length": 5, "output_length": 1}], "row 1: timestamp is '0', not milliseconds"),
    ([{"timestamp": 0, "input_length": True, "output_length": 1}], "row 1: input_length is True, not a whole number"),
])  # fmt: skip
def test_json_lines_that_do_not_fit_are_named_with_their_row(
    lines: Sequence[dict[str, object]], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        read_trace(write(tmp_path, "\n".join(map(json.dumps, lines)), "m.jsonl"))


def test_files_that_are_not_there_cut_off_or_binary_are_one_clear_error(tmp_path: Path) -> None:
    cut, binary = tmp_path / "cut.csv.gz", tmp_path / "b.csv"
    cut.write_bytes(gzip.compress(AZURE_2023.encode() * 50)[:80])
    binary.write_bytes(b"\xff\xfe\x00\x81" * 9)

    for path in (tmp_path / "none.csv", tmp_path, cut, binary, write(tmp_path, "[{", "x.json")):
        with pytest.raises(ConfigError, match=path.name):
            read_trace(path)
    with pytest.raises(ConfigError, match=r"no trace 'azure-2025'.* azure-2023-conv"):
        trace_path("azure-2025", TRACES)
    with pytest.raises(ConfigError, match="unknown format 'excel'"):
        read_trace(cut, kind="excel")
    with pytest.raises(ConfigError, match="are of no known format; rename"):
        read_trace(write(tmp_path, AZURE_2023), kind="burstgpt")


def test_servegens_clients_keep_rate_and_burstiness_and_lend_lengths() -> None:
    models = read_client_models(TRACES, "m-large")
    published = models.rate_per_s(86400.0, 1800.0)
    w = models.workload(start_s=86400.0, duration_s=1800.0, rate_per_s=None, rng=np.random.default_rng(1))
    fewer = models.workload(start_s=86400.0, duration_s=1800.0, rate_per_s=4.0, rng=np.random.default_rng(1))

    assert len(w) / 1800.0 == pytest.approx(published, rel=0.02)
    assert len(fewer) / 1800.0 == pytest.approx(4.0, rel=0.05)
    assert fewer.gap_cv > 1.2  # a Poisson process has 1
    assert fewer.prompt_tokens.mean() == pytest.approx(w.prompt_tokens.mean(), rel=0.1)
    with pytest.raises(ConfigError, match="lies outside"):
        models.workload(start_s=models.end_s, duration_s=600.0, rate_per_s=None, rng=np.random.default_rng(1))
    with pytest.raises(ConfigError, match="rate is not above 0"):
        models.workload(start_s=0.0, duration_s=600.0, rate_per_s=0.0, rng=np.random.default_rng(1))
    with pytest.raises(ConfigError, match="cannot read ServeGen"):
        read_client_models(TRACES, "m-tiny")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "marked.csv"
    path.write_text("\ufeffarrival_s,input_tokens,output_tokens\n0,10,5\n", encoding="utf-8")

    assert read_trace(path).prompt_tokens.tolist() == [10]
