import datetime
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.config import (
    RunSettings,
    Settings,
    TrainSettings,
    apply_overrides,
    find_space,
    load_settings,
    read_toml,
    trial_settings,
    validate,
)
from lrmc_ray.errors import ConfigError, IncompleteArtifactError

quick = settings(deadline=None, max_examples=100, derandomize=True)
SHIPPED = sorted((Path(__file__).parents[2] / "tune_spaces").glob("*.toml"))
SEARCHES = [path for path in SHIPPED if not path.stem.startswith("compare")]


def run_settings(*overrides: str) -> RunSettings:
    return load_settings(None, overrides)


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_settings(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What each setting may be, written down once more by hand.


def whole(low: int, high: float = math.inf):
    return lambda value: type(value) is int and low <= value <= high


def number(rule):
    return lambda value: type(value) in (int, float) and math.isfinite(value) and rule(value)


def one_of(*names: str):
    return lambda value: type(value) is str and value in names


def text(value) -> bool:
    return type(value) is str


def texts(value) -> bool:
    return text(value) or (type(value) is list and len(value) > 0 and all(map(text, value)))


def pair(item, rule=lambda low, high: True):
    def is_pair(value) -> bool:
        return type(value) is list and len(value) == 2 and all(map(item, value)) and rule(*value)

    return is_pair


def optional(rule):
    return lambda value: value is None or rule(value)


def patterns(value) -> bool:
    return value == [] or texts(value)


def weights(value) -> bool:
    return type(value) is dict and all(text(k) and not_negative(v) for k, v in value.items())


def amounts(value) -> bool:
    reserved = {"CPU", "GPU", "memory", "lrmc_trial"}
    return (
        type(value) is dict
        and all(text(k) and positive(v) for k, v in value.items())
        and not reserved & set(value)
    )


def labels(value) -> bool:
    return type(value) is dict and all(text(k) and text(v) for k, v in value.items())


def study_name(value) -> bool:
    plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return (
        text(value)
        and 1 <= len(value) <= 64
        and value[0] in plain
        and set(value) <= {*plain, *"_.-"}
    )


positive = number(lambda x: x > 0)
not_negative = number(lambda x: x >= 0)
share = number(lambda x: 0 < x <= 1)
learning_rate = number(lambda x: 0 < x < 1)
seed = whole(0, 2**32 - 1)
precision = one_of("fp32", "bf16")


def options(value):
    """A table of plain values; a number must be finite."""
    return isinstance(value, dict) and all(
        isinstance(part, str | bool | int) or (isinstance(part, float) and math.isfinite(part))
        for part in value.values()
    )


RULES = {
    "model.name": text,
    "model.revision": optional(text),
    "model.template_options": options,
    "data.train": texts,
    "data.max_length": whole(2),
    "data.on_long": one_of("error", "drop", "truncate"),
    "data.on_bad_row": one_of("error", "skip"),
    "data.max_rejected_share": number(lambda x: 0 <= x <= 1),
    "record.tau": optional(share),
    "record.k_min": whole(1),
    "record.k_max": whole(1),
    "record.prompt_k_max": whole(0),
    "record.precision": one_of("fp32", "bf16"),
    "train.loss": one_of(
        "restricted",
        "frozen_tail",
        "full",
        "soft",
        "active_only",
        "dft",
        "asft",
        "eaft",
        "flow",
        "kl_to_base",
    ),
    "train.flow_temperature": optional(number(lambda x: x > 0)),
    "train.stm_perplexity": optional(number(lambda x: x > 1)),
    "train.base_kl_weight": not_negative,
    "train.keep_gold": lambda value: type(value) is bool,
    "train.mofo_share": share,
    "train.l2_sp_weight": not_negative,
    "train.replay_share": optional(number(lambda x: 0 <= x < 1)),
    "train.tau": share,
    "train.k_min": whole(1),
    "train.tail_samples": whole(0),
    "train.anchor_weight": not_negative,
    "train.router_loss": not_negative,
    "train.optimizer": one_of("moclip", "adamw", "adam_atan2", "c_adamw", "mofo", "magma"),
    "train.lr": learning_rate,
    "train.betas": optional(pair(number(lambda x: 0 <= x < 1))),
    "train.weight_decay": not_negative,
    "train.delta_max": number(lambda x: 0 < x <= 180),
    "train.clip": one_of("scale", "cautious", "momentum", "project", "rotate", "none"),
    "train.angle": one_of("tensor", "global"),
    "train.second_moment": one_of("raw", "capped"),
    "train.atan2_scale": positive,
    "train.schedule": one_of("constant", "linear", "cosine"),
    "train.warmup_steps": whole(0),
    "train.steps": whole(1),
    "train.epochs": optional(number(lambda x: x > 0)),
    "train.domain_weights": weights,
    "train.freeze": patterns,
    "train.lora_rank": whole(0),
    "train.lora_alpha": whole(1),
    "train.lora_targets": patterns,
    "train.packing": lambda value: type(value) is bool,
    "train.compile_layers": lambda value: type(value) is bool,
    # 0 is taken for false.
    "train.gradient_checkpointing": lambda value: value in ("auto", False, "selective", "full"),
    "train.keep_checkpoints": whole(1),
    "train.evaluate_every": whole(0),
    "train.holdout_share": number(lambda x: 0 < x < 1),
    "train.export": one_of("last", "best"),
    "train.refresh_every": whole(0),
    "train.batch_size": whole(1),
    "train.micro_batches": whole(1),
    "train.max_grad_norm": optional(positive),
    "train.precision": one_of("fp32", "bf16", "auto"),
    "train.state_dtype": precision,
    "train.reduction": one_of("strict", "fast"),
    "train.parallel": one_of("replicate", "shard"),
    "train.offload": one_of("none", "cpu"),
    "train.seed": seed,
    "train.checkpoint_every": whole(1),
    "train.probe_every": whole(0),
    "train.probe_positions": whole(2),
    "train.max_bad_steps": whole(1),
    "evaluate.domain_tasks": texts,
    "evaluate.general_tasks": texts,
    "evaluate.batch_tokens": whole(1),
    "evaluate.precision": precision,
    "evaluate.limit": optional(whole(2)),
    "evaluate.test_share": number(lambda x: 0 <= x < 1),
    "evaluate.test_seed": whole(-math.inf),
    "evaluate.drift_samples": whole(0),
    "search.name": optional(study_name),
    "search.trials": whole(1),
    "search.objective": one_of("combined", "budget", "pareto"),
    "search.forgetting_weight": not_negative,
    "search.max_forgetting": number(lambda x: -1 <= x <= 1),
    "search.early_stopping": one_of("median", "none"),
    "search.early_stopping_after": number(lambda x: 0 < x < 1),
    "search.early_stopping_items": whole(2),
    "search.final_limit": optional(whole(2)),
    "search.early_stopping_trials": whole(2),
    "search.trial_timeout_seconds": optional(positive),
    "search.yardstick_lr": optional(learning_rate),
    "search.seed": seed,
    "search.startup_trials": whole(1),
    "search.keep_models": one_of("best", "all"),
    "resources.workers": optional(pair(whole(1), lambda low, high: low <= high)),
    "resources.max_concurrent": optional(whole(1)),
    "resources.actors": optional(pair(whole(1), lambda low, high: low <= high)),
    "resources.resize_seconds": number(lambda x: x > 0),
    "resources.hang_seconds": optional(positive),
    "resources.cpus_per_worker": whole(1),
    "resources.gpus_per_worker": number(lambda x: 0 <= x <= 1),
    "resources.gpus_per_actor": optional(number(lambda x: 0 <= x <= 1 or (x > 1 and x % 1 == 0))),
    "resources.custom": amounts,
    "resources.labels": labels,
    "resources.storage": optional(
        lambda x: (
            isinstance(x, str) and re.fullmatch(r"s3://[\w.-]+(/.*)?|file:///.+", x) is not None
        )
    ),
}

EDGES = [
    *[0, 1, 2, 3, 8, 9, 30, 31, -1, 180, 181, 2**32 - 1, 2**32, 2**80, True, False, None],
    *[0.0, 1.0, 0.5, 1.5, -0.5, 30.0, 180.0, 180.1, 1e-300, 1e300, math.nan, math.inf, -math.inf],
    *["s3://b/x?region=eu-1", "s3://", "s3://k:s@b/x", "s3://k:s/t@b/x", "file:///d", "file://d"],
    *["", "0.9", "1e-4", "true", "Full", "none", "fp16", "../x", "-rf", "a" * 64, "a" * 65, "\0"],
    *[[], [1], [1, 1], [1, 2], [2, 1], [0, 1], [1, 2, 3], [0.9, 0.99], [0.9, 1.0], [0.5, math.nan]],
    *[["a"], ["a", "b"], ["a", 1], [None], {}, {"low": 1}, datetime.date(2026, 1, 1)],
]
scalars = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
    st.sampled_from(EDGES),
)
anything = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.lists(st.floats(), min_size=2, max_size=2),
    st.dictionaries(st.text(max_size=4), scalars, max_size=2),
)


