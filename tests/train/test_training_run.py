"""One worker's share of training, without Ray, on the small model."""

import dataclasses
import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrmc_ray.errors import ConfigError, DataError
from lrmc_ray.files.metrics_log import read_metrics
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS, LEDGER, METRICS, MODEL
from lrmc_ray.method.measure import outside_mass
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from lrmc_ray.models.loading import load_model
from lrmc_ray.record.reader import Records
from lrmc_ray.train import recompute
from lrmc_ray.train.checkpoints import list_checkpoints
from lrmc_ray.train.ledger import audit_ledger
from lrmc_ray.train.samples import TrainingSamples, number_of_steps, sample_names
from tests.support.cases import rest_is_slow
from tests.support.faults import DAMAGES, flip_a_bit
from tests.support.operators import Counted
from tests.support.tiny import make_data
from tests.support.training import (
    STEPS,
    assert_same,
    kill_after,
    model_of,
    record_of,
    run_alone,
    settings_of,
)

torch.set_num_threads(1)


@pytest.fixture
def start(tiny_model, recorded, tmp_path):
    def make(directory=None, *, is_preempted=lambda: False, **changes):
        return run_alone(
            settings_of(**changes),
            record=recorded,
            model=tiny_model,
            directory=directory or tmp_path / "training",
            is_preempted=is_preempted,
        )

    return make


def steps_of(directory):
    return [json.loads(line)["step"] for line in (directory / LEDGER).read_text().splitlines()]


def held_out_nll_of(model, samples):
    """One sample at a time through the Hugging Face model."""
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logits_TV = model(input_ids=sample.input_ids_T[None]).logits[0]
        positions = sample.positions_P[sample.is_supervised_P]
        gold = sample.input_ids_T[positions + 1]
        total -= float(logits_TV[positions].double().log_softmax(-1).gather(1, gold[:, None]).sum())
        count += len(positions)
    return total / count


