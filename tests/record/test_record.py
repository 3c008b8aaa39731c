"""The command `record` up to where Ray starts: identity, bad input, resumption of the plan."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lrmc_ray.chat.answers import RENDERING
from lrmc_ray.config import load_settings
from lrmc_ray.config.arguments import without_aliases
from lrmc_ray.console import run_command
from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import file_digest, write_manifest
from lrmc_ray.record import command
from lrmc_ray.record import examples as examples_module
from lrmc_ray.record import identity as identity_module
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run
from lrmc_ray.record import sources as sources_module
from lrmc_ray.record.actors import Recorder, part_of, recorder_options
from lrmc_ray.record.command import main
from lrmc_ray.record.describe import PartTotals
from lrmc_ray.record.examples import read_examples
from lrmc_ray.record.identity import check_fits
from lrmc_ray.record.names import EXAMPLES, PLAN, REJECTS
from lrmc_ray.record.prepare import cut_into_shards, prepare
from tests.support.chat_templates import shipped
from tests.support.tiny import make_data, make_model_of_type

GOOD = {"prompt": "What is 2?", "completion": "Two."}


@pytest.fixture
def no_ray(monkeypatch):
    """Fail where Ray would start: what is refused is refused before."""

    def started(*arguments, **options):
        pytest.fail("Ray was started")

    monkeypatch.setattr(command, "ray_session", started)


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def settings_for(model: Path, *data: object, overrides: tuple[str, ...] = ()):
    names = json.dumps([str(name) for name in data])
    return load_settings(None, [f'model.name="{model}"', f"data.train={names}", *overrides])


# Bad input, with its exit code, before Ray starts and before a model is loaded

BAD = json.dumps({"prompt": "2?"}).encode()
CATALOGUE: dict[str, tuple[list[Any], int, str]] = {
    # JSONL
    "broken line": ([GOOD, b'{"prompt": "2?", '], 4, ":2: not valid JSON"),
    "empty file": ([], 4, "no rows"),
    "byte order mark in the middle": ([GOOD, b"\xef\xbb\xbf{}"], 4, ":2: not valid JSON"),
    "NUL": ([GOOD, b'{"text": "a\0b"}'], 4, ":2: not valid JSON"),
    "no UTF-8": ([b'{"text": "\xc3\x28"}'], 4, ":1: not valid JSON"),
    "half a surrogate pair": ([b'{"text": "a \\ud800"}'], 4, "surrogates not allowed"),
    "missing field": ([{"prompt": "2?"}], 4, "has prompt"),
    "wrong type": ([{**GOOD, "completion": 2}], 4, "must be strings"),
    "null": ([{**GOOD, "prompt": None}], 4, "has completion"),
    "nested null": ([{"messages": [None]}], 4, "each message needs"),
    "nothing but spaces": ([{**GOOD, "completion": " \t"}], 4, "'completion' is empty"),
    "an id twice": ([{**GOOD, "id": 1}, {"text": "a b", "id": 1}], 4, "was used before"),
    "no object": ([[GOOD]], 4, "not a JSON object"),
    # Length
    "prompt as long as allowed": ([{"prompt": "x " * 90, "completion": "y"}], 4, "more than"),
    "nothing to learn": ([{"text": "I"}], 4, "none of its first 1 tokens"),
}


@pytest.mark.parametrize("case", CATALOGUE)
def test_bad_rows_end_record_with_their_code(case, tmp_path, tiny_model, no_ray, capsys):
    rows, code, said = CATALOGUE[case]
    data = write(tmp_path / "train.jsonl", *rows)
    argv = ["--model", str(tiny_model), "--train-data", str(data), "--output", str(tmp_path / "o")]
    assert run_command(main, [*argv, "--max-length", "64"]) == code
    error = capsys.readouterr().err
    assert "error: " in error
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("error", "more than data.max_length = 16"),
        ("drop", "no sample is left (1 dropped"),
        ("truncate", "none of its first 16 tokens is to be learned"),
    ],
)
def test_a_prompt_that_fills_max_length_ends_with_code_4(
    tmp_path, tiny_model, no_ray, capsys, policy, said
):
    data = write(tmp_path / "train.jsonl", {"prompt": "x " * 90, "completion": "y"})
    argv = ["--model", str(tiny_model), "--train-data", str(data), "--output", str(tmp_path / "o")]
    assert run_command(main, [*argv, "--max-length=16", "--on-long", policy]) == 4
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--on-bad-row", "ignore"], 2, "data.on_bad_row must be 'error' or 'skip', got 'ignore'"),
        (["--max-length", "1"], 2, "data.max_length must be greater than or equal to 2, got 1"),
        (["--prompt-k-max", "-1"], 2, "record.prompt_k_max must be greater than or equal to 0"),
        (["--k-max", "0"], 2, "record.k_max must be greater than or equal to 1, got 0"),
        (["--actors", "2,1"], 2, "actors must be [fewest, most]"),
        (["--actors", "two"], 2, "resources.actors"),
        (["--num-gpus-per-actor", "-1"], 2, "resources.gpus_per_actor must be"),
        (["data.max_rejected_share=1.5"], 2, "data.max_rejected_share must be"),
        (["record.tau=1.01"], 2, "record.tau must be"),
        (["record.tau=nan"], 2, "record.tau must be"),
        (['record.tau="0.9"'], 2, "record.tau must be a valid number"),
    ],
)
def test_bad_settings_end_record_with_code_2(tmp_path, no_ray, capsys, argv, code, said):
    assert run_command(main, [*argv, "--output", str(tmp_path / "o")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_tokenizer_with_more_tokens_than_the_head_is_code_4(tmp_path, tiny_model, capsys, no_ray):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] = 511
    (model / "config.json").write_text(json.dumps(config))
    data = make_data(tmp_path / "train.jsonl", num_rows=3)
    argv = ["--model", str(model), "--train-data", str(data), "--output", str(tmp_path / "o")]
    assert run_command(main, argv) == 4
    assert "the tokenizer has 512 tokens, the model's head only 511" in capsys.readouterr().err


# Rows that are left out


def test_skipped_rows_are_listed_in_a_file_beside_the_record(tmp_path, tiny_model):
    data = write(tmp_path / "train.jsonl", *[{"text": f"a b {i}"} for i in range(98)], BAD, b"{")
    settings = settings_for(tiny_model, data, overrides=("data.on_bad_row=skip",))
    prepared = prepare(settings, tmp_path)
    plan = json.loads((prepared.partial / PLAN).read_text())
    assert (plan["samples"], plan["rejected"]) == (98, 2)
    notes = [json.loads(line) for line in (prepared.partial / REJECTS).read_text().splitlines()]
    assert [note["place"] for note in notes] == [f"{data}:99", f"{data}:100"]


def test_the_cap_on_skipped_rows_holds_for_what_was_skipped_before(tmp_path, tiny_model, no_ray):
    data = write(tmp_path / "train.jsonl", *[{"text": f"a b {i}"} for i in range(9)], BAD)
    skip = ("data.on_bad_row=skip",)
    with pytest.raises(DataError, match=r"at most 5\.00% of the rows may be skipped"):
        prepare(settings_for(tiny_model, data, overrides=skip), tmp_path)
    generous = settings_for(tiny_model, data, overrides=(*skip, "data.max_rejected_share=0.1"))
    prepared = prepare(generous, tmp_path)
    with pytest.raises(DataError, match=r"1 of 10 were; .*rejects\.jsonl lists them"):
        prepare(settings_for(tiny_model, data, overrides=skip), tmp_path)
    # And the same once it is finished.
    prepared.final.mkdir()
    write_manifest(prepared.final, {"rejects": {"rows": 10, "count": 1}})
    assert prepare(generous, tmp_path).final == prepared.final
    with pytest.raises(DataError, match=r"may be skipped"):
        prepare(settings_for(tiny_model, data, overrides=skip), tmp_path)


# Identity: what changes it, what does not


def identity_of(model, *data, overrides=()):
    settings = settings_for(model, *data, overrides=overrides)
    sources = sources_module.training_sources(settings)
    return identity_module.identify(settings, model, sources)[0]


@pytest.fixture
def model(tmp_path, tiny_model):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "train.jsonl", num_rows=6)


def one_weight(model, data):
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def model_configuration(model, data):
    path = model / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def tokenizer_file(model, data):
    path = model / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def chat_template(model, data):
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> ", 1))


def byte_of_the_data(model, data):
    data.write_text(data.read_text().replace("What", "what", 1))


def one_more_row(model, data):
    data.write_text(data.read_text() + json.dumps(GOOD) + "\n")


CHANGES = {
    "model": (one_weight, model_configuration),
    "chat_template": (chat_template,),
    "tokenizer": (tokenizer_file,),
    "data": (byte_of_the_data, one_more_row),
}
CASES = [(field, change) for field, changes in CHANGES.items() for change in changes]


def test_how_conversations_are_rendered_is_part_of_the_identity(model, data):
    assert identity_of(model, data)["rendering"] == RENDERING


def test_fields_of_results_that_no_template_renders_are_said_once(tmp_path, model, caplog):
    (model / "chat_template.jinja").write_text(shipped()["qwen2_5"])
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": "c1", "content": "two"},
        {"role": "assistant", "content": "Two."},
    ]
    data = write(tmp_path / "train.jsonl", *[{"messages": messages, "id": i} for i in range(3)])
    prepare(settings_for(model, data, overrides=("data.max_length=4096",)), tmp_path)
    assert "the day's date" not in caplog.text
    said = [r.getMessage() for r in caplog.records if "of tools' results" in r.getMessage()]
    assert len(said) == 1
    assert "does not render 'name' and 'tool_call_id' of tools' results" in said[0]


def test_a_template_that_writes_the_date_is_said(tmp_path, model, data, caplog):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + template)
    prepare(settings_for(model, data), tmp_path)
    assert "writes the day's date into every prompt" in caplog.text


@pytest.mark.parametrize(("field", "change"), CASES)
def test_what_matters_is_refused_by_name(tmp_path, model, data, field, change):
    before = identity_of(model, data)
    record = tmp_path / "record"
    record.mkdir()
    write_manifest(record, {"kind": "records", "identity": before})
    check_fits(record, settings_for(model, data), model)
    change(model, data)
    after = identity_of(model, data)
    different = {name for name in before if before[name] != after[name]}
    # The template is one of the tokenizer's files.
    assert different == {field} | ({"tokenizer"} if field == "chat_template" else set())
    with pytest.raises(DataError) as caught:
        check_fits(record, settings_for(model, data), model)
    name = {"data": "training data", "chat_template": "chat template"}.get(field, field)
    assert f"was recorded with another {name} ({before[field]})" in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("record.tau=0.999", "tau"),
        ("train.tau=0.98", "tau"),
        ("record.k_min=3", "k_min"),
        ("record.k_max=100", "k_max"),
        ("record.prompt_k_max=32", "prompt_k_max"),
        ("record.precision=bf16", "precision"),
        ("data.max_length=512", "max_length"),
        ("data.on_long=drop", "on_long"),
        ("data.on_bad_row=skip", "on_bad_row"),
    ],
)
def test_settings_that_matter_change_their_field(model, data, override, field):
    before, after = identity_of(model, data), identity_of(model, data, overrides=(override,))
    assert {name for name in before if before[name] != after[name]} == {field}


@pytest.mark.parametrize(
    "override",
    [
        "resources.actors=[1,7]",
        "resources.workers=[2,2]",
        "resources.gpus_per_worker=1",
        "resources.gpus_per_actor=0.5",
        "resources.cpus_per_worker=3",
        "train.batch_size=4",
        "train.lr=1e-3",
        "train.seed=9",
        "evaluate.limit=2",
        "search.name=other",
        "data.max_rejected_share=0.5",
    ],
)
def test_settings_that_do_not_matter_change_nothing(model, data, override):
    assert identity_of(model, data) == identity_of(model, data, overrides=(override,))


def test_moving_renaming_touching_and_reordering_change_nothing(tmp_path, model, data):
    other = make_data(tmp_path / "other.jsonl", num_rows=3, seed=1)
    before = prepare(settings_for(model, data, other), tmp_path / "a")
    moved = tmp_path / "else where" / "zz.jsonl"
    moved.parent.mkdir()
    data.rename(moved)
    os.utime(moved, (1, 1))
    model = model.rename(tmp_path / "renamed")
    os.utime(model / "model.safetensors", (1, 1))
    after = prepare(settings_for(model, other, moved), tmp_path / "b")
    assert after.final.name == before.final.name
    # Not even the order of the samples.
    assert file_digest(after.partial / EXAMPLES) == file_digest(before.partial / EXAMPLES)
    folder = prepare(settings_for(model, tmp_path / "else where", other), tmp_path / "c")
    assert folder.final.name == before.final.name


def test_a_label_of_a_file_is_part_of_the_data(model, data):
    plain, labelled = identity_of(model, data), identity_of(model, f"sql={data}")
    assert plain["data"] != labelled["data"]
    assert identity_of(model, f"radio={data}")["data"] != labelled["data"]


def test_training_may_ask_for_less_than_was_recorded_but_not_for_more(tmp_path, model, data):
    record = tmp_path / "record"
    record.mkdir()
    identity = identity_of(model, data, overrides=("record.tau=0.99", "record.k_min=2"))
    write_manifest(record, {"kind": "records", "identity": identity})
    for less in ("train.tau=0.5", "record.k_max=64", "train.k_min=2"):
        check_fits(record, settings_for(model, data, overrides=(less,)), model)
    with pytest.raises(DataError, match=r"with tau = 0\.99, training asks for 0\.995.*train\.tau"):
        check_fits(record, settings_for(model, data, overrides=("train.tau=0.995",)), model)
    more = ("train.k_min=3", "record.k_min=3")
    with pytest.raises(DataError, match=r"with k_min = 2, training asks for 3"):
        check_fits(record, settings_for(model, data, overrides=more), model)


def test_training_needs_the_record_but_not_the_data(tmp_path, model, data):
    record = tmp_path / "record"
    record.mkdir()
    write_manifest(record, {"identity": identity_of(model, data)})
    settings = settings_for(model, data)
    data.unlink()
    check_fits(record, settings, model)
    one_weight(model, data)
    with pytest.raises(DataError, match="another model"):
        check_fits(record, settings, model)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("schema", "1", r"another schema version \(1\)"),
        ("rendering", None, r"another version of the code that renders conversations \(None\)"),
    ],
)
def test_a_record_of_another_version_is_refused_by_name(tmp_path, model, data, field, value, told):
    record = tmp_path / "record"
    record.mkdir()
    write_manifest(record, {"identity": {**identity_of(model, data), field: value}})
    with pytest.raises(DataError, match=told):
        check_fits(record, settings_for(model, data), model)


# The plan


def test_examples_that_were_damaged_are_tokenized_again(tmp_path, model, data):
    settings = settings_for(model, data)
    prepared = prepare(settings, tmp_path)
    good = (prepared.partial / EXAMPLES).read_bytes()
    plan = (prepared.partial / PLAN).read_text()
    for content in (good[:-1], good[:40] + bytes([good[40] ^ 1]) + good[41:], b""):
        (prepared.partial / EXAMPLES).write_bytes(content)
        prepare(settings, tmp_path)
        assert (prepared.partial / EXAMPLES).read_bytes() == good
        assert (prepared.partial / PLAN).read_text() == plan
    (prepared.partial / EXAMPLES).unlink()
    prepare(settings, tmp_path)
    assert (prepared.partial / EXAMPLES).read_bytes() == good


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_examples_are_found_whatever_the_window(tmp_path, model, data, window, monkeypatch):
    monkeypatch.setattr(examples_module, "SORT_WINDOW", window)
    monkeypatch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 60)
    prepared = prepare(settings_for(model, data), tmp_path)
    plan = json.loads((prepared.partial / PLAN).read_text())
    path = prepared.partial / EXAMPLES
    rows = [row for s in plan["shards"] for row in read_examples(path, s["start"], s["stop"])]
    assert len(plan["shards"]) > 1
    assert len(rows) == len({row["sample_id"] for row in rows}) == plan["samples"] == 6
    assert sum(len(row["input_ids"]) for row in rows) == plan["tokens"]
    lengths = [len(row["input_ids"]) for row in rows]
    for start in range(0, 6, window):
        assert lengths[start : start + window] == sorted(lengths[start : start + window])


@pytest.mark.parametrize(
    ("num_samples", "target"), [(50, 4096), (3000, 7054), (5000, 11_732), (20_000, 16_384)]
)
def test_shards_cover_every_sample_once_in_order(num_samples, target):
    """About equal, neither so small that there are many nor so large that memory grows."""
    lengths = [(7 * i) % 300 + 1 for i in range(num_samples)]
    shards = cut_into_shards(lengths)
    edges = [shard["start"] for shard in shards] + [shards[-1]["stop"]]
    assert edges[0] == 0
    assert edges[-1] == num_samples
    assert all(shard["stop"] == edges[i + 1] for i, shard in enumerate(shards))
    assert len({shard["name"] for shard in shards}) == len(shards)
    tokens = [sum(lengths[shard["start"] : shard["stop"]]) for shard in shards]
    assert all(target <= count < target + 301 for count in tokens[:-1])


# What the driver keeps


def described(number, *, domain="a"):
    return {
        "name": f"part-{number}",
        "rows": number,
        "sha256": f"{number:064x}",
        **{key: 10 * number + place for place, key in enumerate(COUNTS)},
        "k_values": [1, number + 1],
        "k_counts": [3, number],
        "domains": {domain: [number, 2 * number]},
    }


COUNTS = (
    *("bytes", "candidate_bytes", "position_bytes", "supervised", "prompt", "active", "capped"),
    *("supervised_candidates", "prompt_candidates", "padding_candidates"),
)


def test_totals_say_of_files_what_their_list_would():
    from lrmc_ray.record.describe import summarize

    counts = ("samples", "tokens", "dropped", "truncated", "rejected")
    plan: dict[str, Any] = dict.fromkeys(counts, 1)
    plan["split_conversations"] = 0
    plan["formats"] = {}
    parts = [described(1), described(2), described(5, domain="b"), described(9)]
    totals = PartTotals()
    kept = [totals.add(part) for part in parts]
    assert summarize(plan, [totals.sums]) == summarize(plan, parts)
    assert kept == [{key: part[key] for key in ("name", "rows", "sha256")} for part in parts]


def test_a_file_that_was_replaced_is_counted_as_it_is_on_disk(tiny_model, tmp_path, monkeypatch):
    """An actor that was thought dead wrote once more, on a processor that rounds otherwise."""
    data = make_data(tmp_path / "train.jsonl", num_rows=60)
    overrides = [f'model.name="{tiny_model}"', f'data.train="{data}"']

    def here(prepared, shards, tokenizer_size, *, lie):
        recorder = Recorder(**recorder_options(prepared, tokenizer_size))
        for number, shard in enumerate(shards):
            part = recorder.record(shard)
            changed = {"sha256": "0" * 64, "supervised": 10**9} if lie and number == 0 else {}
            yield {**part, **changed}
            yield {**part, **changed}  # told twice

    manifests = []
    for lie in (False, True):
        monkeypatch.setattr(record_run, "run_actors", functools.partial(here, lie=lie))
        directory = record_run.record(load_settings(None, overrides), tmp_path / str(lie))
        manifests.append(json.loads((directory / "manifest.json").read_text()))
    for name in ("summary", "files"):
        assert manifests[0][name] == manifests[1][name]


def test_a_model_that_cannot_be_recorded_is_refused_by_its_name(tmp_path):
    """The actor says so in place of its first file; Ray would start it again and again."""
    data = make_data(tmp_path / "train.jsonl", num_rows=4)
    model = make_model_of_type("bert", tmp_path / "model")
    settings = load_settings(None, [f'model.name="{model}"', f'data.train="{data}"'])
    prepared = prepare(settings, tmp_path / "runs")
    plan = json.loads((prepared.partial / PLAN).read_text())
    recorder = Recorder(**recorder_options(prepared, plan["tokenizer_size"]))
    (told,) = recorder(pa.Table.from_pylist(plan["shards"]))["part"].to_pylist()
    with pytest.raises(DataError, match=r"\(model_type bert\) is not causal.*; choose a model"):
        part_of(told)


# Short names


def test_short_names_are_settings():
    argv = ["--max-length", "9", "train.lr=1e-3", "--on-bad-row=skip", "--actors", "1,4", "--json"]
    assert without_aliases(argv) == [
        *("train.lr=1e-3", "--json", "data.max_length=9"),
        *("data.on_bad_row=skip", "resources.actors=[1,4]"),
    ]
    argv = ["--prompt-k-max=0", "--num-gpus-per-actor", "0.5", "--k-max", "8", "--on-long", "drop"]
    assert without_aliases(argv) == [
        *("data.on_long=drop", "record.k_max=8"),
        *("record.prompt_k_max=0", "resources.gpus_per_actor=0.5"),
    ]


@pytest.mark.parametrize(
    ("asked", "added"),
    [
        ([], []),
        (["resources.gpus_per_worker=0.5"], []),
        (["resources.gpus_per_actor=4"], ["resources.gpus_per_worker=1"]),
        (["resources.gpus_per_actor=0.5", "resources.gpus_per_worker=0.5"], []),
        (["resources.gpus_per_actor=0"], []),
    ],
)
def test_training_behind_a_recording_on_gpus_has_one(asked, added):
    resources = load_settings(None, asked).resources
    assert command.gpu_of_worker(resources) == added
    again = load_settings(None, [*asked, *added]).resources
    assert bool(again.gpus_per_worker) == bool(again.of_actors().gpus_per_worker)


# Fault points


def test_a_fault_point_kills_at_its_pass_and_only_in_a_test():
    code = (
        "from lrmc_ray.files.fault_points import passed\n"
        "for number in range(5):\n"
        "    print(number, flush=True)\n"
        "    passed('record.planned')\n"
        "    passed('record.published')\n"
    )

    def run(**environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("LRMC_")}
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **environment},
            capture_output=True,
            text=True,
        )

    killed = run(LRMC_TESTING="1", LRMC_FAULT="record.published:kill:3")
    assert (killed.returncode, killed.stdout) == (-9, "0\n1\n2\n")
    for harmless in (
        {"LRMC_FAULT": "record.published:kill:3"},
        {"LRMC_TESTING": "0", "LRMC_FAULT": "record.published:kill:3"},
        {"LRMC_TESTING": "1"},
        {"LRMC_TESTING": "1", "LRMC_FAULT": "record.published:kill:6"},
        {"LRMC_TESTING": "1", "LRMC_FAULT": "record.nothing:kill:1"},
    ):
        assert run(**harmless).returncode == 0