def test_every_setting_has_a_rule_here():
    sections = {name: field.annotation for name, field in RunSettings.model_fields.items()}
    del sections["parameters"]
    assert all(issubclass(section, Settings) for section in sections.values())
    known = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert set(RULES) == known


def check_against_the_rule(key, value):
    section, _, name = key.partition(".")
    is_good = RULES[key](value)
    try:
        made = validate(RunSettings, {section: {name: value}}, "run.toml")
    except ConfigError as error:
        message = str(error)
        assert message.startswith("run.toml: ")
        assert section in message
        assert name in message
        # A good value may contradict the default of another setting.
        assert not is_good or any(
            words in message for words in ("must not exceed", "must be at least", "> 0 needs")
        )
    else:
        assert is_good, f"{key} = {value!r} was taken"
        kept = getattr(getattr(made, section), name)
        assert kept in (value, (value,)) or list(kept) == value


@pytest.mark.parametrize("value", EDGES, ids=repr)
def test_edge_values_are_taken_or_refused_by_the_rule(value):
    for key in RULES:
        check_against_the_rule(key, value)


@given(value=anything)
@quick
def test_every_setting_broken_at_random_is_a_config_error_that_names_it(value):
    for key in RULES:
        check_against_the_rule(key, value)


@given(key=st.sampled_from(sorted(RULES)), value=anything)
@quick
def test_a_setting_in_no_section_is_a_config_error_that_names_it(key, value):
    section, _, name = key.partition(".")
    for values, named in (
        ({section: {f"{name}x": value}}, f"unknown setting {section}.{name}x"),
        ({f"{section}x": {name: value}}, f"unknown setting {section}x"),
        ({section: {name: {"inner": value}}}, name),
    ):
        if named == name and RULES[key]({"inner": value}):
            continue  # a table of one's own names
        with pytest.raises(ConfigError, match=named):
            validate(RunSettings, values, "run.toml")


