from __future__ import annotations

import numpy as np
import pytest
from learning_data import plain_items, ring_sequences
from nightstream.errors import SettingsError
from nightstream.models.arrays import ItemFeatures
from nightstream.training.hyperparameters import FULL_SOFTMAX_ITEMS, encoder_sizes, item_sizes, training_sizes


def test_auto_means_the_rule_and_a_value_overrides_it() -> None:
    sequences = ring_sequences()
    auto = encoder_sizes({"encoder": "cnn", "width": "auto"}, sequences, 1)
    assert auto == encoder_sizes({"encoder": "cnn"}, sequences, 1)
    assert encoder_sizes({"encoder": "cnn", "width": 16, "dropout": 0}, sequences, 1).width == 16


def test_text_is_read_only_where_there_is_text() -> None:
    assert item_sizes({"text": "rnn"}, plain_items(3)).text == "none"
    text = ItemFeatures(np.zeros((3, 0), np.float32), (), (), np.ones((3, 4), np.int32), 9)
    assert item_sizes({}, text).text == "cnn"
    assert item_sizes({"text": "rnn"}, text).text == "rnn"


def test_large_catalogues_are_sampled() -> None:
    sequences = ring_sequences()
    assert training_sizes({}, sequences, FULL_SOFTMAX_ITEMS).negatives == 0
    assert training_sizes({}, sequences, FULL_SOFTMAX_ITEMS + 1).negatives > 0


def test_steps_grow_with_the_data_between_their_bounds() -> None:
    few, many = ring_sequences(users=10), ring_sequences(users=20_000, events=30)
    assert training_sizes({}, few, 30).positions == 512
    assert training_sizes({}, many, 30).positions == 4096


def test_a_step_encodes_no_more_than_a_dozen_items_per_target() -> None:
    assert training_sizes({}, ring_sequences(users=10), 24_000).positions == 2000


def test_heads_must_divide_the_width() -> None:
    sequences = ring_sequences(users=3)
    with pytest.raises(SettingsError, match=r"heads \(3\) must divide width \(64\)"):
        encoder_sizes({"encoder": "transformer", "heads": 3}, sequences, 1)
    assert encoder_sizes({"encoder": "gru", "heads": 3}, sequences, 1).heads == 3
