"""The configuration of a training run: typed, from YAML and `key=value` settings, with errors that name the key.

The defaults are the embedded task's recipe; `asyncopd train` without arguments runs it.
"""

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from asyncopd.engines.draw import DrawName, check_draw
from asyncopd.losses import Correction
from asyncopd.losses.options import Baseline, Normalize, Tail
from asyncopd.pipeline.config import ScheduleConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each key and what was expected."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    path: Path | None = Field(None, description="a Hugging Face model folder; left out: the embedded one")


class DrawConfig(_Section):
    """What is cached for a position."""

    name: DrawName = Field("head_tail", description="who chooses the ids of a support, and how")
    num_scores: int = Field(64, ge=1, description="entries in the support of a response token (K)")
    head: int = Field(16, ge=0, description="of these, the most probable ids (head_tail only); the rest is sampled")
    temperature: float = Field(1.0, gt=0, description="divides the logits of the student and the teacher")


class LossConfig(_Section):
    """Which divergence; the words of `asyncopd.reverse_kl`."""

    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    normalize: Normalize = Field("exact", description="LSE over the vocabulary, or from the support alone")
    tail: Tail = Field("drop", description="the missing mass of top-k supports")
    baseline: Baseline = "mean"
    ratio_cap: float | None = Field(None, gt=0, description="correction: min(p / mu, cap)")
    clip_eps: float | None = Field(None, gt=0, description="correction: PPO clip")
    m2_budget: float | None = Field(None, gt=0, description="correction: M2PO second-moment budget")
    advantage: Literal["current", "behavior"] = "current"

    def correction(self) -> Correction | None:
        """None unless one was asked for."""
        options = {name: getattr(self, name) for name in ("ratio_cap", "clip_eps", "m2_budget", "advantage")}
        chosen = [f"loss.{name}" for name in ("ratio_cap", "clip_eps", "m2_budget") if options[name] is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)}: got both, expected at most one correction")
        correction = Correction(**options)
        return None if correction == Correction() else correction


class OptimizerConfig(_Section):
    """AdamW, linear warm-up, cosine decay."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    warmup_steps: int = Field(10, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")


class EngineConfig(_Section):
    """Sizes of the forward passes."""

    places: int = Field(64, ge=1, description="sequences that a rollout worker decodes at once")
    max_packed_tokens: int = Field(1024, ge=1, description="tokens in one forward pass of the teacher or the learner")
    max_response_tokens: int | None = Field(None, ge=1, description="a longer response is cut; left out: the task's")


class EvalConfig(_Section):
    answers: int = Field(604, ge=2, description="sampled at temperature 1, going round the held-out problems")
    places: int = Field(128, ge=1, description="sequences decoded at once")


class TrainConfig(_Section):
    """Everything that a run depends on; written to the run directory as it was resolved."""

    run_dir: Path = Field(Path("runs/train"), description="where the checkpoint, metrics and summary go")
    seed: int = Field(0, ge=0, lt=1 << 14, description="of the order of the problems and of every draw in the run")
    task: Literal["railway"] = Field("railway", description="the prompts, and the check of an answer")
    student: ModelConfig = ModelConfig()
    teacher: ModelConfig = ModelConfig()
    draw: DrawConfig = DrawConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    schedule: ScheduleConfig = ScheduleConfig(steps=400, batch_size=64, sequences_per_slot=32)
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        check_draw(self.draw.name, self.draw.num_scores, self.draw.head, vocab_size=1 << 31)
        top_k = self.draw.name.endswith("top_k")
        if self.loss.tail != "drop" and not top_k:
            raise ValueError(f"loss.tail: got {self.loss.tail!r} with draw {self.draw.name!r}, expected 'drop'")
        if self.loss.tail != "drop" and self.loss.kind == "reverse_kl" and self.loss.baseline != "none":
            raise ValueError(f"loss.baseline: got {self.loss.baseline!r} with a tail, expected 'none'")
        if self.loss.normalize == "sampled" and (top_k or self.loss.kind == "forward_kl"):
            raise ValueError(
                f"loss.normalize: got 'sampled' with {self.loss.kind} on draw {self.draw.name!r}, expected 'exact'"
            )
        if self.loss.baseline == "loo" and self.loss.kind == "forward_kl":
            raise ValueError("loss.baseline: got 'loo' with forward_kl, which has no baseline")
        if self.loss.baseline == "loo" and top_k:
            raise ValueError("loss.baseline: got 'loo' with a top-k draw, expected 'none' or 'mean'")
        corrects = self.draw.name in ("samples", "token") and self.loss.kind == "reverse_kl"
        if self.loss.correction() is not None and not corrects:
            raise ValueError(
                f"loss: a correction needs reverse_kl on draws 'samples' or 'token', got {self.loss.kind} "
                f"on {self.draw.name!r}"
            )
        return self


def load_config(path: Path | None = None, settings: Iterable[str] = (), **overrides: Any) -> TrainConfig:
    """Defaults, then the YAML file, then `key.subkey=value` settings (values in YAML), then overrides by dotted key.

    Raises: ConfigError naming every wrong key with the nearest valid one, and every bad value with what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not a UTF-8 text: {error.reason}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path}: got {type(loaded).__name__}, expected keys and values")
        _merge(values, loaded or {})
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {setting!r}: expected key=value")
        try:
            _assign(values, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: not a valid YAML value: {error}") from None
    for key, value in overrides.items():
        _assign(values, key, value)
    defaults = TrainConfig().model_dump()
    _merge(defaults, values)
    try:
        return TrainConfig.model_validate(defaults)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def dump_config(config: TrainConfig) -> str:
    """YAML that `load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(into.get(key), dict) and isinstance(value, dict | None):
            _merge(into[key], value or {})  # a section whose keys are all commented out is None
        else:
            into[key] = value


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for depth, section in enumerate(sections):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    values[last] = value


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
        if nearest[0] == key:  # written with dots inside a file
            return f"{key}: unknown key; write {location[-1].split('.')[-1]!r} inside its section"
        return f"{key}: unknown key; did you mean {nearest[0]!r}?"
    if error["type"] == "value_error":  # ours: it names the key and what came
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {error['msg']}, got {error['input']!r}"


def known_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key that a configuration may have."""
    keys = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        keys += known_keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