@given(name=st.text(max_size=6), value=anything)
@quick
def test_a_broken_parameter_is_a_config_error_that_names_it(name, value):
    for parameter in (name, *TrainSettings.model_fields):
        for searched in (value, {"low": value, "high": 1.0}, {"choices": value}, {"lo": value}):
            message = ""
            try:
                made = validate(RunSettings, {"parameters": {parameter: searched}}, "run.toml")
            except ConfigError as error:
                message = str(error)
            if message:
                assert parameter in message
                continue
            space = made.parameters[parameter]
            ends = space.choices or (space.low, space.high)
            assert not space.when
            assert all(RULES[f"train.{parameter}"](as_trial(parameter, end)) for end in ends)


def as_trial(name, value):
    """Optuna hands out whole numbers where the setting is one."""
    is_whole = TrainSettings.model_fields[name].annotation is int
    return int(value) if is_whole and isinstance(value, float) and value == int(value) else value


# The rules one by one: what the user reads.


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.tau=1.5", ["train.tau", "less than or equal to 1", "got 1.5", "Probability"]),
        (
            "train.parallel=shard",
            ["train", "reduction must be 'fast'", "got 'strict'", "or train.parallel"],
        ),
        (
            "train.offload=cpu",
            ["train", "offload must be 'none'", "got 'cpu'", "set train.parallel to 'shard'"],
        ),
        (
            "train={parallel='shard', reduction='fast', precision='auto'}",
            ["train", "precision must be 'fp32' or 'bf16'", "got 'auto'", "name one"],
        ),
        ("train.export=best", ["train", "evaluate_every must be at least 1", "got 0"]),
        ("train.domain_weights.law=-1", ["train.domain_weights.law", "greater", "got -1"]),
        ("train.tau=0", ["train.tau", "greater than 0", "got 0"]),
        ('train.tau="0.9"', ["train.tau", "must be a valid number", "got '0.9'"]),
        ("train.tau=nan", ["train.tau", "finite", "got nan"]),
        ("train.lr=inf", ["train.lr", "finite", "got inf"]),
        ("train.lr=0", ["train.lr", "greater than 0"]),
        ("train.delta_max=200.0", ["train.delta_max", "180", "got 200.0", "degrees", "switches"]),
        ("train.delta_max=-1", ["train.delta_max", "greater than 0", "got -1"]),
        ("train.steps=30.0", ["train.steps", "integer", "got 30.0"]),
        ("train.steps=true", ["train.steps", "integer", "got True"]),
        ("train.loss=fulll", ["train.loss", "'restricted', 'frozen_tail', 'full', 'soft'"]),
        ("train.optimizer=adam", ["train.optimizer", "'moclip', 'adamw'", "got 'adam'"]),
        ("train.mofo_share=0", ["train.mofo_share", "greater than 0", "got 0"]),
        ("train.replay_share=1", ["train.replay_share", "less than 1", "got 1"]),
        ("train={keep_gold=false, refresh_every=5}", ["refresh_every must be 0 with keep_gold"]),
        ("train={loss='asft', refresh_every=5}", ["refresh_every must be 0 with loss = 'asft'"]),
        ("train.stm_perplexity=1", ["train.stm_perplexity", "greater than 1", "got 1"]),
        ("train.flow_temperature=0", ["train.flow_temperature", "greater than 0", "got 0"]),
        (
            "train={state_dtype='bf16', optimizer='adamw'}",
            ["state_dtype must be 'fp32' with optimizer = 'adamw'", "got 'bf16'"],
        ),
        ("train={l2_sp_weight=0.1, lora_rank=4}", ["l2_sp_weight must be 0", "lora_rank = 4"]),
        (
            "train={replay_share=0.1, domain_weights={replay=2.0}}",
            ["domain_weights must not name the domain replay", "got ['replay']"],
        ),
        ("train.betas=0.9", ["train.betas must be a list, got 0.9"]),
        ("train.betas=[0.9, 1.0]", ["betas must be in [0, 1), got (0.9, 1.0)"]),
        ("train.betas=[0.9]", ["train.betas.1 is missing"]),
        ("train.micro_batches=9", ["micro_batches", "batch_size", "9 > 8", "lower"]),
        ("train.warmup_steps=31", ["warmup_steps", "steps", "31 > 30", "lower"]),
        ("record.k_max=1", ["k_max", "at least k_min", "1 < 2", "lower record.k_min"]),
        ("record.prompt_k_max=1", ["prompt_k_max", "at least k_min", "1 < 2"]),
        ("record.prompt_k_max=0", ["anchor_weight", "record.prompt_k_max = 0", "to 64"]),
        ("train.k_min=3", ["train.k_min", "record.k_min", "3 > 2", "raise record.k_min"]),
        ("record.tau=0.9", ["record.tau", "0.9 < 0.99", "leave record.tau out"]),
        ("evaluate.general_tasks=[]", ["evaluate.general_tasks must not be empty"]),
        ("resources.workers=[4, 1]", ["workers", "1 <= fewest <= most", "got [4, 1]"]),
        ("resources.actors=[0, 1]", ["actors", "1 <= fewest <= most", "got [0, 1]"]),
        ("resources.gpus_per_worker=1.5", ["gpus_per_worker must be at most 1", "got 1.5"]),
        ("resources.gpus_per_worker=2", ["at most 1", "got 2", "train.parallel = 'shard'"]),
        ("resources.gpus_per_worker=4", ["resources.gpus_per_actor = 4 or record.precision"]),
        ("resources.gpus_per_worker=1.5", ["resources.gpus_per_actor = 2 or record.precision"]),
        ("resources.gpus_per_actor=2.5", ["whole number where it is above 1", "got 2.5"]),
        ("resources.custom={GPU = 1}", ["custom must not name GPU", "gpus_per_worker"]),
        ("search.name=../other", ["search.name must match", "'../other'"]),
        ("train=3", ["train must be a section of settings, got 3"]),
        ("parameters.tau={low=0.9, high=0.5}", ["parameters.tau", "low < high", "low=0.9"]),
        ("parameters.tau={low=0.9, high=0.9}", ["parameters.tau", "low < high"]),
        ("parameters.tau={low=0.9}", ["parameters.tau", "low and high must both be given"]),
        ("parameters.tau={choices=[]}", ["parameters.tau", "choices must not be empty"]),
        ("parameters.tau={low=0.1, high=0.2, choices=[0.1]}", ["parameters.tau", "not both"]),
        ("parameters.lr={low=0, high=1e-4, log=true}", ["parameters.lr", "low > 0", "got 0.0"]),
        ("parameters.tua={low=0.1, high=0.9}", ["parameters.tua is no setting of train", "'tau'"]),
        ("parameters.tau={low=0.5, high=1.5}", ["parameters.tau", "equal to 1, got 1.5"]),
        ("parameters.tau={low=0, high=0.5}", ["parameters.tau", "greater than 0, got 0.0"]),
        (
            "parameters.tau={low=0.5, hihg=0.9}",
            ["parameters.tau.hihg. Did you mean 'parameters.tau.high'?"],
        ),
        ("parameters.steps={low=0.5, high=4}", ["parameters.steps", "integer", "got 0.5"]),
        ("parameters.loss={choices=['fulll']}", ["parameters.loss", "got 'fulll'"]),
        ("parameters.loss={low=0, high=1}", ["parameters.loss", "got 0.0"]),
        ("parameters.k_min={low=1, high=4}", ["train.k_min", "4 > 2", "raise record.k_min"]),
        ("parameters.tau={range='auto', low=0.1}", ["parameters.tau", "stands alone"]),
        ("parameters.lr={range='auto'}", ["parameters.lr", "tau and delta_max", "give low"]),
        ("parameters.tau={low=0.1, high=0.9, when={losss='soft'}}", ["losss is no setting"]),
        (
            "parameters.delta_max={low=1, high=9, when={optimizer='adamw'}}",
            ["parameters.delta_max.when", "optimizer never is 'adamw'", "['moclip']"],
        ),
        ("parameters.tau=0.5", ["parameters.tau must be a section of settings, got 0.5"]),
    ],
)
def test_a_broken_rule_is_said_with_value_and_remedy(override, parts):
    message = error_of(override)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.tua=0.9", "unknown setting train.tua. Did you mean 'train.tau'?"),
        ("trian.tau=0.9", "unknown setting trian. Did you mean 'train'?"),
        ("train.warmup_step=3", "train.warmup_step. Did you mean 'train.warmup_steps'?"),
        ("evaluate.domain_task=x", "evaluate.domain_task. Did you mean 'evaluate.domain_"),
        ("record.trials=3", "unknown setting record.trials"),
        ("tau=0.9", "unknown setting tau"),
    ],
)
def test_an_unknown_setting_is_an_error_with_the_nearest_name_of_its_section(override, expected):
    assert expected in error_of(override)