@pytest.mark.parametrize(
    ("state_dtype", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_moments_have_the_type_that_was_asked_for(start, tmp_path, state_dtype, dtype):
    """And a checkpoint is as much smaller: 4 bytes less of 12 for each weight."""
    run = start(state_dtype=state_dtype)
    run.run()
    states = run.learner.optimizer.state.values()
    assert {state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")} == {dtype}
    (state, *_) = sorted((tmp_path / "training" / CHECKPOINTS).glob("*/state.pt"))
    weights = sum(parameter.numel() for parameter in run.learner.trainable.parameters.values())
    expected = weights * (12 if dtype == torch.float32 else 8)
    assert 0 <= state.stat().st_size - expected < 2**17


# Kills and damages


MEASURED = {"train_seconds": 0, "cpu_seconds": 0, "peak_memory_bytes": 0}
VARIANTS = {
    "all weights": {},
    "adapters": {"lora_rank": 4},
    "bf16 moments": {"state_dtype": "bf16"},
    "frozen parts": {"freeze": ("model.layers.0.*", "model.embed_tokens.*")},
    "fresh subsets": {"refresh_every": 3},
    "held out, best": {"evaluate_every": 2, "export": "best", "holdout_share": 0.2},
    "recomputed layers": {"gradient_checkpointing": "full"},
    "recomputed activations": {"gradient_checkpointing": "selective"},
    "adamw, bf16": {"optimizer": "adamw", "precision": "bf16"},
    "soft, adam_atan2": {"loss": "soft", "optimizer": "adam_atan2"},
    "active_only, l2_sp": {"loss": "active_only", "l2_sp_weight": 0.5},
    "dft, c_adamw": {"loss": "dft", "optimizer": "c_adamw"},
    "kl_to_base, mofo": {"loss": "kl_to_base", "optimizer": "mofo"},
    "without gold": {"keep_gold": False},
    "asft, magma": {"loss": "asft", "optimizer": "magma", "base_kl_weight": 0.05},
    "flow, stm": {"loss": "flow", "stm_perplexity": 2.5},
    "frozen_tail": {"loss": "frozen_tail"},
}


FEW = [
    *("held out, best", "recomputed activations", "soft, adam_atan2", "kl_to_base, mofo"),
    "frozen_tail",
]


@pytest.mark.parametrize("name", rest_is_slow(VARIANTS, FEW))
def test_killed_and_resumed_ends_in_the_same_bits(start, tmp_path, name):
    """Killed in the middle of a window of fresh subsets, and with one good checkpoint behind."""
    for part in ("whole", "killed"):
        (tmp_path / part).mkdir()
    outcome = start(tmp_path / "whole", **VARIANTS[name]).run()
    kill_after(start(tmp_path / "killed", **VARIANTS[name]), 4)
    again = start(tmp_path / "killed", **VARIANTS[name])
    resumed = again.run()
    assert resumed | MEASURED == outcome | MEASURED
    assert 0 < resumed["cpu_seconds"] < 60
    assert 2**27 < resumed["peak_memory_bytes"] < 2**33
    assert again.first_step == 4
    assert_same(model_of(tmp_path / "killed"), model_of(tmp_path / "whole"))
    audit = audit_ledger(tmp_path / "killed" / LEDGER, again.samples.ids_of_step, steps=STEPS)
    assert audit.is_exact
    assert (audit.steps_replayed, audit.replays_that_differ) == (1, 0)
    # Training did something.
    base = load_file(again.learner.model_directory / "model.safetensors")
    assert any(not torch.equal(base[k], v) for k, v in model_of(tmp_path / "whole").items())


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [*DAMAGES, flip_a_bit])
def test_behind_a_damaged_checkpoint_training_goes_on_from_the_one_before(
    start, tmp_path, name, damage, undisturbed
):
    directory = tmp_path / "training"
    shutil.copytree(undisturbed.killed, directory)
    damage(directory / CHECKPOINTS / "step_00000004" / name, random.Random(0))
    run = start(directory)
    run.run()
    assert run.first_step == 2
    assert_same(model_of(directory), model_of(undisturbed.whole))


def test_a_missing_newest_checkpoint_is_passed_over(start, tmp_path, undisturbed):
    directory = tmp_path / "training"
    shutil.copytree(undisturbed.killed, directory)
    shutil.rmtree(directory / CHECKPOINTS / "step_00000004")
    run = start(directory)
    run.run()
    assert run.first_step == 2
    assert_same(model_of(directory), model_of(undisturbed.whole))


def test_what_is_damaged_or_unfinished_is_removed_and_does_not_count_among_the_newest(
    start, tmp_path, undisturbed
):
    directory = tmp_path / "training"
    shutil.copytree(undisturbed.killed, directory)
    shutil.copytree(
        directory / CHECKPOINTS / "step_00000004", directory / CHECKPOINTS / "step_00000005"
    )
    (directory / CHECKPOINTS / "step_00000005" / "state.pt").write_bytes(b"torn")
    (directory / CHECKPOINTS / "step_00000006.partial").mkdir()
    run = start(directory)
    kill_after(run, 4)  # before it saves anything
    assert run.first_step == 4
    names = sorted(path.name for path in (directory / CHECKPOINTS).iterdir())
    assert names == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_never_from_step_0_where_there_were_checkpoints(start, tmp_path, undisturbed, how):
    directory = tmp_path / "training"
    shutil.copytree(undisturbed.killed, directory)
    for path in list_checkpoints(directory / CHECKPOINTS):
        if how == "damaged":
            (path / "state.pt").write_bytes(b"torn")
        else:
            shutil.rmtree(path)
    before = steps_of(directory)
    with pytest.raises(DataError, match="from the start") as caught:
        start(directory).run()
    assert caught.value.exit_code == 4
    assert steps_of(directory) == before


def test_before_the_first_checkpoint_training_starts_again(start, tmp_path, undisturbed):
    directory = tmp_path / "training"
    kill_after(start(directory), 0)
    kill_after(start(directory, checkpoint_every=3), 2)
    shutil.rmtree(directory / CHECKPOINTS)  # killed between the ledger's line and the checkpoint
    run = start(directory, checkpoint_every=3)
    run.run()
    assert run.first_step == 0
    assert_same(model_of(directory), model_of(undisturbed.whole))


def test_a_checkpoint_of_another_run_is_refused(start, tmp_path, undisturbed):
    directory = tmp_path / "training"
    shutil.copytree(undisturbed.killed, directory)
    with pytest.raises(DataError, match="another run"):
        start(directory, seed=1).run()


def test_bad_steps_are_counted_across_a_kill(start, tmp_path):
    """Five in a row end the run, however often it dies in between."""
    directory = tmp_path / "training"
    options = {"checkpoint_every": 1, "max_bad_steps": 4}

    def poisoned():
        run = start(directory, **options)
        hidden = run.learner.hidden_states
        run.learner.hidden_states = lambda batch: hidden(batch) * math.nan
        return run

    kill_after(poisoned(), 2)
    with pytest.raises(FloatingPointError, match=r"4 steps in a row .*step 3"):
        poisoned().run()


@dataclasses.dataclass
class Undisturbed:
    whole: object
    killed: object


@pytest.fixture(scope="module")
def undisturbed(tiny_model, recorded, tmp_path_factory):
    """A whole run, and one that was killed behind step 4."""
    base = tmp_path_factory.mktemp("undisturbed")
    runs = {}
    for name in ("whole", "killed"):
        (base / name).mkdir()
        runs[name] = run_alone(
            settings_of(), record=recorded, model=tiny_model, directory=base / name
        )
    runs["whole"].run()
    kill_after(runs["killed"], 4)
    return Undisturbed(base / "whole", base / "killed")


# Checkpoints in time


def test_a_notice_brings_a_checkpoint_at_once(start, tmp_path):
    """As often as a tenth of the time allows, so that little is done twice."""
    notices = iter([False, False, True, True, True])
    run = start(checkpoint_every=100, is_preempted=lambda: next(notices))
    kill_after(run, 2)
    (checkpoint,) = list_checkpoints(run.directory / CHECKPOINTS)
    assert checkpoint.name == "step_00000003"


def test_after_a_notice_checkpoints_cost_at_most_a_tenth_of_the_time(start):
    run = start(checkpoint_every=100)
    clock = {"now": 998.0}
    saved = run.files.push

    def two_seconds_long(*args, **options):
        clock["now"] += 2.0
        return saved(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrmc_ray.train.resume.time.monotonic", lambda: clock["now"])
        patch.setattr(type(run.files), "push", lambda self, *a, **o: two_seconds_long(*a, **o))
        run.checkpoints.save(1, {}, best=None)
        for now, is_due in ((1019.9, False), (1020.1, True)):
            clock["now"] = now
            assert run.checkpoints.is_due(1, True) == is_due
            assert not run.checkpoints.is_due(1, False)


def test_a_checkpoint_that_is_asked_for_is_made_and_the_question_removed(start):
    run = start(checkpoint_every=100)
    (run.directory / CHECKPOINT_NOW).touch()
    kill_after(run, 0)
    assert [path.name for path in list_checkpoints(run.directory / CHECKPOINTS)] == [
        "step_00000001"
    ]
    assert not (run.directory / CHECKPOINT_NOW).exists()


def test_two_writers_wait_for_each_other(start, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr("lrmc_ray.train.resume.WRITER_SECONDS", 0.3)
    run = start()
    with (run.directory / ".writer").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Exception, match="earlier attempt") as caught:
            run.run()
    assert caught.value.exit_code == 5
    assert not (run.directory / LEDGER).exists()


# Best and last


def test_the_best_and_the_last_checkpoints_are_kept(start, tmp_path):
    """The learning rate is far too high at the end, so the best is in the middle."""
    directory = tmp_path / "training"
    run = start(
        directory,
        evaluate_every=1,
        holdout_share=0.3,
        steps=8,
        keep_checkpoints=1,
        lr=2e-2,
        checkpoint_every=3,
        export="best",
        optimizer="adamw",
    )
    by_step = {}
    score = run.held_out.score

    def remember(done):
        metrics = score(done)
        by_step[done] = {k: v.clone() for k, v in run.learner.trainable.state().items()}
        return metrics

    run.held_out.score = remember
    outcome = run.run()
    measured = {
        line.step: line.metrics["train/held_out_nll"] for line in read_metrics(directory / METRICS)
    }
    assert len(measured) == 8
    best = min(measured, key=measured.get)
    assert outcome["best_step"] == best < 8, measured
    assert outcome["best_held_out_nll"] == measured[best]
    names = {int(path.name[5:]) for path in list_checkpoints(directory / CHECKPOINTS)}
    assert names == {best, 6} if best < 6 else best in names
    exported = model_of(directory)
    for name, tensor in by_step[best].items():
        assert torch.equal(exported[name], tensor)


def test_the_held_out_loss_is_the_full_vocabularys_on_samples_never_trained_on(
    start, recorded, tmp_path
):
    run = start(evaluate_every=STEPS, holdout_share=0.25, seed=3)
    run.run()
    held_out = [run.samples[index] for index in run.samples.held_out]
    assert len(held_out) == 5
    used = {
        name
        for line in (tmp_path / "training" / LEDGER).read_text().splitlines()
        for name in json.loads(line)["sample_ids"]
    }
    assert len(used) == 15
    assert not used & {sample.sample_id for sample in held_out}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "training" / MODEL)
    measured = read_metrics(tmp_path / "training" / METRICS)[-1].metrics["train/held_out_nll"]
    assert measured == pytest.approx(held_out_nll_of(model, held_out), rel=1e-5)


# The exported model


@pytest.mark.parametrize(
    "name", ["all weights", "adapters", "frozen parts", "recomputed activations"]
)
def test_the_exported_model_gives_the_trainers_logits(start, tmp_path, name):
    run = start(**VARIANTS[name])
    ids = torch.arange(2, 40)[None]
    seen = {}
    merged = run.learner.trainable.merged

    def look_first():
        run.learner.model.eval()
        with torch.no_grad():
            seen["logits"] = run.learner.model(input_ids=ids).logits
        return merged()

    run.learner.trainable.merged = look_first
    run.run()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "training" / MODEL)
    with torch.no_grad():
        after = loaded(input_ids=ids).logits
    if name == "adapters":  # W x + B A x against (W + B A) x
        torch.testing.assert_close(after, seen["logits"], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(after, seen["logits"])


def test_adapters_change_the_layers_they_are_on_and_only_these(start, tmp_path):
    run = start(lora_rank=2, lora_targets=("q_proj", "down_proj"), lora_alpha=8)
    assert {name.split(".lora_")[1][0] for name in run.learner.trainable.parameters} == {"A", "B"}
    assert len(run.learner.trainable.parameters) == 2 * 2 * 2
    run.run()
    base = load_file(run.learner.model_directory / "model.safetensors")
    changed = {k for k, v in model_of(tmp_path / "training").items() if not torch.equal(v, base[k])}
    assert changed == {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name in changed:
        delta = model_of(tmp_path / "training")[name] - base[name]
        assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 2


def test_adapters_scale_by_alpha_over_rank(start, tmp_path):
    """W' - W = alpha / rank * B A, from the checkpoint's B and A."""
    run = start(lora_rank=2, lora_targets=("q_proj",), lora_alpha=6, checkpoint_every=1)
    run.run()
    base = load_file(run.learner.model_directory / "model.safetensors")
    final = model_of(tmp_path / "training")
    state = run.learner.trainable.state()
    name = "model.layers.1.self_attn.q_proj"
    a, b = (next(v for k, v in state.items() if name in k and f"lora_{x}" in k) for x in "AB")
    torch.testing.assert_close(
        final[f"{name}.weight"] - base[f"{name}.weight"], 3.0 * b @ a, rtol=1e-4, atol=1e-6
    )


def test_frozen_parts_do_not_change_and_the_others_do(start, tmp_path):
    run = start(freeze=("model.layers.0.*", "model.embed*"))
    run.run()
    base = load_file(run.learner.model_directory / "model.safetensors")
    for name, tensor in model_of(tmp_path / "training").items():
        is_frozen = name.startswith(("model.layers.0.", "model.embed"))
        assert torch.equal(tensor, base[name]) == is_frozen, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("layers.0.*",)}, r"'layers\.0\.\*' fits none of .* like model\.embed"),
        ({"freeze": ("*",)}, "must leave something to train"),
        ({"lora_rank": 4, "lora_targets": ("query",)}, "must name linear layers"),
        ({"domain_weights": {"law": 2.0}}, "must name domains of the record, got 'law'"),
        ({"domain_weights": {"": 0.0}}, "at least one sample"),
    ],
)
def test_what_fits_nothing_is_refused(start, changes, message):
    with pytest.raises(ConfigError, match=message):
        start(**changes)


