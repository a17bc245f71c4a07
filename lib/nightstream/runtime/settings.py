"""Typed, range-checked settings: base.yaml, overlays, and `--set key=value` on top.

The values live in conf/base.yaml alone; the classes here give the types and the ranges. conf/ is also a folder of the
package, so an installation from the wheel has the same files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from nightstream.errors import SettingsError
from nightstream.runtime import secrets

CONF = (Path(__file__).parents[1] / "conf").resolve()
EVENT_COLUMNS = ("event_id", "user_id", "item_id", "event_type", "event_time", "value", "retracts")
# Nothing that was given there is shown in a message: it may be a secret.
_CONFIDENTIAL = (("stream", "options"), ("spark", "remote"), ("sync", "url"))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StorageSettings(Section):
    root: str = Field(min_length=1)
    kind: Literal["path", "catalog"]
    engine: Literal["auto", "spark", "delta-rs"]
    work_dir: str = Field(min_length=1)

    @property
    def is_folder(self) -> bool:
        """Whether the tables lie in a file system of this machine."""
        return self.kind == "path" and "://" not in self.root

    @model_validator(mode="after")
    def _can_be_written(self) -> StorageSettings:
        if self.engine == "delta-rs" and not self.is_folder:
            raise ValueError("engine: delta-rs writes tables in a local folder alone; with this root leave it at auto")
        return self

    def scratch(self, name: str) -> Path:
        """The folder of that name below work_dir, apart from those of other installations with the same work_dir."""
        root = str(Path(self.root).absolute()) if self.is_folder else self.root
        return Path(self.work_dir) / f"{name}-{hashlib.sha256(f'{self.kind} {root}'.encode()).hexdigest()[:12]}"


class SparkSettings(Section):
    master: str
    remote: str | None = Field(pattern=r"^sc://[^/;\s]+")
    driver_memory: str = Field(pattern=r"^\d+[mg]$")
    shuffle_partitions: int = Field(ge=1, le=10_000)
    adaptive: bool
    warehouse: str = Field(min_length=1)
    cache: str | None = Field(min_length=1)
    packages: tuple[str, ...]

    @field_validator("remote")
    @classmethod
    def _no_token(cls, remote: str | None) -> str | None:
        if remote is not None and "token=" in remote:
            raise ValueError("holds a token in plain text; give the whole address by the variable SPARK_REMOTE instead")
        return remote


class EventSettings(Section):
    types: tuple[str, ...] = Field(min_length=1)
    window_types: tuple[str, ...] = Field(min_length=1)
    default_type: str
    retraction_type: str
    max_id_length: int = Field(ge=1, le=4096)
    max_payload_bytes: int = Field(ge=1_000, le=100_000_000)
    max_future_seconds: int = Field(ge=0, le=604_800)
    min_value: float
    max_value: float

    @model_validator(mode="after")
    def _consistent(self) -> EventSettings:
        unknown = [t for t in (*self.window_types, self.default_type) if t not in self.types]
        if unknown:
            raise ValueError(f"window_types and default_type must be among types; not there: {', '.join(unknown)}")
        if self.min_value > self.max_value:
            raise ValueError("min_value must not exceed max_value")
        if self.retraction_type in self.types:
            raise ValueError("retraction_type must not be one of types")
        return self


BatchFormat = Literal["csv", "jsonl", "parquet", "delta", "recbole"]


class EventSource(Section):
    format: BatchFormat
    path: str = Field(min_length=1)
    columns: dict[str, str]
    time_unit: Literal["auto", "seconds", "milliseconds", "microseconds", "nanoseconds", "iso"]
    time_zone: str = "UTC"

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        if not re.fullmatch(r"[+-]\d\d:\d\d", name):
            try:
                ZoneInfo(name)
            except (ValueError, OSError, ZoneInfoNotFoundError):
                raise ValueError(f"{name!r} is no time zone; write it as UTC, Asia/Shanghai or +08:00") from None
        return name

    @model_validator(mode="after")
    def _known_columns(self) -> EventSource:
        unknown = sorted(set(self.columns) - set(EVENT_COLUMNS))
        if unknown:
            raise ValueError(f"columns: {', '.join(unknown)} not among {', '.join(EVENT_COLUMNS)}")
        missing = [c for c in ("user_id", "item_id", "event_time") if c not in self.columns]
        if missing:
            raise ValueError(f"columns: {', '.join(missing)} must be mapped")
        return self


_SUFFIXES = {"inter": "recbole", "item": "recbole", "user": "recbole", "csv": "csv", "parquet": "parquet"}
_SUFFIXES |= dict.fromkeys(("json", "jsonl", "ndjson"), "jsonl")


class AttributeSource(Section):
    @model_validator(mode="before")
    @classmethod
    def _format_by_suffix(cls, document: Any) -> Any:
        if isinstance(document, dict) and "format" not in document:
            guess = _SUFFIXES.get(str(document.get("path")).rpartition(".")[2].lower())
            return {"format": guess, **document} if guess else document
        return document


class ItemSource(AttributeSource):
    format: BatchFormat
    path: str = Field(min_length=1)
    id: str = "item_id"
    title: str | None = None
    text: tuple[str, ...] = ()
    categories: dict[str, str | None] = {}
    numbers: tuple[str, ...] = ()
    available: str | None = None


class UserSource(AttributeSource):
    format: BatchFormat
    path: str = Field(min_length=1)
    id: str = "user_id"
    categories: dict[str, str | None] = {}
    numbers: tuple[str, ...] = ()


class SourceSettings(Section):
    events: EventSource
    items: ItemSource | None
    users: UserSource | None


class StreamSettings(Section):
    format: Literal["jsonl", "delta", "kafka"]
    path: str = Field(min_length=1)
    options: dict[str, str]
    checkpoint: str = Field(min_length=1)
    max_per_trigger: int = Field(ge=1, le=1_000_000)
    trigger_seconds: float = Field(ge=0, le=3600)
    snapshot_seconds: float = Field(ge=0, le=3600)
    handover_slice: int = Field(ge=0, le=1_000_000)
    merge_share: float = Field(gt=0, le=1)
    metrics_seconds: float = Field(ge=1, le=3600)

    @field_validator("options")
    @classmethod
    def _no_literal_secrets(cls, options: dict[str, str]) -> dict[str, str]:
        literal = secrets.literal_secrets(options)
        if literal:
            raise ValueError(
                f"{', '.join(literal)} holds a secret in plain text; "
                "write ${env:NAME} or, on Databricks, ${secret:scope/key} in its place"
            )
        return options

    def resolved_options(self) -> dict[str, str]:
        """The source options with every reference replaced by its secret. Raises SettingsError for one without."""
        options, problems = secrets.resolve(self.options)
        if problems:
            raise SettingsError([f"stream.options: {p}" for p in problems])
        return options


class WindowSettings(Section):
    length: int = Field(ge=1, le=1000)
    seen_limit: int = Field(ge=1, le=100_000)


class FeatureSettings(Section):
    max_words: int = Field(ge=100, le=1_000_000)
    max_tokens: int = Field(ge=1, le=512)
    max_category_values: int = Field(ge=1, le=1_000_000)


AutoInt = int | Literal["auto"]
AutoFloat = float | Literal["auto"]


def _auto_or(low: float, high: float, whole: bool = False) -> BeforeValidator:
    """Lets "auto" and numbers from low to high pass, so that a wrong value gives one sentence and not one per type."""

    def check(value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if value != "auto" and not (number and low <= value <= high and (not whole or value == int(value))):
            raise ValueError(f"write auto or a {'whole ' if whole else ''}number from {low} to {high}")
        return value

    return BeforeValidator(check)


class TrainingOptions(Section):
    """Sizes of every encoder and of its training; training/hyperparameters has the rules that "auto" stands for."""

    width: Annotated[AutoInt, _auto_or(4, 4096, whole=True)]
    hidden: Annotated[AutoInt, _auto_or(4, 16_384, whole=True)]
    layers: Annotated[AutoInt, _auto_or(1, 24, whole=True)]
    heads: Annotated[AutoInt, _auto_or(1, 64, whole=True)]
    span: Annotated[AutoInt, _auto_or(1, 100, whole=True)]
    dropout: Annotated[AutoFloat, _auto_or(0, 0.9)]
    text: str
    id_dropout: Annotated[AutoFloat, _auto_or(0, 0.9)]
    learning_rate: Annotated[AutoFloat, _auto_or(1e-6, 1)]
    weight_decay: Annotated[AutoFloat, _auto_or(0, 1)]
    positions: Annotated[AutoInt, _auto_or(1, 1_000_000, whole=True)]
    negatives: Annotated[AutoInt, _auto_or(0, 1_000_000, whole=True)]
    scale: Annotated[AutoFloat, _auto_or(0.1, 100)]
    patience: Annotated[AutoInt, _auto_or(1, 1000, whole=True)]
    valid_limit: Annotated[AutoInt, _auto_or(1, 10_000_000, whole=True)]


class TrainingSettings(Section):
    encoders: tuple[str, ...] = Field(min_length=1)
    parallel_encoders: int = Field(ge=1, le=8)
    threads: int = Field(ge=1, le=256)
    epochs: int = Field(ge=1, le=1000)
    max_events: int = Field(ge=1000, le=1_000_000_000)
    seed: int
    processes: int = Field(ge=1, le=64)
    local_mode: bool
    device: Literal["auto", "cpu", "cuda"]
    validation_fraction: float = Field(ge=0.001, le=0.4)
    ranking_fraction: float = Field(ge=0.001, le=0.4)
    options: TrainingOptions


class RetrievalSettings(Section):
    reach: int = Field(ge=1, le=1000)
    neighbours: int = Field(ge=1, le=10_000)
    shrink: float = Field(ge=0, le=100_000)
    history: int = Field(ge=1, le=100_000)
    half_life_days: float | None = Field(gt=0, le=36_500)
    trend_half_life_days: float | None = Field(gt=0, le=36_500)
    prior_events: float = Field(ge=1, le=1_000_000)
    recency: float = Field(gt=0, le=1)

    @field_validator("half_life_days", "trend_half_life_days", mode="before")
    @classmethod
    def _auto_is_derived(cls, value: Any) -> Any:
        return None if value == "auto" else value


class RankingSettings(Section):
    depth: int = Field(ge=1, le=12)
    learning_rate: float = Field(gt=0, le=1)
    trees: int = Field(ge=1, le=10_000)
    patience: int = Field(ge=1, le=10_000)
    min_child_weight: float = Field(ge=0, le=100_000)
    column_share: float = Field(gt=0, le=1)
    row_share: float = Field(gt=0, le=1)
    l2: float = Field(ge=0, le=1_000_000)
    label_limit: int = Field(ge=10, le=10_000_000)
    threads: int = Field(ge=1, le=256)


class GateSettings(Section):
    margin: float | None = Field(ge=0, le=1)
    min_events: int = Field(ge=1, le=1_000_000)
    sample_events: int = Field(ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _reachable(self) -> GateSettings:
        if self.min_events > self.sample_events:
            raise ValueError("min_events must not exceed sample_events")
        return self


class ServingSettings(Section):
    top_k: int = Field(ge=1, le=1000)
    default_user: str = Field(min_length=1)
    merge_attempts: int = Field(ge=1, le=100)
    lease_seconds: int = Field(ge=5, le=3600)


class EvaluationSettings(Section):
    cut_fraction: float = Field(ge=0.001, le=0.9)
    delays_seconds: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_negative(self) -> EvaluationSettings:
        if any(d < 0 for d in self.delays_seconds):
            raise ValueError("delays_seconds must be 0 or more")
        return self


class SyncSettings(Section):
    target: Literal["postgresql", "redis"] | None
    url: str | None = Field(min_length=1)
    table: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}(\.[A-Za-z_][A-Za-z0-9_]{0,62})?$")
    prefix: str = Field(min_length=1, max_length=256)
    poll_seconds: float = Field(ge=0.01, le=3600)
    batch_rows: int = Field(ge=1, le=100_000)
    retry_seconds: float = Field(ge=0, le=86_400)
    checkpoint: str = Field(min_length=1)

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        bare = secrets.REFERENCE.sub("", url or "")
        with suppress(ValueError):
            parts = urlsplit(bare)
            fields = [parts.password or "", *(v for name, v in parse_qsl(parts.query) if name.endswith("password"))]
            if not any(fields):
                return url
        raise ValueError("holds a password in plain text, or is no address; write ${env:NAME} in its place")


class Settings(Section):
    storage: StorageSettings
    spark: SparkSettings
    events: EventSettings
    sources: SourceSettings
    stream: StreamSettings
    window: WindowSettings
    features: FeatureSettings
    training: TrainingSettings
    retrieval: RetrievalSettings
    ranking: RankingSettings
    gate: GateSettings
    serving: ServingSettings
    evaluation: EvaluationSettings
    sync: SyncSettings


# Sections that an overlay replaces as a whole: merging one source's columns into another's would mix two mappings.
_REPLACED = {("sources", "items"), ("sources", "users"), ("sources", "events", "columns"), ("stream", "options")}
# Of an overlay; what has a separator or a suffix is a path.
_NAME = re.compile(r"[\w-]+")


def load(files: Sequence[str | Path], overrides: Iterable[str] = ()) -> Settings:
    """Settings from base.yaml, with each of `files` on top, and `overrides` on top of all.

    Args:
        files: at least one; each a path, or the name of an overlay in conf/ such as `movielens` where no file has that
            name. base.yaml is the one beside the first file, or else the one in conf/.
        overrides: `section.key=value`, the value in YAML.

    Returns:
        The settings, checked.

    Raises:
        SettingsError: with every problem found: missing files, bad YAML, unknown keys, types and ranges.
    """
    problems: list[str] = []
    merged: dict[str, Any] = {}
    for path in _with_base([_path_of(f) for f in files]):
        document = _read(path, problems)
        if document:
            merged = _merge(merged, document)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {override}: write it as section.key=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"--set {key}: the value is not valid YAML, put it in quotes")
            continue
        _assign(merged, key.strip().split("."), value)
    if problems:
        raise SettingsError(problems)
    return validate(merged)


def validate(document: dict[str, Any]) -> Settings:
    """Settings from a complete document. Raises SettingsError with every problem."""
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        raise SettingsError([_sentence(e) for e in error.errors()]) from None


def overlays() -> list[str]:
    """Names of the overlays in conf/, each of which can stand in place of a path."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if path.name != "base.yaml")