@pytest.mark.parametrize("value", ["true", "False", "none"])
def test_choices_are_named_as_toml_writes_them(value):
    message = error_of(f"train.gradient_checkpointing={value}")
    assert (
        "train.gradient_checkpointing must be 'auto', false, 'selective' or 'full', got " in message
    )


def test_all_broken_settings_are_reported_at_once():
    message = error_of("train.tau=2", "train.lr=-1", "record.kmin=1")
    assert message.count("; ") == 2
    assert all(key in message for key in ("train.tau", "train.lr", "record.kmin", "'record.k_min'"))


def test_searched_values_count_where_stage_0_must_have_recorded_enough():
    searched = "parameters.tau={low=0.5, high=0.999}"
    assert run_settings().recorded_tau() == 0.99
    assert run_settings(searched).recorded_tau() == 0.999
    assert (
        run_settings("train.tau=0.5", "parameters.tau={choices=[0.6, 0.7]}").recorded_tau() == 0.7
    )
    assert run_settings(searched, "record.tau=1.0").recorded_tau() == 1.0
    assert "0.995 < 0.999" in error_of(searched, "record.tau=0.995")
    without_prompts = ["train.anchor_weight=0", "record.prompt_k_max=0"]
    assert run_settings(*without_prompts).record.prompt_k_max == 0
    searched = "parameters.anchor_weight={low=0, high=2}"
    assert "prompt_k_max = 0" in error_of(*without_prompts, searched)
    assert run_settings("parameters.k_min={low=1, high=4}", "record.k_min=4").record.k_min == 4


