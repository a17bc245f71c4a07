from __future__ import annotations

import pytest
import torch
from nightstream.models.encoders.content import NO_TEXT, ItemBatch, ItemSizes
from nightstream.models.encoders.factory import CONTENT_ENCODERS
from nightstream.models.encoders.item import ItemEncoder
from nightstream.models.encoders.text import TextConvolution


def sizes(text: str, id_dropout: float = 0.0) -> ItemSizes:
    return ItemSizes(5, 8, 2, (4,), 9, text, id_dropout)


def items(ids: list[int]) -> ItemBatch:
    n = len(ids)
    tokens = torch.tensor([[2 + i % 5, 3, 0] for i in range(n)])
    categories = (torch.tensor([[1 + i % 3, 0] for i in range(n)]),)
    return ItemBatch(torch.tensor(ids), torch.linspace(-1, 1, 2 * n).view(n, 2), categories, tokens)


def reading(tokens: torch.Tensor) -> ItemBatch:
    """Items that have nothing but a text."""
    count = len(tokens)
    return ItemBatch(torch.zeros(count, dtype=torch.int64), torch.zeros(count, 0), (), tokens)


@pytest.mark.parametrize("text", [*CONTENT_ENCODERS, NO_TEXT])
def test_vectors_have_unit_length_with_and_without_id(text: str) -> None:
    torch.manual_seed(0)
    out = ItemEncoder(sizes(text)).eval()(items([1, 2, 0, 0]))
    assert out.shape == (4, 8)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("part", ["numbers", "categories", "tokens"])
@pytest.mark.parametrize("text", CONTENT_ENCODERS)
def test_every_part_of_the_content_counts_without_an_id(text: str, part: str) -> None:
    torch.manual_seed(0)
    encoder, batch = ItemEncoder(sizes(text)).eval(), items([0, 0])
    fields = {f: getattr(batch, f) for f in batch.__dataclass_fields__}
    other = (torch.tensor([[3, 2], [3, 2]]),) if part == "categories" else fields[part] + 1
    changed = ItemBatch(**{**fields, part: other})
    assert (encoder(changed) - encoder(batch)).abs().max() > 1e-4


@pytest.mark.parametrize("text", CONTENT_ENCODERS)
def test_padding_of_the_text_does_not_matter(text: str) -> None:
    torch.manual_seed(0)
    encoder, batch = ItemEncoder(sizes(text)).eval(), items([1, 2])
    longer = ItemBatch(batch.ids, batch.numbers, batch.categories, torch.nn.functional.pad(batch.tokens, (0, 4)))
    torch.testing.assert_close(encoder(longer), encoder(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("text", CONTENT_ENCODERS)
def test_an_item_without_text_gets_the_zero_vector_and_items_do_not_mix(text: str) -> None:
    torch.manual_seed(0)
    encoder, batch = CONTENT_ENCODERS[text](sizes(text)).eval(), items([1, 2, 3])
    batch.tokens[1] = 0
    out = encoder(batch)
    assert out.shape == (3, 8)
    assert not out[1].any()
    torch.testing.assert_close(encoder(batch.take(torch.tensor([2])))[0], out[2])


def test_an_unknown_text_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'lstm'; known are cnn, rnn, none"):
        ItemEncoder(sizes("lstm"))


def test_the_text_convolution_equals_a_window_slid_over_each_text() -> None:
    torch.manual_seed(0)
    texts = TextConvolution(sizes("cnn"))
    tokens = torch.tensor([[2, 3, 4, 3], [0, 0, 0, 0], [5, 0, 0, 0], [8, 1, 0, 0], [6, 7, 2, 3]])
    for row, vector in zip(tokens, texts(reading(tokens)), strict=True):
        words = texts.words(row[row > 0])
        around = torch.nn.functional.pad(words, (0, 0, 1, 1))
        answers = [texts.convolution(around[i : i + 3].flatten()).relu() for i in range(len(words))]
        strongest = torch.stack(answers).amax(0) if answers else torch.zeros(8)
        mean = words.mean(0) if len(words) else torch.zeros(4)
        torch.testing.assert_close(vector, texts.out(torch.cat([strongest, mean])))


def test_padding_learns_nothing() -> None:
    texts = TextConvolution(sizes("cnn"))
    texts(reading(torch.tensor([[2, 3, 0], [4, 0, 0]]))).sum().backward()
    assert not texts.words.weight.grad[0].any()  # type: ignore[index]


def test_before_training_items_of_one_category_are_alike() -> None:
    torch.manual_seed(0)
    encoder = ItemEncoder(ItemSizes(5, 64, 0, (4,), 2, "none", 0.0)).eval()
    nothing = torch.zeros(2, 0)
    one, other = encoder(ItemBatch(torch.tensor([1, 2]), nothing, (torch.tensor([[2], [2]]),), nothing.long()))
    assert one @ other > 0.7


def test_an_item_without_anything_gets_a_vector() -> None:
    encoder = ItemEncoder(ItemSizes(5, 8, 0, (), 2, "none", 0.0)).eval()
    nothing = ItemBatch(torch.tensor([0]), torch.zeros(1, 0), (), torch.zeros(1, 0, dtype=torch.int64))
    assert encoder(nothing).norm().item() == pytest.approx(1.0, abs=1e-5)


def test_id_dropout_acts_in_training_alone_and_only_where_there_is_content() -> None:
    torch.manual_seed(0)
    encoder = ItemEncoder(sizes("none", id_dropout=1.0))
    batch, without = items([1, 2]), items([0, 0])
    torch.testing.assert_close(encoder.train()(batch), encoder(without))
    assert (encoder.eval()(batch) - encoder(without)).abs().max() > 1e-4
    bare = ItemEncoder(ItemSizes(5, 8, 0, (), 2, "none", 1.0)).train()
    ids = ItemBatch(torch.tensor([1, 0]), torch.zeros(2, 0), (), torch.zeros(2, 0, dtype=torch.int64))
    assert (bare(ids)[0] - bare(ids)[1]).abs().max() > 1e-4