def leaf_keys(section: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every setting's dotted name and the section that has it, for the test that each of them is read somewhere."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", section
        else:
            yield from leaf_keys(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _path_of(given: str | Path) -> Path:
    overlay = CONF / f"{given}.yaml"
    if _NAME.fullmatch(str(given)) and overlay.is_file() and not Path(given).is_file():
        return overlay
    return Path(given)


def _with_base(files: list[Path]) -> list[Path]:
    if not files:
        raise SettingsError(["give at least one file or overlay with --settings, such as --settings movielens"])
    beside = files[0].parent / "base.yaml"
    base = beside if beside.is_file() else CONF / "base.yaml"
    if any(f.resolve() == base.resolve() for f in files):
        return files
    return [base, *files]


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        remedy = "check the path given with --settings"
        if _NAME.fullmatch(str(path)):
            remedy += f", or name one of the overlays {', '.join(overlays())}"
        problems.append(f"the settings file {path} cannot be read; {remedy}")
        return {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problems.append(f"{path} is not valid YAML{f' (line {mark.line + 1})' if mark else ''}; mend it")
        return {}
    if document is None:
        return {}
    if not isinstance(document, dict):
        problems.append(f"{path} must hold sections with keys, not a {type(document).__name__}")
        return {}
    return document


def _merge(low: Any, high: Any, path: tuple[str, ...] = ()) -> Any:
    if not isinstance(low, dict) or not isinstance(high, dict) or path in _REPLACED:
        return high
    merged = dict(low)
    for key, value in high.items():
        merged[key] = _merge(low[key], value, (*path, str(key))) if key in low else value
    return merged


def _assign(document: dict[str, Any], path: list[str], value: Any) -> None:
    """Set one key, and that alone: unlike an overlay, it leaves the rest of its section as it is."""
    *above, last = path
    for part in above:
        inner = document.get(part)
        document[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        document = inner
    document[last] = value


def _sentence(error: Any) -> str:
    key = ".".join(str(p) for p in error["loc"]) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a setting; remove it or see {CONF / 'base.yaml'} for the name"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    hidden = isinstance(error["input"], dict) or error["loc"][:2] in _CONFIDENTIAL
    given = "" if hidden else f" (given: {error['input']!r})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"
