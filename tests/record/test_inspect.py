"""`lrmc inspect`: samples token by token, and every way in which a file can be damaged."""

import json
import random
import shlex
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lrmc_ray.config import load_settings
from lrmc_ray.console import run_command
from lrmc_ray.files.artifacts import MANIFEST, file_digest, read_manifest, write_manifest
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run
from lrmc_ray.record.actors import Recorder, recorder_options
from lrmc_ray.record.inspect import describe_sample, spread_evenly
from lrmc_ray.record.inspect_command import main
from lrmc_ray.record.reader import Records
from lrmc_ray.record.run import record
from tests.support.tiny import make_data, make_model

torch.set_num_threads(1)


def actors_here(prepared, shards, tokenizer_size):
    """What the actors do, in this process."""
    recorder = Recorder(**recorder_options(prepared, tokenizer_size))
    for shard in shards:
        yield recorder.record(shard)


@pytest.fixture(scope="module")
def output(tiny_model, tmp_path_factory):
    """An output directory with one record of several files, two domains, prompts and text."""
    directory = tmp_path_factory.mktemp("runs")
    sql = make_data(directory / "sql.jsonl", num_rows=40)
    text = directory / "text.jsonl"
    text.write_text("".join(f'{{"text": "{"plain text " * (i + 1)}"}}\n' for i in range(5)))
    settings = load_settings(
        None,
        [f'model.name="{tiny_model}"', f'data.train=["sql={sql}", "en={text}"]', "train.tau=0.9"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_run, "run_actors", actors_here)
        patch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 500)
        record(settings, directory)
    return directory


@pytest.fixture(scope="module")
def recorded(output):
    (directory,) = (output / "records").glob("*")
    return directory


@pytest.fixture
def copy(recorded, tmp_path):
    """A record to damage."""
    import shutil

    return shutil.copytree(recorded, tmp_path / "record")