@pytest.mark.parametrize("which", ["selective", "full"])
def test_recomputed_activations_give_the_same_bits(start, tmp_path, undisturbed, which):
    start(gradient_checkpointing=which).run()
    assert_same(model_of(tmp_path / "training"), model_of(undisturbed.whole))


def test_the_setting_says_what_is_computed_again(start, monkeypatch):
    """In each of two layers seven products; of a whole one all but the last."""
    calls = {}
    for which in (False, "selective", "full", "auto"):
        run = start(gradient_checkpointing=which, evaluate_every=1)
        run.learner.hidden_states(run.held_out.batches[0])  # the proof is behind us
        with Counted() as counted:
            run.learner.hidden_states(run.held_out.batches[0]).sum().backward()
        calls[which] = [counted.calls[name] for name in ("mm", "silu")]
    products, activations = calls[False]
    assert activations == 2
    assert calls["selective"] == [products, 4]
    assert calls["full"] == [products + 2 * 6, 4]
    assert calls["auto"] == calls[False]
    # The same model, once a batch has as many tokens as count for many.
    tokens = run.held_out.batches[0].input_ids_BT.numel()
    for many, expected in ((tokens + 1, False), (tokens, "selective")):
        monkeypatch.setattr(recompute, "MANY_TOKENS", many)
        run.learner.hidden_states(run.held_out.batches[0])
        with Counted() as counted:
            run.learner.hidden_states(run.held_out.batches[0]).sum().backward()
        assert [counted.calls[name] for name in ("mm", "silu")] == calls[expected]