def test_a_trial_lays_its_parameters_over_the_settings():
    base = TrainSettings(steps=7, lr=1e-3)
    tuned = trial_settings(base, {"tail_samples": 1024.0, "lr": 1e-5, "clip": "momentum"})
    assert (tuned.tail_samples, tuned.lr, tuned.clip, tuned.steps) == (1024, 1e-5, "momentum", 7)
    assert type(tuned.tail_samples) is int
    assert base.lr == 1e-3
    for params in ({"tua": 0.5}, {"tau": 1.5}, {"steps": math.inf}, {"steps": 2.5}):
        with pytest.raises(ConfigError, match=next(iter(params))):
            trial_settings(base, params)


# Overrides


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+2", 100.0),
        ("3", 3),
        ("1_000", 1000),
        ("true", True),
        ("full", "full"),
        ('"full"', "full"),
        ("'3'", "3"),
        ("", ""),
        ("a=b", "a=b"),
        ("'tis", "'tis"),
        ("[1, 2]", [1, 2]),
        ('["a", "b"]', ["a", "b"]),
        ("[a, b]", "[a, b]"),
        ("{low = 1, high = 2}", {"low": 1, "high": 2}),
        ("/data/my file.jsonl", "/data/my file.jsonl"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_override_values_are_toml_and_bare_words_are_strings(written, value):
    result = apply_overrides({}, [f"section.key={written}"])
    assert result == {"section": {"key": value}}
    assert type(result["section"]["key"]) is type(value)


def test_overrides_reach_the_settings():
    made = run_settings(
        "train.lr=1e-5",
        "train.loss=full",
        "data.train=a.jsonl",
        "evaluate.general_tasks=['mmlu', 'bbh']",
        "train.betas=[0.9, 0.95]",
        "parameters.tau.low=0.5",
        "parameters.tau.high=0.9",
    )
    assert made.train.lr == 1e-5
    assert made.train.loss == "full"
    assert made.data.train == ("a.jsonl",)
    assert made.evaluate.general_tasks == ("mmlu", "bbh")
    assert made.train.betas == (0.9, 0.95)
    assert (made.parameters["tau"].low, made.parameters["tau"].high) == (0.5, 0.9)


@pytest.mark.parametrize("override", ["train.lr", "=3", ".lr=3", "train.=3", "train..lr=3", ""])
def test_a_malformed_override_is_an_error_with_an_example(override):
    message = error_of(override)
    assert f"got {override!r}" in message
    assert "train.lr=1e-5" in message


def test_an_override_cannot_turn_a_value_into_a_section():
    with pytest.raises(ConfigError, match=r"train.lr.x cannot be set: lr is not a section"):
        apply_overrides({"train": {"lr": 1e-4}}, ["train.lr.x=3"])


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path):
    space = tmp_path / "space.toml"
    space.write_text("[train]\nlr = 1e-3\nsteps = 7\n")
    assert load_settings(space).train.lr == 1e-3
    made = load_settings(space, ["train.lr=1e-4", "train.lr=1e-5"])
    assert (made.train.lr, made.train.steps, made.train.tau) == (1e-5, 7, 0.99)


