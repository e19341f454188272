"""Faults in writing and reading cards."""

import io

import numpy as np
import pyarrow as pa

from lora.testing.binding import PlainPair
from tests.faults.base import Fault


def rewritten(data, metadata=None, stream=False):
    """The file with other schema metadata, or as a stream."""
    reader = pa.ipc.open_file(data)
    batch = reader.get_batch(0)
    if metadata is not None:
        batch = batch.replace_schema_metadata(metadata(dict(batch.schema.metadata)))
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


class TargetsJoinedByCommas(Fault):
    """No targets come back as one empty target, which matches everything, and a comma in a name splits it."""

    breaks = "R1.1"

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(target_modules=tuple(",".join(card.target_modules).split(",")))


class MetadataOverwriteFields(Fault):
    """The author's metadata are merged over the card's own fields."""

    breaks = "R1.3"

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(**{key: card.metadata[key] for key in ("name", "rank", "alpha") if key in card.metadata})


class LastModuleLost(Fault):
    """The last module is left out."""

    breaks = "R1.2"

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(weights=dict(list(card.weights.items())[:-1]))


class MetadataAsText(Fault):
    """Metadata values come back as strings."""

    breaks = "R1.3"

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(metadata={key: str(value) for key, value in card.metadata.items()})


class StreamInsteadOfFile(Fault):
    """Writes the Arrow stream format."""

    breaks = "R1.4"

    def write_card(self, card):
        return rewritten(super().write_card(card), stream=True)

    def read_card(self, data):
        batch = pa.ipc.open_stream(data).read_next_batch()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return super().read_card(sink.getvalue())


class EverythingIsFloat32(Fault):
    """Factors come back as float32, whatever they were."""

    breaks = "R1.7"

    def read_card(self, data):
        card = super().read_card(data)
        with np.errstate(all="ignore"):
            wide = {m: PlainPair(p.A.astype("f4"), p.B.astype("f4"), p.scaling) for m, p in card.weights.items()}
        return card._replace(weights=wide)


class ZerosLoseTheirSign(Fault):
    """Factors pass through an addition: -0 becomes +0."""

    breaks = "R1.7"

    def read_card(self, data):
        card = super().read_card(data)
        with np.errstate(all="ignore"):
            added = {m: PlainPair(p.A + p.A.dtype.type(0), p.B, p.scaling) for m, p in card.weights.items()}
        return card._replace(weights=added)


class ScalingAlwaysAlphaOverRank(Fault):
    """A module's own scaling is ignored."""

    breaks = "R1.8"

    def read_card(self, data):
        card = super().read_card(data)
        plain = {m: PlainPair(p.A, p.B, card.alpha / card.rank) for m, p in card.weights.items()}
        return card._replace(weights=plain)


class AnyVersionIsRead(Fault):
    """The format version is ignored."""

    breaks = "R1.10"

    def read_card(self, data):
        try:
            return super().read_card(rewritten(data, lambda keys: {**keys, b"lora.format": b"1.0"}))
        except (pa.ArrowInvalid, OSError):
            return super().read_card(data)


class UnknownKeysAreDropped(Fault):
    """Schema metadata of later versions get lost."""

    breaks = "R1.10"

    def read_card(self, data):
        return super().read_card(data)._replace(extra={})


class RankAndAlphaUnchecked(Fault):
    """A rank below 1 and an alpha of 0 are quietly replaced."""

    breaks = "R7.6"

    def write_card(self, card):
        try:
            return super().write_card(card)
        except ValueError:
            return super().write_card(card._replace(rank=1, alpha=1.0, weights={}))


CARD_FAULTS = [value for value in list(globals().values()) if isinstance(value, type) and issubclass(value, Fault)][1:]