@pytest.mark.parametrize("changes", [{"packing": False}, {"lora_rank": 4}, {"precision": "bf16"}])
def test_recomputed_activations_with_other_settings(start, tmp_path, changes):
    for which in (False, "selective"):
        start(tmp_path / f"{which}", gradient_checkpointing=which, **changes).run()
    assert_same(model_of(tmp_path / "selective"), model_of(tmp_path / "False"))


# Fresh subsets


def test_fresh_subsets_are_those_of_the_model_at_the_time(start, recorded):
    """Against the Hugging Face model, one sample at a time."""
    run = start(refresh_every=3, steps=5)
    seen = {}
    weights = {}
    samples_of_step = run.fresh.samples_of_step

    def look(step):
        weights[step] = {k: v.clone() for k, v in run.learner.model.state_dict().items()}
        seen[step] = samples_of_step(step)
        return seen[step]

    run.fresh.samples_of_step = look
    run.run()
    for step, model_at in ((0, None), (2, None), (3, 3), (4, 3)):
        old = [run.samples[index] for index in run.samples.indices_of_step(step)]
        for sample, before in zip(seen[step], old, strict=True):
            assert sample.sample_id == before.sample_id
            is_prompt = ~before.is_supervised_P
            kept, base = sample.candidates.rows(is_prompt), before.candidates.rows(is_prompt)
            assert torch.equal(kept.token_ids, base.token_ids)  # the anchor's stay the base's
            if model_at is None:
                assert torch.equal(sample.candidates.token_ids, before.candidates.token_ids)
                continue
            model = load_model(run.learner.model_directory)
            model.load_state_dict(weights[model_at])
            with torch.no_grad():
                logits_TV = model(input_ids=sample.input_ids_T[None]).logits[0]
            positions = sample.positions_P[sample.is_supervised_P]
            expected = select_candidates(
                logits_TV[positions], sample.input_ids_T[positions + 1], tau=0.9, k_min=1
            )
            fresh = sample.candidates.rows(sample.is_supervised_P)
            assert (fresh.sizes - expected.sizes).abs().max() <= 1  # padding changes last bits
            same = fresh.sizes == expected.sizes
            assert same.float().mean() > 0.9
            torch.testing.assert_close(
                fresh.rows(same).logprobs.float(),
                expected.rows(same).logprobs.float(),
                atol=0.02,
                rtol=0.002,
            )