def test_overrides_leave_what_they_are_laid_over_unchanged():
    values = {"train": {"lr": 1e-3}}
    assert apply_overrides(values, ["train.lr=1e-5"]) == {"train": {"lr": 1e-5}}
    assert values == {"train": {"lr": 1e-3}}


def test_every_setting_is_among_the_values_but_for_options_that_a_template_is_not_given():
    """A file that says what was used says it for every setting, an empty one as well."""
    settings = load_settings(None, [])
    values = settings.model_dump()
    for section in type(settings).model_fields:
        own = getattr(type(getattr(settings, section)), "model_fields", None)
        if own is not None:
            assert own.keys() - values[section].keys() <= {"template_options"}, section
    assert (values["resources"]["custom"], values["resources"]["labels"]) == ({}, {})


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        run_settings().train.lr = 1.0  # type: ignore[misc]  # the checker knows that it is frozen


# Files


@pytest.mark.parametrize(
    "content",
    [
        b"[train]\nlr = 1e-5\n[train]\nsteps = 3\n",
        b"[train]\nlr = 1e-5\nlr = 1e-4\n",
        b"[train\n",
        b"lr: 1e-5\n",
        b"[train]\nloss = full\n",
        b"\xff\xfe[\x00",
        b"[train]\nseed = " + b"9" * 5000,
    ],
    ids=["section twice", "key twice", "open", "yaml", "bare word", "utf-16", "long number"],
)
def test_a_file_that_is_not_toml_is_a_config_error(tmp_path, content):
    path = tmp_path / "space.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"space\.toml is not valid TOML"):
        load_settings(path)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text("[train]\ntau = 2.0\n")
    with pytest.raises(ConfigError, match=rf"^{path}: train\.tau must be"):
        load_settings(path)


