"""Faults in writing and reading cards."""

import io
import math

import numpy as np
import pyarrow as pa

from lora.testing.binding import PlainPair
from tests.faults.base import Fault, faults_in

COLUMNS = ["module", "scaling", "A", "B"]


def rewritten(data, metadata=dict, columns=None, stream=False):
    """The file with other schema metadata, with some of its columns, or as a stream."""
    batch = pa.ipc.open_file(data).get_batch(0)
    batch = batch.select(columns or batch.schema.names).replace_schema_metadata(
        metadata(batch.schema.metadata)
    )
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def with_pairs(card, change):
    """The card with each pair changed; the arithmetic of NaN is no matter here."""
    with np.errstate(all="ignore"):
        return card._replace(
            weights={module: change(pair) for module, pair in card.weights.items()}
        )


class TargetsJoinedByCommas(Fault):
    """No targets come back as one empty target, and a comma in a name splits it."""

    breaks = "R1.1"
    turns_red = frozenset({"R1.1", "R1.10", "R7.6"})

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(
            target_modules=tuple(dict.fromkeys(",".join(card.target_modules).split(",")))
        )


class AlphaOfTheFileIgnored(Fault):
    """Every card comes back with the alpha of the preset."""

    breaks = "R1.1"
    turns_red = frozenset({"R1.1", "R1.10", "R7.6"})

    def read_card(self, data):
        return super().read_card(data)._replace(alpha=32.0)


class FactorsOfOneModuleForAll(Fault):
    """Every module gets the widest module's factors."""

    breaks = "R1.2"
    turns_red = frozenset({"R1.2", "R20.9"})

    def read_card(self, data):
        card = super().read_card(data)
        widest = max(card.weights.values(), key=lambda pair: pair.A.shape[1], default=None)
        return with_pairs(card, lambda pair: widest._replace(scaling=pair.scaling))


class MetadataOverwriteFields(Fault):
    """The author's metadata are merged over the card's own fields."""

    breaks = "R1.3"
    turns_red = frozenset({"R1.1", "R1.3"})

    def read_card(self, data):
        card = super().read_card(data)
        over = [
            card.metadata[key]
            for key in ("targets", "target_modules", "lora.targets")
            if key in card.metadata
        ]
        return card._replace(target_modules=(ascii(over[0]),)) if over else card


class MetadataAsText(Fault):
    """Metadata values come back as strings."""

    breaks = "R1.3"
    turns_red = frozenset({"R1.1", "R1.3"})

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(metadata={key: str(value) for key, value in card.metadata.items()})


class StreamInsteadOfFile(Fault):
    """Writes the Arrow stream format."""

    breaks = "R1.4"
    turns_red = frozenset({"R1.4", "R1.8", "R1.10", "R7.6"})

    def write_card(self, card):
        return rewritten(super().write_card(card), stream=True)

    def read_card(self, data):
        batch = pa.ipc.open_stream(data).read_next_batch()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return super().read_card(sink.getvalue())


class HalfPrecisionWidened(Fault):
    """Factors of two bytes a number come back as float32: the same numbers, of another dtype."""

    breaks = "R1.7"
    turns_red = frozenset({"R1.2", "R1.7"})

    def read_card(self, data):
        def widened(pair):
            dtype = np.dtype("f4") if pair.A.dtype.itemsize == 2 else pair.A.dtype
            return PlainPair(pair.A.astype(dtype), pair.B.astype(dtype), pair.scaling)

        return with_pairs(super().read_card(data), widened)


class ZerosLoseTheirSign(Fault):
    """Factors pass through an addition: -0 becomes +0, and a signalling NaN quiet."""

    breaks = "R1.7"
    turns_red = frozenset({"R1.2", "R1.7"})

    def read_card(self, data):
        def added(pair):
            zero = np.zeros((), pair.A.dtype)
            return PlainPair(pair.A + zero, pair.B + zero, pair.scaling)

        return with_pairs(super().read_card(data), added)


class MixedDtypesPromoted(Fault):
    """Factors of several dtypes are quietly written as float64."""

    breaks = "R1.7"
    turns_red = frozenset({"R1.7"})

    def write_card(self, card):
        if len({factor.dtype for pair in card.weights.values() for factor in pair[:2]}) > 1:
            card = with_pairs(
                card, lambda pair: PlainPair(pair.A.astype("f8"), pair.B.astype("f8"), pair.scaling)
            )
        return super().write_card(card)


class ScalingAlwaysAlphaOverRank(Fault):
    """A module's own scaling is ignored."""

    breaks = "R1.8"
    turns_red = frozenset({"R1.8", "R20.9"})

    def read_card(self, data):
        card = super().read_card(data)
        return with_pairs(card, lambda pair: pair._replace(scaling=card.alpha / card.rank))


class AlphaInsteadOfAlphaOverRank(Fault):
    """Where a module has no scaling of its own, alpha is not divided by the rank."""

    breaks = "R1.8"
    turns_red = frozenset({"R1.8", "R2.2", "R9.5"})

    def write_card(self, card):
        def plain(pair):
            return pair._replace(scaling=card.alpha) if pair.scaling is None else pair

        return super().write_card(with_pairs(card, plain))


class AnyVersionIsRead(Fault):
    """The format version is ignored."""

    breaks = "R1.10"
    turns_red = frozenset({"R1.10"})

    def read_card(self, data):
        return super().read_card(rewritten(data, lambda keys: {**keys, b"lora.format": b"1.0"}))


class UnknownKeysAreDropped(Fault):
    """Schema metadata of later versions get lost."""

    breaks = "R1.10"
    turns_red = frozenset({"R1.10"})

    def read_card(self, data):
        return super().read_card(data)._replace(extra={})


class UnknownColumnsAreIgnored(Fault):
    """Columns of later versions are left unread."""

    breaks = "R1.10"
    turns_red = frozenset({"R1.10"})

    def read_card(self, data):
        return super().read_card(rewritten(data, columns=COLUMNS))


class BadFieldsAreWritten(Fault):
    """A bad rank becomes 1 and a bad alpha the rank, on writing."""

    breaks = "R7.6"
    turns_red = frozenset({"R7.6"})

    def write_card(self, card):
        rank = card.rank if isinstance(card.rank, int) and card.rank >= 1 else 1
        alpha = (
            card.alpha
            if isinstance(card.alpha, int | float) and 0 < card.alpha < math.inf
            else float(rank)
        )
        return super().write_card(card._replace(rank=rank, alpha=alpha))


class BadFieldsAreRead(Fault):
    """A bad rank or alpha is replaced on reading."""

    breaks = "R7.6"
    turns_red = frozenset({"R7.6"})

    def read_card(self, data):
        try:
            return super().read_card(data)
        except ValueError:
            shapes = (
                pa.ipc.open_file(data).get_batch(0).column("A").storage.field("shape").to_pylist()
            )
            good = {
                b"lora.rank": str(max((rank for _, rank in shapes), default=1)).encode(),
                b"lora.alpha": b"1.0",
            }
            return super().read_card(rewritten(data, lambda keys: {**keys, **good}))


CARD_FAULTS = faults_in(globals())