# The probe


def test_rho_is_measured_where_the_first_part_is_empty(start, tmp_path):
    """With parts of one sample, the shortest first; the first ones may have no active position."""
    run = start(probe_every=2, steps=3, micro_batches=4)
    samples_of_step = run.fresh.samples_of_step

    def with_an_empty_one(step):
        first, *others = samples_of_step(step)
        gold = first.candidates.gold_ids
        empty = CandidateSets(
            torch.arange(len(gold) + 1), gold, torch.zeros(len(gold), dtype=torch.float16), gold
        )
        return [dataclasses.replace(first, candidates=empty), *others]

    run.fresh.samples_of_step = with_an_empty_one
    run.learner.loss = dataclasses.replace(run.learner.loss, anchor_weight=0.0, tail_samples=0)
    run.run()
    lines = read_metrics(tmp_path / "training" / METRICS)
    assert ["subset/rho" in line.metrics for line in lines] == [True, False, True]
    assert 0 < lines[0].metrics["subset/rho"] < 0.2
    assert outside_mass is not None


# Which samples


def test_epochs_become_steps(recorded):
    assert number_of_steps(settings_of(epochs=1.0), recorded) == 5
    assert number_of_steps(settings_of(epochs=1.01), recorded) == 6
    assert number_of_steps(settings_of(epochs=0.1), recorded) == 1
    assert number_of_steps(settings_of(epochs=3.0, batch_size=6), recorded) == 10
    # Held-out samples are not in an epoch.
    options = {"evaluate_every": 1, "holdout_share": 0.2}
    assert number_of_steps(settings_of(epochs=2.0, **options), recorded) == 8
    assert number_of_steps(settings_of(), recorded) == STEPS
    with pytest.raises(ConfigError, match="got 9 > 5"):
        number_of_steps(settings_of(epochs=1.0, warmup_steps=9), recorded)


