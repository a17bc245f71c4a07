"""One contract, which every sequence encoder passes."""

from __future__ import annotations

import pytest
import torch
from nightstream.models.encoders import Batch, EncoderSizes, SequenceEncoder, build_sequence_encoder
from nightstream.models.encoders.base import gap_buckets
from nightstream.models.encoders.factory import ENCODERS


def sizes(kind: str, event_types: int = 2) -> EncoderSizes:
    return EncoderSizes(kind, 8, 10, 3, 16, 2, 2, 0.2, event_types, 2, (4,))


def batch(rows: int = 3, length: int = 10, events: int = 6, seed: int = 0, types: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, length - events :] = True
    items = torch.nn.functional.normalize(torch.randn(rows, length, 8, generator=generator), dim=2)
    return Batch(
        items * mask.unsqueeze(2),
        torch.randint(1, types + 1, (rows, length), generator=generator) * mask,
        torch.randint(1, 9, (rows, length), generator=generator) * mask,
        torch.rand(rows, length, generator=generator) * mask,
        mask,
        torch.randn(rows, 2, generator=generator),
        (torch.randint(1, 4, (rows, 1), generator=generator),),
    )


def crop(b: Batch, length: int) -> Batch:
    parts = (
        b.items[:, -length:],
        b.types[:, -length:],
        b.gaps[:, -length:],
        b.values[:, -length:],
        b.mask[:, -length:],
    )
    return Batch(*parts, b.user_numbers, b.user_categories)


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> SequenceEncoder:
    torch.manual_seed(0)
    module = build_sequence_encoder(sizes(request.param)).eval()
    # What starts at zero must count in these tests too.
    for parameter in module.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_shapes_and_unit_length(encoder: SequenceEncoder) -> None:
    out = encoder(batch())
    assert out.shape == (3, 10, 8)
    torch.testing.assert_close(out[:, 4:].norm(dim=2), torch.ones(3, 6))
    assert not out[:, :4].any()


def test_last_is_the_last_of_all_positions(encoder: SequenceEncoder) -> None:
    torch.testing.assert_close(encoder.last(batch()), encoder(batch())[:, -1], atol=1e-6, rtol=1e-5)


def test_an_empty_window_gives_the_zero_vector(encoder: SequenceEncoder) -> None:
    assert not encoder.last(batch(events=0)).any()


def test_the_future_does_not_change_the_past(encoder: SequenceEncoder) -> None:
    now, changed = batch(), batch()
    changed.items[:, -1] = -changed.items[:, -1]
    before, after = encoder(now), encoder(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-4


def test_the_amount_of_padding_does_not_matter(encoder: SequenceEncoder) -> None:
    torch.testing.assert_close(encoder.last(crop(batch(), 6)), encoder.last(batch()), atol=1e-6, rtol=1e-5)


def test_a_prefix_gives_what_its_position_gives_in_the_whole(encoder: SequenceEncoder) -> None:
    whole = batch(events=10)
    prefix = Batch(
        whole.items[:, :7], whole.types[:, :7], whole.gaps[:, :7], whole.values[:, :7], whole.mask[:, :7],
        whole.user_numbers, whole.user_categories,
    )  # fmt: skip
    torch.testing.assert_close(encoder.last(prefix), encoder(whole)[:, 6], atol=1e-6, rtol=1e-5)


def test_rows_do_not_mix(encoder: SequenceEncoder) -> None:
    torch.testing.assert_close(encoder(batch())[1], encoder(batch(seed=0))[1])
    b = batch()
    b.items[0] = 0.5
    torch.testing.assert_close(encoder(b)[1:], encoder(batch())[1:])


@pytest.mark.parametrize("field", ["types", "gaps", "values", "user_numbers"])
def test_every_input_counts(encoder: SequenceEncoder, field: str) -> None:
    b = batch()
    value = getattr(b, field)
    other = 3 - value if field == "types" else value + 1
    if field != "user_numbers":
        other = other * b.mask
    changed = Batch(**{**{f: getattr(b, f) for f in b.__dataclass_fields__}, field: other})
    assert (encoder.last(changed) - encoder.last(b)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ENCODERS)
def test_event_features_start_without_effect(kind: str) -> None:
    torch.manual_seed(0)
    module = build_sequence_encoder(sizes(kind)).eval()
    b = batch()
    bare = Batch(b.items, b.types * 0, b.gaps * 0, b.values * 0, b.mask, b.user_numbers * 0, b.user_categories)
    torch.testing.assert_close(module.last(bare), module.last(b))


def test_gap_buckets_are_powers_of_two_and_zero_where_nothing_comes_before() -> None:
    times = torch.tensor([[0, 5_000_000, 5_000_000, 8_000_000, 9_007_000_000_000_000]])
    mask = torch.tensor([[False, True, True, True, True]])
    assert gap_buckets(times, mask).tolist() == [[0, 0, 1, 3, 25]]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="lstm"):
        build_sequence_encoder(sizes("lstm"))
