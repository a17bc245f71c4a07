"""Builds the sequence encoder that a name stands for. A new encoder is one file, and one line here."""

from __future__ import annotations

from nightstream.models.encoders.base import EncoderSizes, SequenceEncoder
from nightstream.models.encoders.cnn import ConvolutionEncoder
from nightstream.models.encoders.gru import RecurrentEncoder
from nightstream.models.encoders.transformer import AttentionEncoder

ENCODERS: dict[str, type[SequenceEncoder]] = {
    "gru": RecurrentEncoder,
    "cnn": ConvolutionEncoder,
    "transformer": AttentionEncoder,
}


def build_sequence_encoder(sizes: EncoderSizes) -> SequenceEncoder:
    """The encoder that `sizes.kind` names, with weights from torch's current random state.

    Raises ValueError for a name that nobody has registered.
    """
    if sizes.kind not in ENCODERS:
        raise ValueError(f"unknown encoder {sizes.kind!r}; known are {', '.join(ENCODERS)}")
    return ENCODERS[sizes.kind](sizes)