def test_held_out_samples_depend_on_the_seed_alone(recorded):
    def held_out(**changes):
        return TrainingSamples(Records(recorded), settings_of(**changes)).held_out

    options = {"evaluate_every": 7, "holdout_share": 0.3}
    assert held_out(**options) == held_out(**options, batch_size=7, micro_batches=1)
    assert len(held_out(**options)) == 6
    assert held_out(**options, seed=1) != held_out(**options)
    assert held_out() == []
    assert len(held_out(evaluate_every=1, holdout_share=0.001)) == 1
    assert len(held_out(evaluate_every=1, holdout_share=0.999)) == 19


def test_domains_have_their_weights(recorded, tiny_model, tmp_path):
    ids, domains = sample_names(Records(recorded))
    assert len(set(ids)) == 20
    assert set(domains) == {""}
    data = make_data(tmp_path / "train.jsonl", num_rows=20)
    names = ["radio" if number % 4 else "sql" for number in range(20)]
    directory = record_of(
        tiny_model, data, tmp_path / "record", domain_of=lambda number: names[number]
    )
    records = Records(directory)
    assert sample_names(records) == (ids, names)
    assert [records[index].domain for index in range(20)] == names
    samples = TrainingSamples(records, settings_of(domain_weights={"ra*": 0.4}, batch_size=11))
    assert samples.epoch_length == 5 + 6
    for step in range(3):
        used = samples.ids_of_step(step)
        assert sum(names[ids.index(name)] == "sql" for name in used) == 5
        assert len(set(used)) == 11


