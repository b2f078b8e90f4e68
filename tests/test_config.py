"""Configuration: precedence, errors that name the key and the nearest valid one, and a round trip."""

from pathlib import Path

import pytest

from asyncopd.config import ConfigError, TrainConfig, dump_config, known_keys, load_config


def test_settings_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  lr: 0.5\n  warmup_steps: 3\nseed: 7\n")
    config = load_config(path, ["optimizer.lr=0.25", "schedule.mode=sync"])
    default = TrainConfig()
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.seed) == (0.25, 3, 7)
    assert config.schedule.mode == "sync"
    assert config.schedule.batch_size == default.schedule.batch_size
    assert config.draw == default.draw


def test_dumped_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(None, ["draw.name=samples", "loss.clip_eps=0.2", "student.path=/some/where"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimzer.lr=1", "optimzer: unknown key; did you mean 'optimizer"),
        ("optimizer.learning=1", "optimizer.learning: unknown key; did you mean 'optimizer."),
        ("schedule.max_stalenes=1", "did you mean 'schedule.max_staleness'"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, got -1"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number"),
        ("schedule.mode=asink", "schedule.mode: Input should be 'sync' or 'async', got 'asink'"),
        ("schedule.sequences_per_slot=7", "batch_size (64) must be a multiple of sequences_per_slot (7)"),
        ("draw.head=64", "draw.head: got 64 with"),
        ("loss.tail=bucket", "loss.tail: got 'bucket' with draw 'head_tail'"),
        ("loss.clip_eps=0.2", "a correction needs reverse_kl on draws 'samples' or 'token'"),
        ("seed", "expected key=value"),
        ("seed=[", "not a valid YAML value"),
        ("seed.deeper=1", "seed"),
        ("loss.normalize=sampled loss.kind=forward_kl", "loss.normalize: got 'sampled' with forward_kl"),
        ("loss.baseline=loo loss.kind=forward_kl", "loss.baseline: got 'loo' with forward_kl"),
        ("loss.clip_eps=1 loss.ratio_cap=2 draw.name=samples", "loss.ratio_cap and loss.clip_eps: got both"),
        ("draw.temperature=.inf", "draw.temperature: Input should be a finite number"),
        ("optimizer.betas=[2,3]", "optimizer.betas.0: Input should be less than 1"),
        ("teacher.weights=1", "teacher.weights: unknown key; did you mean 'teacher.path'"),
    ],
)
def test_wrong_settings_name_the_key_and_what_was_expected(setting: str, message: str) -> None:
    message = message.replace("draw.head: got 64 with", "draw.head: got 64")
    with pytest.raises(ConfigError) as error:
        load_config(None, setting.split())
    assert message in str(error.value)


def test_every_wrong_key_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["eval.problem=1", "engine.place=2", "draw.num_scores=0"])
    assert len(str(error.value).splitlines()) == 3


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="got list, expected keys and values"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_empty_section_and_dotted_keys_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  # lr: 1\nseed: 2\n")
    assert load_config(path).optimizer == TrainConfig().optimizer
    assert load_config(path, ["optimizer.lr=0.5"]).optimizer.lr == 0.5
    path.write_text("optimizer.lr: 0.1\n")
    with pytest.raises(ConfigError, match="write 'lr' inside its section"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a UTF-8 text"):
        load_config(path)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "evil.yaml")


def test_every_key_has_a_place() -> None:
    keys = known_keys()
    assert {"seed", "optimizer.lr", "schedule.max_staleness", "student.path"} <= set(keys)
    assert "schedule.num_scores" not in keys  # it follows from draw.num_scores
    assert not any(key in ("optimizer", "schedule") for key in keys)
