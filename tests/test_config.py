"""What a config or a task file may say, and how what it may not say is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.config import Config, known_keys, load, model_dir
from rollout_ft.engine.experts import shape_of
from rollout_ft.engine.launch import command
from rollout_ft.engine.ports import Ports
from rollout_ft.errors import ConfigError
from rollout_ft.trial.tasks import quickstart, read_tasks
from rollout_ft.types import Recovery

few = settings(max_examples=50, deadline=None)


def refusal(*overrides: str, path: Path | None = None) -> str:
    """The one line that a refused config is answered with."""
    with pytest.raises(ConfigError) as e:
        load(path, list(overrides))
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def file(tmp_path: Path, text: str | bytes, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_nothing_said_is_a_config_that_loads():
    assert load() == Config()


def test_an_empty_file_says_nothing(tmp_path: Path):
    assert load(file(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path):
    assert isinstance(load(path), Config)


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("gateway.prot", "gateway.port"),
        ("engine.token_timeout", "engine.token_timeout_s"),
        ("session.max_turn", "session.max_turns"),
        ("trail.recovery", "trial.recovery"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(unknown: str, nearest: str):
    said = refusal(f"{unknown}=1")
    assert nearest.split(".")[0] in said.split("did you mean ")[1]
    assert unknown.split(".")[0] in said
    if unknown.split(".")[0] == nearest.split(".")[0]:
        assert said == f"{unknown}: no such key; did you mean {nearest}?"


def test_an_unknown_key_in_a_file_is_refused_too(tmp_path: Path):
    assert "gateway.port" in refusal(path=file(tmp_path, "gateway:\n  prot: 80\n"))


def test_an_override_wins_over_the_file(tmp_path: Path):
    config = load(file(tmp_path, "seed: 1\ngateway:\n  port: 80\n  count: 3\n"), ["gateway.port=81"])
    assert (config.seed, config.gateway.port, config.gateway.count) == (1, 81, 3)


def test_the_last_override_of_a_key_wins():
    assert load(overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("engine.args=[--tokens-per-s, '80']", ["--tokens-per-s", "80"]),
        ("engine.args=[]", []),
    ],
)
def test_an_override_is_a_yaml_value(item: str, expected: list[str]):
    assert load(overrides=[item]).engine.args == expected


def test_what_follows_the_first_equals_sign_is_the_value():
    assert load(overrides=["trial.agent=a=b"]).trial.agent == "a=b"


def test_overrides_may_be_a_mapping_of_python_values():
    config = load(overrides={"seed": 5, "engine.args": ["--a", "b" * 200], "gateway.host": "::1", "ray.num_cpus": None})
    assert (config.seed, config.engine.args, config.gateway.host, config.ray.num_cpus) == (5, ["--a", "b" * 200], "::1", None)


def test_a_mapping_may_hold_the_types_that_the_config_itself_has():
    assert load(overrides={"trial.recovery": Recovery.RESTART}).trial.recovery is Recovery.RESTART


@pytest.mark.parametrize("item", ["seed", "=1", "", "seed.x.y=1 =", "seed={", "run.x=1"])
def test_an_override_that_cannot_be_applied_is_refused(item: str):
    assert refusal(*(["seed=1"] if item.startswith("seed.") else []), *(["run=a"] if item.startswith("run.") else []), item)


@pytest.mark.parametrize("text", ["a: [1\nb: 2", "a: b: c", "\t- x", "a: &x *y", "a: \x00"])
def test_broken_yaml_names_the_file(tmp_path: Path, text: str):
    path = file(tmp_path, text)
    assert str(path) in refusal(path=path)


def test_a_value_that_only_looks_like_a_date_is_refused_with_the_files_name(tmp_path: Path):
    path = file(tmp_path, "run: 2024-13-45\n")
    assert str(path) in refusal(path=path)


def test_an_override_that_only_looks_like_a_date_is_refused():
    assert "2024-13-45" in refusal("run=2024-13-45")


def test_a_file_that_is_not_text_is_refused_with_its_name(tmp_path: Path):
    path = file(tmp_path, b"run: \xff\xfe\x80\n")
    assert str(path) in refusal(path=path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "3"])
def test_a_file_whose_top_level_is_no_mapping_is_refused_with_its_name(tmp_path: Path, text: str):
    path = file(tmp_path, text)
    assert str(path) in refusal(path=path)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path):
    path = tmp_path / "none.yaml"
    assert f"{path}: No such file" in refusal(path=path)


def test_a_directory_in_place_of_a_file_is_refused_with_its_name(tmp_path: Path):
    assert str(tmp_path) in refusal(path=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["gateway.tls_cert=a"], ["gateway.tls_cert", "gateway.tls_key"]),
        (["gateway.tls_key=a"], ["gateway.tls_cert", "gateway.tls_key"]),
        (["store.min_replicas=3"], ["store.min_replicas", "store.replicas"]),
        (["store.payload_copies=3"], ["store.payload_copies", "store.replicas"]),
        (["engine.kind=sglang"], ["engine.kind", "model.path"]),
        (["model.context_tokens=4096"], ["session.max_output_tokens", "model.context_tokens"]),
        (["session.max_output_tokens=32768"], ["session.max_output_tokens", "model.context_tokens"]),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_the_keys_to_change(overrides: list[str], keys: list[str]):
    said = refusal(*overrides)
    assert all(key in said for key in keys)


@pytest.mark.parametrize(
    "overrides",
    [
        ["gateway.tls_cert=a", "gateway.tls_key=b"],
        ["store.min_replicas=2"],
        ["engine.kind=sglang", "model.path=/models/m"],
        ["session.max_output_tokens=32767"],
    ],
)
def test_the_neighbour_of_a_refused_combination_loads(overrides: list[str]):
    assert isinstance(load(overrides=overrides), Config)


@pytest.mark.parametrize(
    "item",
    ["gateway.port=70000", "engine.count=0", "engine.token_timeout_s=0", "engine.token_timeout_s=-1", "run=a/b", "run=",
     "trial.recovery=sometimes", "gateway.port=many", "engine.args=one", "gateway=3", "store.replicas=0"],
)  # fmt: skip
def test_a_value_out_of_its_range_or_type_is_refused_with_its_key(item: str):
    assert refusal(item).startswith(item.partition("=")[0])


def test_several_faults_are_told_together():
    said = refusal("seed=x", "gateway.port=-1")
    assert "seed" in said
    assert "gateway.port" in said


def test_a_config_does_not_change_once_it_is_loaded():
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@few
@given(
    st.sampled_from(known_keys()) | st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=12),
    st.text(max_size=12) | st.integers().map(str) | st.sampled_from(["[]", "{}", "null", "[1]", "{a: 1}", "true", "1e400", "0x"]),
)
def test_any_override_gives_a_config_or_a_config_error(key: str, value: str):
    with contextlib.suppress(ConfigError):
        assert isinstance(load(overrides=[f"{key}={value}"]), Config)


def test_the_small_model_is_shipped():
    assert (Path(model_dir(Config())) / "tokenizer_config.json").exists()


def test_a_model_without_a_tokenizer_is_refused_with_its_key(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        model_dir(load(overrides=[f"model.path={tmp_path}"]))


# Task files.


def tasks_refused(path: Path) -> str:
    with pytest.raises(ConfigError) as e:
        read_tasks(path)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def test_tasks_are_read_in_their_order_with_all_their_fields(tmp_path: Path):
    path = file(tmp_path, '{"task_id": "b", "x": [1]}\n\n  \n{"task_id": "a.1:2_3-4"}', "t.jsonl")
    assert read_tasks(path) == [{"task_id": "b", "x": [1]}, {"task_id": "a.1:2_3-4"}]


def test_the_shipped_tasks_are_48():
    assert len(read_tasks(quickstart())) == 48


@pytest.mark.parametrize("broken", ['{"task_id": "b"', "{'task_id': 'b'}", '{"task_id": "b"} x', '{"task_id": NaN}', "\udcff"])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, broken: str):
    path = file(tmp_path, b'{"task_id": "a"}\n\n' + broken.encode("utf-8", "surrogateescape") + b'\n{"task_id": "c"}\n', "t.jsonl")
    assert f"{path}, line 3 is not JSON" in tasks_refused(path)


@pytest.mark.parametrize("line", ["[]", "3", '"a"', "null", "{}", '{"task_id": 3}', '{"task_id": ""}', '{"task_id": null}'])
def test_a_line_that_is_no_task_is_named_by_its_number(tmp_path: Path, line: str):
    assert ", line 2: " in tasks_refused(file(tmp_path, f'{{"task_id": "a"}}\n{line}\n'))


@pytest.mark.parametrize("task_id", ["..", "...", "-a", "a" * 129])
def test_what_a_task_may_be_called_is_said_with_how_it_begins_and_how_long_it_may_be(tmp_path: Path, task_id: str):
    said = tasks_refused(file(tmp_path, f'{{"task_id": "{task_id}"}}'))
    assert "at most 128" in said
    assert "begins with a letter or digit" in said


@pytest.mark.parametrize("task_id", ["a/b", "../a", "a b", "-a", ".a", "a~1", "a" * 129, "ä", "a\\n"])
def test_a_task_id_that_could_not_be_a_file_name_or_a_url_is_refused(tmp_path: Path, task_id: str):
    assert "task_id" in tasks_refused(file(tmp_path, f'{{"task_id": "{task_id}"}}\n'))


def test_a_second_task_with_the_same_id_is_named_with_the_first(tmp_path: Path):
    said = tasks_refused(file(tmp_path, '{"task_id": "a"}\n{"task_id": "b"}\n{"task_id": "a"}\n'))
    assert "line 3" in said
    assert "line 1" in said
    assert "'a'" in said


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_tasks_is_refused(tmp_path: Path, text: str):
    assert "no task" in tasks_refused(file(tmp_path, text))


def test_a_missing_task_file_is_refused_with_its_name(tmp_path: Path):
    assert str(tmp_path / "none.jsonl") in tasks_refused(tmp_path / "none.jsonl")


def test_tasks_nested_beyond_what_json_allows_are_refused(tmp_path: Path):
    deep: Any = "[" * 5000 + "]" * 5000
    assert "line 1" in tasks_refused(file(tmp_path, f'{{"task_id": "a", "x": {deep}}}'))


@pytest.mark.parametrize("policy", ["force", "default"])
def test_the_sessions_sampling_is_forced_or_a_default(policy: str):
    config = load(overrides=["sampling.parameters={temperature: 1.0}", f"sampling.policy={policy}"])
    assert (config.sampling.parameters, config.sampling.policy) == ({"temperature": 1.0}, policy)


def test_another_policy_of_sampling_is_refused():
    with pytest.raises(ConfigError, match=r"sampling\.policy"):
        load(overrides=["sampling.policy=ask"])


def written(directory: Path, config: dict[str, Any]) -> str:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return str(directory)


QWEN = {"num_hidden_layers": 48, "num_experts_per_tok": 8, "num_experts": 128}
DEEPSEEK = {"num_hidden_layers": 61, "num_experts_per_tok": 8, "n_routed_experts": 257}


@pytest.mark.parametrize(
    ("config", "shape"),
    [(QWEN, (48, 8, 128)), (DEEPSEEK, (61, 8, 257)), ({"text_config": QWEN, "num_hidden_layers": 1}, (48, 8, 128))],
    ids=["qwen", "deepseek", "inside text_config"],
)
def test_what_a_row_of_routed_experts_is_stands_in_the_models_config(tmp_path: Path, config: dict[str, Any], shape: tuple[int, ...]):
    overrides = ["engine.kind=sglang", f"model.path={written(tmp_path, config)}", "samples.routed_experts=true"]
    loaded = load(None, overrides)
    found = shape_of(loaded)
    assert found is not None
    assert (found.layers, found.topk, found.experts) == shape
    assert "--enable-return-routed-experts" in command(loaded, "e0", Ports(20_000))


def test_what_the_config_says_of_experts_wins_and_a_small_engine_is_told():
    loaded = load(None, ["samples.routed_experts=true", "model.experts={layers: 2, topk: 3, count: 64}"])
    arguments = command(loaded, "e0", Ports(20_000))
    assert arguments[arguments.index("--routed-experts") + 1] == "2,3,64"


@pytest.mark.parametrize("config", [{"num_hidden_layers": 2}, {"num_experts": 8, "num_hidden_layers": 2}, [1], {"text_config": 3}])
def test_a_model_without_experts_is_refused_with_the_key_to_set(tmp_path: Path, config: Any):
    loaded = load(None, ["engine.kind=sglang", f"model.path={written(tmp_path, config)}", "samples.routed_experts=true"])
    with pytest.raises(ConfigError, match=r"model\.experts"):
        shape_of(loaded)


def test_without_the_switch_nothing_is_asked_of_engine_or_model():
    assert shape_of(load()) is None
    assert not any("routed-experts" in argument for argument in command(load(), "e0", Ports(20_000)))