def test_replay_has_its_share_and_is_never_used_without_one(recorded, tiny_model, tmp_path):
    """12 samples of the domain, 8 to replay: a share of 1/4 is 4 of them beside the 12."""
    data = make_data(tmp_path / "train.jsonl", num_rows=20)
    directory = record_of(
        tiny_model,
        data,
        tmp_path / "record",
        domain_of=lambda number: "replay" if number % 5 < 2 else "",
    )
    records = Records(directory)

    def epoch(**changes):
        samples = TrainingSamples(records, settings_of(batch_size=1, micro_batches=1, **changes))
        indices = [samples.indices_of_step(step)[0] for step in range(samples.epoch_length)]
        return [records[index].domain for index in indices]

    assert sorted(epoch()) == [""] * 12 + ["replay"] * 8
    assert epoch(replay_share=0.0) == [""] * 12
    assert sorted(epoch(replay_share=0.25)) == [""] * 12 + ["replay"] * 4
    assert sorted(epoch(replay_share=0.5)) == [""] * 12 + ["replay"] * 12
    held_out = TrainingSamples(
        records, settings_of(evaluate_every=1, holdout_share=0.5, replay_share=0.25)
    ).held_out
    assert [records[index].domain for index in held_out] == [""] * 6
    with pytest.raises(ConfigError, match=r"replay_share = 0\.1 needs .* --train-data replay="):
        TrainingSamples(Records(recorded), settings_of(replay_share=0.1))


def test_without_gold_a_position_is_trained_on_only_where_the_base_expected_it(recorded):
    records = Records(recorded)
    kept = TrainingSamples(records, settings_of(tau=0.6))
    bare = TrainingSamples(records, settings_of(tau=0.6, keep_gold=False))
    changed = same = 0
    for index in range(20):
        ours, theirs = bare[index], kept[index]
        for row in range(len(ours.positions_P)):
            here = ours.candidates.rows(torch.tensor([row])).token_ids.tolist()
            full = theirs.candidates.rows(torch.tensor([row])).token_ids.tolist()
            gold = int(ours.candidates.gold_ids[row])
            if here == full:
                same += 1
            else:
                assert (here, full[-1]) == ([gold], gold)
                assert bool(ours.is_supervised_P[row])
                changed += 1
    assert changed > 20
    assert same > 20


def recorded_losses(sample):
    """The base's losses at supervised positions, from the record's columns one by one."""
    sets, losses = sample.candidates, []
    for row in range(sets.num_rows):
        entries = slice(int(sets.offsets[row]), int(sets.offsets[row + 1]))
        tokens = sets.token_ids[entries].tolist()
        place = tokens.index(int(sample.input_ids_T[sample.positions_P[row] + 1]))
        losses.append(-float(sets.logprobs[entries][place]))
    return losses


