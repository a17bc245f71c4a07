"""Sizes of models and of their training, derived from the data by one set of rules where they are given as "auto"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nightstream.errors import SettingsError
from nightstream.models.arrays import ItemFeatures, Sequences
from nightstream.models.encoders.base import EncoderSizes
from nightstream.models.encoders.item import ItemSizes

FULL_SOFTMAX_ITEMS = 50_000


@dataclass(frozen=True)
class TrainingSizes:
    """How one encoder is trained.

    epochs: at most. patience: epochs without a better validation NDCG@10 before stopping. positions: targets per step
    over all processes. learning_rate: of AdamW. weight_decay: of AdamW. negatives: sampled items per step, 0 for the
    full softmax. scale: 1 / temperature at the start. valid_limit: targets that early stopping looks at.
    """

    epochs: int
    patience: int
    positions: int
    learning_rate: float
    weight_decay: float
    negatives: int
    scale: float
    valid_limit: int


def valid_limit(options: dict[str, Any]) -> int:
    """Targets that early stopping and the reported figures look at. Rule: 3000."""
    return int(_pick(options, "valid_limit", 3000))


def _pick(options: dict[str, Any], name: str, rule: Any) -> Any:
    value = options.get(name, "auto")
    return rule if value == "auto" else type(rule)(value)


def item_sizes(options: dict[str, Any], features: ItemFeatures) -> ItemSizes:
    """Rules: width 64; text by convolution if there is any; a tenth of the items per step without their id."""
    has_text = features.tokens.shape[1] > 0 and features.vocabulary_size > 2
    return ItemSizes(
        vocabulary=len(features),
        width=_pick(options, "width", 64),
        numbers=features.numbers.shape[1],
        category_sizes=tuple(features.category_sizes),
        words=features.vocabulary_size,
        text=_pick(options, "text", "cnn" if has_text else "none") if has_text else "none",
        id_dropout=_pick(options, "id_dropout", 0.1),
    )


def encoder_sizes(options: dict[str, Any], sequences: Sequences, event_types: int) -> EncoderSizes:
    """Rules: window 30; the convolutions look at 5 events; hidden layers are twice as wide as the vectors (the
    recurrent state 1.5 times); dropout 0.3. Raises SettingsError where the transformer's heads do not divide the width.
    """
    width, heads = _pick(options, "width", 64), _pick(options, "heads", 2)
    if options["encoder"] == "transformer" and width % heads:
        raise SettingsError([f"training.options: heads ({heads}) must divide width ({width}); change one of them"])
    return EncoderSizes(
        kind=options["encoder"],
        width=width,
        window=_pick(options, "window", 30),
        span=_pick(options, "span", 5),
        hidden=_pick(options, "hidden", width * 3 // 2 if options["encoder"] == "gru" else 2 * width),
        layers=_pick(options, "layers", 2),
        heads=heads,
        dropout=_pick(options, "dropout", 0.3),
        event_types=event_types,
        user_numbers=sequences.users.numbers.shape[1],
        user_categories=tuple(sequences.users.category_sizes),
    )


def training_sizes(options: dict[str, Any], sequences: Sequences, items: int) -> TrainingSizes:
    """Rules: about 100 steps an epoch, of 512 to 4,096 targets, but of no less than a twelfth of the items, which a
    step encodes all; the full softmax up to 50,000 items, 8,192 sampled items beyond."""
    events = len(sequences.items)
    return TrainingSizes(
        epochs=_pick(options, "epochs", 25),
        patience=_pick(options, "patience", 3),
        positions=_pick(options, "positions", int(np.clip(max(events // 100, items // 12), 512, 4096))),
        learning_rate=_pick(options, "learning_rate", 0.003),
        weight_decay=_pick(options, "weight_decay", 0.0),
        negatives=_pick(options, "negatives", 0 if items <= FULL_SOFTMAX_ITEMS else 8192),
        scale=_pick(options, "scale", 12.0),
        valid_limit=valid_limit(options),
    )