def inspect(*argv, capsys) -> dict[str, Any]:
    assert run_command(main, [*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# What is shown


@pytest.mark.parametrize("below", ["", "records", "record"])
def test_a_record_is_found_where_it_is(output, recorded, capsys, below):
    directory = recorded if below == "record" else output / below
    shown = inspect(directory, capsys=capsys)
    manifest = read_manifest(recorded, made_by="")
    assert shown == {
        "directory": str(recorded),
        "identity": manifest["identity"],
        "summary": manifest["summary"],
    }


def test_of_several_records_one_must_be_named(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "records" / name).mkdir(parents=True)
        write_manifest(tmp_path / "records" / name, {})
    assert run_command(main, [str(tmp_path)]) == 2
    assert "must hold one record, it holds" in capsys.readouterr().err


def test_without_a_finished_record_the_exit_code_is_3(tmp_path, capsys):
    partial = tmp_path / "records" / "a.partial"
    partial.mkdir(parents=True)
    write_manifest(partial, {})
    for directory in (tmp_path, tmp_path / "none"):
        assert run_command(main, [str(directory)]) == 3
        assert (
            "holds no finished record; run `python -m lrmc_ray.record`" in capsys.readouterr().err
        )


def test_every_token_is_shown_with_what_the_base_model_thought(recorded, tiny_model, capsys):
    """Against the model's own softmax, one sequence at a time."""
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    samples = inspect(recorded, "--sample", 45, capsys=capsys)["samples"]
    assert len(samples) == 45
    assert {sample["domain"] for sample in samples} == {"sql", "en"}
    for sample in samples:
        ids = torch.tensor([token["id"] for token in sample["tokens"]])
        assert "".join(token["text"] for token in sample["tokens"]) == tokenizer.decode(ids)
        roles = [token["role"] for token in sample["tokens"]]
        assert roles[0] == "none"
        if sample["domain"] == "en":
            assert set(roles[1:]) == {"supervised"}
        else:
            learned = ids[[role == "supervised" for role in roles]]
            assert tokenizer.decode(learned).startswith("It is ")
            assert tokenizer.decode(learned).endswith("<|im_end|>")
            assert set(roles[1:]) == {"supervised", "prompt"}
        with torch.no_grad():
            p_TV = model(input_ids=ids[None]).logits[0].double().softmax(-1)
        for position, token in enumerate(sample["tokens"][1:]):
            top = token["top"]
            assert 1 <= len(top) <= min(5, token["k"])
            found = p_TV[position][[candidate["id"] for candidate in top]].tolist()
            assert [c["probability"] for c in top] == pytest.approx(found, rel=0.01, abs=1e-6)
            assert token["rho"] <= (0.101 if token["role"] == "supervised" else 1)


def test_the_summary_counts_domains_and_what_each_part_costs(recorded, capsys):
    summary = inspect(recorded, capsys=capsys)["summary"]
    records = Records(recorded)
    samples = [records[index] for index in range(len(records))]
    for domain in ("sql", "en"):
        own = [sample for sample in samples if sample.domain == domain]
        assert summary["domains"][domain] == {
            "samples": len(own),
            "supervised_positions": sum(int(sample.is_supervised_P.sum()) for sample in own),
        }
    assert set(summary["domains"]) == {"sql", "en"}
    on_disk = sum(path.stat().st_size for path in recorded.glob("part-*"))
    assert summary["bytes"] == on_disk
    assert 0 < summary["prompt_bytes"] < summary["supervised_bytes"] < on_disk
    assert summary["supervised_bytes"] + summary["prompt_bytes"] < on_disk
    sizes = torch.cat([s.candidates.sizes[s.is_supervised_P] for s in samples])
    assert summary["k_median"] == int(sizes.sort().values[(len(sizes) + 1) // 2 - 1])
    assert summary["k_95"] == int(sizes.sort().values[-(-95 * len(sizes) // 100) - 1])
    active = sum(
        int((cut.sizes[s.is_supervised_P] > 1).sum())
        for s in samples
        for cut in [_cut(s.candidates, 0.9)]
    )
    assert summary["active_share"] == pytest.approx(active / len(sizes), abs=1e-4)
    assert summary["padding_candidates"] == 0


def _cut(candidates, tau):
    from lrmc_ray.method.subsets import cut

    return cut(candidates, tau, k_min=1)


def test_samples_are_spread_evenly():
    assert spread_evenly(100, 4) == [12, 37, 62, 87]
    assert spread_evenly(3, 9) == [0, 1, 2]
    assert spread_evenly(7, 1) == [3]
    assert spread_evenly(5, 0) == []


def test_the_text_form_names_tokens_candidates_and_the_next_command(recorded, capsys):
    assert run_command(main, [str(recorded), "--sample", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nsample ") == 2
    assert "It is" in shown
    assert "supervised" in shown
    assert "domain en" in shown or "domain sql" in shown
    assert run_command(main, [str(recorded)]) == 0
    said = capsys.readouterr().out
    assert f"lrmc inspect {shlex.quote(str(recorded))} --sample 3, or --verify" in said
    assert said.splitlines()[1].startswith("45 samples (")
    assert "Made of:" in said


def test_samples_begin_at_what_is_learned(recorded, capsys):
    assert run_command(main, [str(recorded), "--sample", "1"]) == 0
    short = capsys.readouterr().out
    assert run_command(main, [str(recorded), "--sample", "1", "--prompt"]) == 0
    whole = capsys.readouterr().out
    (sample,) = inspect(recorded, "--sample", 1, capsys=capsys)["samples"]
    roles = [token["role"] for token in sample["tokens"]]
    first = roles.index("supervised")
    assert first > 1
    assert f"from the first learned token; {first} before it (--prompt)" in short
    assert len(whole.splitlines()) - len(short.splitlines()) == first - 1  # less that line itself
    assert "Made of:" not in short


def test_another_models_tokenizer_is_refused(recorded, tmp_path, capsys):
    other = make_model(tmp_path / "other")
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    assert run_command(main, [str(recorded), "--sample", "1", "--model", str(other)]) == 4
    assert "another tokenizer" in capsys.readouterr().err


def test_without_the_model_ids_stand_for_tokens(copy, capsys):
    manifest = json.loads((copy / MANIFEST).read_text())
    write_manifest(copy, {**manifest, "model": str(copy / "gone")})
    assert run_command(main, [str(copy), "--sample", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert "token ids in place of text" in captured.err
    token = json.loads(captured.out)["samples"][0]["tokens"][0]
    assert token["text"] == str(token["id"])


def test_gold_and_rho_are_those_of_the_position_before(recorded):
    records = Records(recorded)
    sample = records[3]
    tokens = describe_sample(sample, None)["tokens"]
    for row, position in enumerate(sample.positions_P.tolist()):
        token = tokens[position + 1]
        assert token["id"] == int(sample.candidates.gold_ids[row])
        assert token["k"] == int(sample.candidates.sizes[row])
        assert token["rho"] == float(sample.candidates.outside_mass()[row])


# --verify


def verify(directory, capsys) -> tuple[int, str]:
    code = run_command(main, [str(directory), "--verify"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out if code == 0 else captured.err[captured.err.index("error: ") :]


def test_a_good_record_is_verified_and_strays_are_named(copy, capsys):
    code, shown = verify(copy, capsys)
    assert code == 0
    assert "are as they were recorded: 45 samples" in shown
    assert shown.splitlines()[0].startswith("OK: all ")
    assert len(shown.splitlines()) < 10
    assert "never read" not in shown
    (copy / "part-99999.parquet").write_bytes(b"stray")
    code, shown = verify(copy, capsys)
    assert code == 0
    assert "Not of the record, never read: part-99999.parquet" in shown


def flip(content: bytes, rng) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


DAMAGES = {
    "bit flip": flip,
    "truncation": lambda content, rng: content[: rng.randrange(len(content))],
    "zeroed page": lambda content, rng: content[:200] + bytes(256) + content[456:],
    "empty": lambda content, rng: b"",
    "no Parquet": lambda content, rng: b"no Parquet",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_ends_verification_with_code_4_and_the_file(copy, capsys, damage):
    path = copy / "part-00001.parquet"
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(0)))
    code, error = verify(copy, capsys)
    assert code == 4
    assert f"{path} is not the file that was recorded" in error


def test_missing_and_swapped_files_end_verification_with_code_4(copy, capsys):
    first, second = copy / "part-00000.parquet", copy / "part-00001.parquet"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    code, error = verify(copy, capsys)
    assert (code, "part-00000.parquet is not the file" in error) == (4, True)
    first.unlink()
    code, error = verify(copy, capsys)
    assert (code, f"{first} is missing" in error) == (4, True)


def table_of(path):
    return pq.read_table(path)


def set_column(table, name, change):
    index = table.schema.get_field_index(name)
    values = change(table[name].to_pylist())
    return table.set_column(
        index, table.schema.field(name), pa.array(values, type=table.schema.field(name).type)
    )


def first_of(change):
    return lambda rows: [change(rows[0]), *rows[1:]]


def with_version(table, version):
    return table.replace_schema_metadata({**table.schema.metadata, b"lrmc.schema_version": version})


CONTENTS = {
    "a missing column": (lambda t: t.drop_columns(["gold_ids"]), "its columns are not those"),
    "one column more": (lambda t: t.append_column("x", t["domain"]), "its columns are not those"),
    "columns in another order": (lambda t: t.select(t.column_names[::-1]), "its columns are not"),
    "an older schema": (lambda t: with_version(t, b"1"), "record schema version 1, not 2"),
    "a newer schema": (lambda t: with_version(t, b"3"), "record schema version 3, not 2"),
    "another model's record": (
        lambda t: t.replace_schema_metadata({**t.schema.metadata, b"lrmc.model": b"other"}),
        "lrmc.model is other",
    ),
    "a row less": (lambda t: t.slice(1), "rows, not"),
    "a row twice": (lambda t: pa.concat_tables([t.slice(0, 1), t.slice(0, len(t) - 1)]), "twice"),
    "an id that is not in the vocabulary": (
        lambda t: set_column(t, "candidate_ids", first_of(lambda ids: [512, *ids[1:]])),
        "token_ids must be in [0, 512)",
    ),
    "a negative id": (
        lambda t: set_column(t, "input_ids", first_of(lambda ids: [-1, *ids[1:]])),
        "token ids must be in [0, 512)",
    ),
    "a candidate twice": (
        lambda t: set_column(t, "candidate_ids", first_of(lambda ids: [ids[1], *ids[1:]])),
        "distinct within a row",
    ),
    "a log-probability that is not finite": (
        lambda t: set_column(
            t, "candidate_logprobs", first_of(lambda values: [float("nan"), *values[1:]])
        ),
        "logprobs must be finite",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_break_the_contract_end_with_code_4(copy, capsys, case):
    """Also where somebody made the digest in the manifest fit."""
    change, said = CONTENTS[case]
    path = copy / "part-00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][0]["sha256"] = file_digest(path)
    write_manifest(copy, manifest)
    code, error = verify(copy, capsys)
    assert code == 4
    assert str(path) in error
    assert said in error


def test_a_file_of_empty_row_groups_only_is_no_reason_to_crash(copy, capsys):
    path = copy / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][0]["sha256"] = file_digest(path)
    write_manifest(copy, manifest)
    code, error = verify(copy, capsys)
    assert (code, "has 0 rows, not" in error) == (4, True)


def test_a_type_that_would_run_code_when_read_runs_none(copy, capsys, tmp_path):
    """An Arrow extension type whose metadata is a pickle that leaves a file behind."""
    import pickle

    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    path = copy / "part-00000.parquet"
    table = pq.read_table(path)
    field = pa.field(
        "domain",
        pa.string(),
        nullable=False,
        metadata={
            b"ARROW:extension:name": b"ray.data.arrow_tensor",
            b"ARROW:extension:metadata": pickle.dumps(Payload()),
        },
    )
    table = table.set_column(1, field, table["domain"])
    pq.write_table(table, path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][0]["sha256"] = file_digest(path)
    write_manifest(copy, manifest)
    import ray.data  # noqa: F401  registers its types

    verify(copy, capsys)
    assert not canary.exists()


# Training data before anything is recorded


def test_training_data_are_shown_without_weights(tmp_path, tiny_model, capsys):
    model = tmp_path / "tokenizer"
    load_tokenizer(tiny_model).save_pretrained(model)
    data = tmp_path / "my.jsonl"
    chat = [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "2 m²"}]
    rows = [{"messages": chat}, {"prompt": 3}, {"text": "one two"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data", str(data), "--model", str(model)]
    assert run_command(main, [*argv, "--json"]) == 0
    first, refused, text = map(json.loads, capsys.readouterr().out.splitlines())
    rendered = "<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\n2 m²<|im_end|>\n"
    assert (first["place"], first["text"]) == (f"{data}:1", rendered)
    tokenizer = load_tokenizer(tiny_model)
    assert [t["id"] for t in first["tokens"]] == tokenizer(rendered)["input_ids"]
    assert "".join(t["text"] for t in first["tokens"]) == rendered
    assert "".join(t["text"] for t in first["tokens"] if t["learned"]) == "2 m²<|im_end|>"
    assert refused.keys() == {"place", "problem"}
    assert refused["place"] == f"{data}:2"
    assert refused["problem"].endswith("has prompt")
    assert (text["place"], text["text"]) == (f"{data}:3", "one two")
    assert run_command(main, ["--data", f"{data}:3", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "one two" in shown
    assert "Größe" not in shown


def test_inspect_wants_a_record_or_data(tmp_path):
    assert run_command(main, []) == 2
    assert run_command(main, [str(tmp_path), "--data", "x.jsonl"]) == 2
