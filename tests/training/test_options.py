"""training.options: from YAML to the sizes that are trained."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from learning_data import ring_sequences
from nightstream.errors import SettingsError
from nightstream.models.arrays import ItemFeatures
from nightstream.models.encoders.text import TextRecurrence
from nightstream.runtime import settings
from nightstream.training.hyperparameters import encoder_sizes, item_sizes, training_sizes
from nightstream.training.pipeline import learn
from nightstream.training.spark_job import learn_spec
from nightstream.training.trainer import train_encoder

BASE = Path(__file__).parents[2] / "conf" / "base.yaml"
OPTIONS = sorted(settings.TrainingOptions.model_fields)
# One value of each option that no rule gives.
OTHER = {
    "width": 12, "hidden": 20, "layers": 3, "heads": 4, "span": 3, "dropout": 0.15, "text": "rnn", "id_dropout": 0.2,
    "learning_rate": 0.01, "weight_decay": 0.001, "positions": 77, "negatives": 5, "scale": 9.5, "patience": 7,
    "valid_limit": 40,
}  # fmt: skip


def with_text(items: int = 30) -> ItemFeatures:
    """Items whose first word is their number."""
    tokens = np.stack([np.arange(2, items + 2), np.full(items, items + 2)], 1).astype(np.int32)
    return ItemFeatures(np.zeros((items, 0), np.float32), (), (), tokens, items + 3)


def loaded(**options: Any) -> settings.Settings:
    return settings.load([BASE], [f"training.options.{name}={value}" for name, value in options.items()])


def sizes(options: dict[str, Any]) -> dict[str, Any]:
    """All sizes of an encoder by name."""
    sequences, options = ring_sequences(users=5), {**options, "encoder": "transformer"}
    return {
        **asdict(item_sizes(options, with_text())),
        **asdict(encoder_sizes(options, sequences, 1)),
        **asdict(training_sizes(options, sequences, 30)),
    }


def test_auto_everywhere_is_what_the_rules_say() -> None:
    base = loaded()
    rules = {"window": base.window.length, "epochs": base.training.epochs}
    assert set(base.training.options.model_dump().values()) == {"auto"}
    assert sizes(learn_spec(base).options) == sizes(rules)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_size_of_its_name(name: str) -> None:
    before, after = (sizes(learn_spec(s).options) for s in (loaded(), loaded(**{name: OTHER[name]})))
    assert (after[name], before[name] != after[name]) == (OTHER[name], True)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_is_refused_in_one_sentence_and_its_range_stands_in_base(name: str) -> None:
    for wrong in ("-1", "9e9", "many", "true", "[1]", ".nan"):
        with pytest.raises(SettingsError) as raised:
            learn_spec(loaded(**{name: wrong}))
        (problem,) = raised.value.problems
        assert problem.startswith(f"training.options.{name}: ")
    (line,) = re.findall(rf"^    {name}: auto +# (.*)$", BASE.read_text(encoding="utf-8"), re.MULTILINE)
    given = re.search(r"write auto or a (whole )?number from (\S+) to (\S+)", problem)
    if given is None:
        assert line.startswith("auto | cnn | rnn | none;")
    else:
        low, high = re.match(r"auto or ([\d.]+?)\.\.([\d.]+)", line).groups()  # type: ignore[union-attr]
        assert (float(low), float(high)) == (float(given[2]), float(given[3]))
        for at_the_end in (low, high):
            assert loaded(**{name: at_the_end})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"training\.options\.widht is not a setting"):
        loaded(widht=3)


def test_a_recurrent_network_reads_the_text_when_the_settings_say_so(tmp_path: Path) -> None:
    overlay = {
        "training": {
            "encoders": ["gru"],
            "epochs": 1,
            "options": {"text": "rnn", "width": 8, "positions": 128, "learning_rate": 0.02},
        }
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    spec = replace(learn_spec(settings.load([BASE, tmp_path / "mine.yaml"])), use_ranker=False, refit=False)
    features = with_text()
    torch.set_num_threads(1)
    model = learn(ring_sequences(), features, [str(n) for n in range(30)], ["e"], spec, train_encoder, tmp_path / "w")
    (member,) = model.members
    assert isinstance(member.items.text, TextRecurrence)
    history = json.loads((tmp_path / "w" / "first-gru" / "history.json").read_text())
    assert (history["item_sizes"]["text"], history["training_sizes"]["positions"]) == ("rnn", 128)
    # Two strangers with other words get other vectors, so the network reads.
    first, second = model.encode_items(features.take(np.array([3, 4])), ["new", "newer"])
    assert not np.allclose(first, second, atol=1e-3)


def test_sizes_that_do_not_fit_together_are_refused_before_training(tmp_path: Path) -> None:
    spec = replace(learn_spec(loaded(heads=3)), encoders=("transformer",))

    def never(job: dict[str, Any]) -> None:
        raise AssertionError("training has started")

    with pytest.raises(SettingsError, match="heads"):
        learn(ring_sequences(), with_text(), [str(n) for n in range(30)], ["e"], spec, never, tmp_path)
