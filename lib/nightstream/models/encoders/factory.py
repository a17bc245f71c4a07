"""Builds the encoder that a name stands for. A new one is one file, and one line here."""

from __future__ import annotations

from nightstream.models.encoders.base import EncoderSizes, SequenceEncoder
from nightstream.models.encoders.cnn import ConvolutionEncoder
from nightstream.models.encoders.content import NO_TEXT, ContentEncoder, ItemSizes
from nightstream.models.encoders.gru import RecurrentEncoder
from nightstream.models.encoders.text import TextConvolution, TextRecurrence
from nightstream.models.encoders.transformer import AttentionEncoder

ENCODERS: dict[str, type[SequenceEncoder]] = {
    "gru": RecurrentEncoder,
    "cnn": ConvolutionEncoder,
    "transformer": AttentionEncoder,
}

CONTENT_ENCODERS: dict[str, type[ContentEncoder]] = {
    "cnn": TextConvolution,
    "rnn": TextRecurrence,
}


def build_sequence_encoder(sizes: EncoderSizes) -> SequenceEncoder:
    """The encoder that `sizes.kind` names, with weights from torch's current random state.

    Raises ValueError for a name that nobody has registered.
    """
    if sizes.kind not in ENCODERS:
        raise ValueError(f"unknown encoder {sizes.kind!r}; known are {', '.join(ENCODERS)}")
    return ENCODERS[sizes.kind](sizes)


def build_content_encoder(sizes: ItemSizes) -> ContentEncoder:
    """The encoder that `sizes.text` names, with weights from torch's current random state.

    Raises ValueError for a name that nobody has registered.
    """
    if sizes.text not in CONTENT_ENCODERS:
        raise ValueError(f"unknown text encoder {sizes.text!r}; known are {', '.join((*CONTENT_ENCODERS, NO_TEXT))}")
    return CONTENT_ENCODERS[sizes.text](sizes)
