"""Item and sequence encoders: torch modules that know nothing of Spark, tables or settings."""

from nightstream.models.encoders.base import Batch, EncoderSizes, SequenceEncoder
from nightstream.models.encoders.factory import build_sequence_encoder
from nightstream.models.encoders.item import ItemEncoder, ItemSizes

__all__ = ["Batch", "EncoderSizes", "ItemEncoder", "ItemSizes", "SequenceEncoder", "build_sequence_encoder"]