def test_tokens_that_surprised_the_base_are_not_learned_and_not_counted(recorded):
    records = Records(recorded)
    # An untrained model: about half of its losses are above this.
    between = sorted(recorded_losses(records[0]))[len(records[0].positions_P) // 2] + 1e-6
    samples = TrainingSamples(records, settings_of(stm_perplexity=math.exp(between)))
    left_out = 0
    for index in range(len(records)):
        whole, ours = records[index], samples[index]
        losses = recorded_losses(whole)
        kept = [
            row
            for row, loss in enumerate(losses)
            if loss <= between or not whole.is_supervised_P[row]
        ]
        assert ours.positions_P.tolist() == whole.positions_P[kept].tolist()
        assert torch.equal(ours.is_supervised_P, whole.is_supervised_P[kept])
        assert torch.equal(ours.candidates.gold_ids, whole.candidates.gold_ids[kept])
        assert torch.equal(ours.input_ids_T, whole.input_ids_T)
        left_out += len(losses) - len(kept)
    total = sum(int(records[index].is_supervised_P.sum()) for index in range(len(records)))
    assert 0.1 * total < left_out < 0.9 * total


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_samples_weigh_less_the_more_the_base_loses_on_them(recorded, temperature):
    records = Records(recorded)
    means = []
    for index in range(len(records)):
        is_supervised = records[index].is_supervised_P.tolist()
        losses = recorded_losses(records[index])
        chosen = [x for x, learned in zip(losses, is_supervised, strict=True) if learned]
        means.append(sum(chosen) / len(chosen))
    samples = TrainingSamples(records, settings_of(loss="flow", flow_temperature=temperature))
    divisor = temperature or (sorted(means)[9] + sorted(means)[10]) / 2
    assert len(means) == 20
    weights = [samples[index].weight for index in range(20)]
    assert weights == pytest.approx([math.exp(-mean / divisor) for mean in means], rel=1e-12)
    assert len(set(weights)) > 10
    plain = TrainingSamples(records, settings_of(loss="full"))
    assert {plain[index].weight for index in range(20)} == {1.0}
    held_out = TrainingSamples(records, settings_of(loss="flow", evaluate_every=1))
    (left,) = held_out.held_out
    assert held_out.in_full(left).weight == 1.0
    trained = sorted(means[:left] + means[left + 1 :])
    assert held_out.flow_temperature == pytest.approx(trained[9], rel=1e-12)


def test_a_batch_of_which_nothing_is_left_changes_nothing(start, tmp_path, tiny_model):
    """Every token surprises an untrained model, and the anchor is off."""
    outcome = start(stm_perplexity=1.000001, anchor_weight=0.0, optimizer="adamw").run()
    assert outcome["final_loss"] == 0.0
    assert_same(model_of(tmp_path / "training"), load_file(tiny_model / "model.safetensors"))


# Metrics


def test_metrics_of_a_step(start, tmp_path):
    run = start(micro_batches=1)
    run.run()
    lines = read_metrics(tmp_path / "training" / METRICS)
    records = run.samples
    for line in lines:
        samples = [records[index] for index in records.indices_of_step(line.step - 1)]
        metrics = line.metrics
        tokens = sum(len(sample.input_ids_T) for sample in samples)
        assert metrics["train/tokens_per_second"] * metrics["train/step_seconds"] == pytest.approx(
            tokens
        )
        assert metrics["train/epoch"] == pytest.approx(line.step * 4 / 20)
        # Without trimming nothing but the padding is lost; the last token is no input.
        assert metrics["train/shared_share"] > 0.1  # all begin with the same words
        assert metrics["train/padding_share"] == 0
    (tmp_path / "padded").mkdir()
    run = start(tmp_path / "padded", micro_batches=1, packing=False)
    run.run()
    for line in read_metrics(tmp_path / "padded" / METRICS):
        samples = [records[index] for index in records.indices_of_step(line.step - 1)]
        metrics = line.metrics
        lengths = [len(sample.input_ids_T) - 1 for sample in samples]
        assert metrics["train/shared_share"] == 0
        assert metrics["train/padding_share"] == pytest.approx(
            1 - sum(lengths) / (4 * max(lengths)), abs=1e-9
        )
        assert metrics["elastic/world_size"] == 1
    padded, packed = model_of(tmp_path / "padded"), model_of(tmp_path / "training")
    for name, tensor in packed.items():
        # Not element by element: the step divides by the gradient's size, however small that is.
        assert (tensor - padded[name]).norm() < 1e-3 * padded[name].norm(), name


UNCAPPED = ["restricted_atan2", "lrmc_90"]


@pytest.mark.slow
def test_every_method_of_the_shipped_comparison_trains(tiny_model, tmp_path):
    """Two steps of each, so that none is found broken after hours."""
    from lrmc_ray.config import find_space, read_toml, validate
    from lrmc_ray.config.compare import CompareSpace

    space = validate(CompareSpace, read_toml(find_space("compare")), "compare")
    directory = record_of(
        tiny_model,
        make_data(tmp_path / "train.jsonl", num_rows=20),
        tmp_path / "record",
        domain_of=lambda number: "replay" if number % 5 == 0 else "",
        k_min=space.record.k_min,
        tau=space.recorded_tau(),
    )
    models: dict[bytes, list[str]] = {}
    for name in space.methods:
        folder = tmp_path / name
        folder.mkdir()
        train = space.train_of(name, lr=space.learning_rates_of(name)[-1], seed=0)
        run = run_alone(
            train.model_copy(update={"steps": 2, "tail_samples": min(train.tail_samples, 64)}),
            record=directory,
            model=tiny_model,
            directory=folder,
        )
        assert math.isfinite(run.run()["final_loss"]), name
        weights = b"".join(v.numpy().tobytes() for v in model_of(folder).values())
        models.setdefault(weights, []).append(name)
    # An untrained model is never sure, so all of its positions are active. Where no angle of these
    # steps is above 90 degrees, MoClip with that cap is Adam-atan2.
    alike = [names for names in models.values() if len(names) > 1]
    assert alike in ([["sft", "active_only"]], [["sft", "active_only"], UNCAPPED])