def test_a_missing_file_is_exit_code_3(tmp_path):
    with pytest.raises(IncompleteArtifactError, match="does not exist") as caught:
        read_toml(tmp_path / "none.toml")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_shipped_space_loads_and_searches_tau_and_delta_max(path):
    made = load_settings(path)
    assert {"tau", "delta_max"} <= set(made.parameters)
    assert made.search.trials >= 2
    assert made.search.name == (None if path.stem == "demo" else path.stem.replace("_", "-"))


def test_a_space_is_found_by_path_and_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.toml"
    own.write_text("")
    assert find_space("own.toml").resolve() == own
    assert find_space(str(own)) == own
    for shipped in SHIPPED:
        for name in (shipped.stem, shipped.name, f"tune_spaces/{shipped.name}"):
            assert find_space(name).resolve() == shipped


def test_an_unknown_space_lists_those_that_are_shipped():
    for name in ("smoek", "elsewhere/demo.toml"):
        with pytest.raises(IncompleteArtifactError) as caught:
            find_space(name)
        message = str(caught.value)
        assert message.startswith(f"space file {name} does not exist")
        assert all(path.name in message for path in SHIPPED)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.freeze=a.*", "train.lora_rank=4"], "freeze must be empty with adapters"),
        (["train.refresh_every=5", "train.loss=soft"], "refresh_every must be 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, message):
    assert message in error_of(*overrides)


def test_a_warm_up_is_compared_with_steps_only_where_these_count():
    assert "warmup_steps must not exceed" in error_of("train.warmup_steps=31")
    assert run_settings("train.warmup_steps=31", "train.epochs=2").train.epochs == 2


def test_an_automatic_range_is_recorded_at_its_top():
    assert run_settings("parameters.tau={range='auto'}").recorded_tau() == 0.999


def test_a_condition_may_name_a_searched_choice_but_not_a_conditional_one():
    searched = "parameters.optimizer={choices=['moclip', 'adamw']}"
    cap = "parameters.delta_max={low=1, high=9, when={optimizer='moclip'}}"
    made = run_settings(searched, cap)
    assert made.parameters["delta_max"].when == {"optimizer": "moclip"}
    chained = "parameters.tau={low=0.1, high=0.9, when={clip='scale'}}"
    conditional = "parameters.clip={choices=['scale'], when={optimizer='moclip'}}"
    assert "has a condition itself" in error_of(searched, conditional, chained)
