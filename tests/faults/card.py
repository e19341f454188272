"""Faults in writing and reading cards."""

import io
import json
import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from lora.testing.binding import PlainPair
from tests.faults.base import Fault, faults_in

COLUMNS = ["module", "scaling", "A", "B"]


def rewritten(data, metadata=dict, columns=None, stream=False):
    """The file with other schema metadata, with some of its columns, or as a stream."""
    batch = pa.ipc.open_file(data).get_batch(0)
    batch = batch.select(columns or batch.schema.names)
    batch = batch.replace_schema_metadata(metadata(batch.schema.metadata))
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def with_pairs(card, change):
    """The card with each pair changed; the arithmetic of NaN is no matter here."""
    with np.errstate(all="ignore"):
        weights = {module: change(pair) for module, pair in card.weights.items()}
        return card._replace(weights=weights)


class TargetsJoinedByCommas(Fault, breaks="R1.1", also="R1.10 R1.16 R7.6"):
    """No targets come back as one empty target, and a comma in a name splits it."""

    def read_card(self, data):
        card = super().read_card(data)
        parts = ",".join(card.target_modules).split(",")
        return card._replace(target_modules=tuple(dict.fromkeys(parts)))


class AlphaOfTheFileIgnored(Fault, breaks="R1.1", also="R1.10 R7.6"):
    """Every card comes back with the alpha of the preset."""

    def read_card(self, data):
        return super().read_card(data)._replace(alpha=32.0)


class FactorsOfOneModuleForAll(Fault, breaks="R1.2", also="R1.16"):
    """Every module gets the widest module's factors."""

    def read_card(self, data):
        card = super().read_card(data)
        widest = max(card.weights.values(), key=lambda pair: pair.A.shape[1], default=None)
        return with_pairs(card, lambda pair: widest._replace(scaling=pair.scaling))


class MetadataOverwriteFields(Fault, breaks="R1.3"):
    """The author's metadata are merged over the card's own fields."""

    def read_card(self, data):
        card = super().read_card(data)
        keys = ("targets", "target_modules", "lora.targets")
        over = [card.metadata[key] for key in keys if key in card.metadata]
        return card._replace(target_modules=(ascii(over[0]),)) if over else card


class MetadataAsText(Fault, breaks="R1.3", also="R1.16"):
    """Metadata values come back as strings."""

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(metadata={key: str(value) for key, value in card.metadata.items()})


class WhateverPythonTakesForJSON(Fault, breaks="R1.3"):
    """Metadata are what ``json.dumps`` and ``json.loads`` take: NaN, keys that are numbers, any
    depth.
    """

    def write_card(self, card):
        text = json.dumps(dict(card.metadata), ensure_ascii=False).encode()
        bare = super().write_card(card._replace(metadata={}))
        return rewritten(bare, lambda keys: {**keys, b"lora.metadata": text})

    def read_card(self, data):
        keys = pa.ipc.open_file(data).schema.metadata
        bare = rewritten(data, lambda keys: {**keys, b"lora.metadata": b"{}"})
        return super().read_card(bare)._replace(metadata=json.loads(keys[b"lora.metadata"]))


class MetadataFault(Fault):
    """Values of the metadata change on reading."""

    def read_card(self, data):
        card = super().read_card(data)
        return card._replace(metadata=self.everywhere(card.metadata))

    def everywhere(self, value):
        if isinstance(value, Mapping):
            return {key: self.everywhere(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.everywhere(inner) for inner in value]
        return self.changed(value)


class IntegersAreDoubles(MetadataFault, breaks="R1.3"):
    """Integers pass through float64, as in JavaScript, and are even beyond 2**53."""

    def changed(self, value):
        return int(float(value)) if type(value) is int and abs(value) < 2**100 else value


class IntegersOf64Bits(MetadataFault, breaks="R1.3"):
    """Integers wrap at 2**63."""

    def changed(self, value):
        return (value + 2**63) % 2**64 - 2**63 if type(value) is int else value


class TextsOf16Bits(MetadataFault, breaks="R1.3", also="R1.16"):
    """The length of a text has 16 bits, so that long ones are cut."""

    def changed(self, value):
        return value[: len(value) % 2**16] if isinstance(value, str) else value


class LinesEndAlike(MetadataFault, breaks="R1.16", also="R1.3"):
    """Texts are read in text mode: whatever ends a line becomes a line feed."""

    def changed(self, value):
        if not isinstance(value, str):
            return value
        return value.replace("\r\n", "\n").replace("\r", "\n")


class ListsAreSets(MetadataFault, breaks="R1.16", also="R1.3"):
    """What occurs twice in a list of the metadata is kept once."""

    def everywhere(self, value):
        if isinstance(value, list):
            value = [item for row, item in enumerate(value) if item not in value[:row]]
        return super().everywhere(value)

    def changed(self, value):
        return value


class FactorsInTheOrderOfMemory(Fault, breaks="R1.16", also="R1.2 R1.7"):
    """A factor is written as it lies in memory, whatever its strides say."""

    def write_card(self, card):
        def as_it_lies(array):
            return np.ravel(array, order="K").reshape(array.shape)

        return super().write_card(
            with_pairs(card, lambda pair: pair._replace(A=as_it_lies(pair.A), B=as_it_lies(pair.B)))
        )


class StreamInsteadOfFile(Fault, breaks="R1.4", also="R1.3 R1.8 R1.9 R1.10 R1.16 R7.6"):
    """Writes the Arrow stream format."""

    def write_card(self, card):
        return rewritten(super().write_card(card), stream=True)

    def read_card(self, data):
        batch = pa.ipc.open_stream(data).read_next_batch()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return super().read_card(sink.getvalue())


class HalfPrecisionWidened(Fault, breaks="R1.7", also="R1.2 R1.16"):
    """Factors of two bytes a number come back as float32: the same numbers, of another dtype."""

    def read_card(self, data):
        def widened(pair):
            dtype = np.dtype("f4") if pair.A.dtype.itemsize == 2 else pair.A.dtype
            return PlainPair(pair.A.astype(dtype), pair.B.astype(dtype), pair.scaling)

        return with_pairs(super().read_card(data), widened)


class ZerosLoseTheirSign(Fault, breaks="R1.7", also="R1.2 R1.16"):
    """Factors pass through an addition: -0 becomes +0, and a signalling NaN quiet."""

    def read_card(self, data):
        def added(pair):
            zero = np.zeros((), pair.A.dtype)
            return PlainPair(pair.A + zero, pair.B + zero, pair.scaling)

        return with_pairs(super().read_card(data), added)


class SignallingNansBecomeQuiet(Fault, breaks="R1.7"):
    """Wide factors pass through a unit of arithmetic, which changes one bit of some NaNs."""

    def read_card(self, data):
        def quiet(array):
            if array.itemsize < 4:
                return array
            quiet_bit = {4: 1 << 22, 8: 1 << 51}[array.itemsize]
            bits = np.array(array).view(f"u{array.itemsize}")
            quiet_bits = np.where(np.isnan(array), bits | quiet_bit, bits)
            return quiet_bits.astype(bits.dtype).view(array.dtype)

        return with_pairs(
            super().read_card(data), lambda pair: pair._replace(A=quiet(pair.A), B=quiet(pair.B))
        )


class MixedDtypesPromoted(Fault, breaks="R1.7"):
    """Factors of several dtypes are quietly written as float64."""

    def write_card(self, card):
        if len({factor.dtype for pair in card.weights.values() for factor in pair[:2]}) > 1:
            card = with_pairs(
                card, lambda pair: PlainPair(pair.A.astype("f8"), pair.B.astype("f8"), pair.scaling)
            )
        return super().write_card(card)


class AnyRankIsRead(Fault, breaks="R1.8"):
    """The rank that a file states is not compared with those of its modules."""

    def read_card(self, data):
        batch = pa.ipc.open_file(data).get_batch(0)
        column = getattr(batch.column("A"), "storage", batch.column("A"))
        ranks = [rank for _, rank in column.field("shape").to_pylist()]
        stated = batch.schema.metadata[b"lora.rank"]
        if not ranks or not stated.isdigit() or int(stated) < 1:
            return super().read_card(data)
        largest = str(max(ranks)).encode()
        card = super().read_card(rewritten(data, lambda keys: {**keys, b"lora.rank": largest}))
        return card._replace(rank=int(stated))


class ScalingAlwaysAlphaOverRank(Fault, breaks="R1.8"):
    """A module's own scaling is ignored."""

    def read_card(self, data):
        card = super().read_card(data)
        return with_pairs(card, lambda pair: pair._replace(scaling=card.alpha / card.rank))


class AlphaInsteadOfAlphaOverRank(Fault, breaks="R1.8"):
    """Where a module has no scaling of its own, alpha is not divided by the rank."""

    def write_card(self, card):
        def plain(pair):
            return pair._replace(scaling=card.alpha) if pair.scaling is None else pair

        return super().write_card(with_pairs(card, plain))


class AnyVersionIsRead(Fault, breaks="R1.10"):
    """The format version is ignored."""

    def read_card(self, data):
        return super().read_card(rewritten(data, lambda keys: {**keys, b"lora.format": b"1.0"}))


class UnknownKeysAreDropped(Fault, breaks="R1.10", also="R1.16"):
    """Schema metadata of later versions get lost."""

    def read_card(self, data):
        return super().read_card(data)._replace(extra={})


class UnknownColumnsAreIgnored(Fault, breaks="R1.10"):
    """Columns of later versions are left unread."""

    def read_card(self, data):
        return super().read_card(rewritten(data, columns=COLUMNS))


class BadFieldsAreWritten(Fault, breaks="R7.6"):
    """A bad rank becomes 1 and a bad alpha the rank, on writing."""

    def write_card(self, card):
        rank = card.rank if isinstance(card.rank, int) and card.rank >= 1 else 1
        alpha = (
            card.alpha
            if isinstance(card.alpha, int | float) and 0 < card.alpha < math.inf
            else float(rank)
        )
        return super().write_card(card._replace(rank=rank, alpha=alpha))


class RanksAreCutToIntegers(Fault, breaks="R7.6"):
    """A rank of 2.5 is written as 2."""

    def write_card(self, card):
        is_cut = isinstance(card.rank, float) and 1 <= card.rank < 2**31
        return super().write_card(card._replace(rank=int(card.rank)) if is_cut else card)


class BadFieldsAreRead(Fault, breaks="R7.6", also="R1.8"):
    """A bad rank or alpha is replaced on reading."""

    def read_card(self, data):
        try:
            return super().read_card(data)
        except ValueError:
            column = pa.ipc.open_file(data).get_batch(0).column("A")
            shapes = column.storage.field("shape").to_pylist()
            rank = max((rank for _, rank in shapes), default=1)
            good = {b"lora.rank": str(rank).encode(), b"lora.alpha": b"1.0"}
            return super().read_card(rewritten(data, lambda keys: {**keys, **good}))


class InfiniteAlphaIsRead(Fault, breaks="R7.6"):
    """Of a file's alpha only the sign is checked, which infinity passes."""

    def read_card(self, data):
        try:
            return super().read_card(data)
        except ValueError:
            if float(pa.ipc.open_file(data).schema.metadata[b"lora.alpha"]) != math.inf:
                raise
            one = {b"lora.alpha": b"1.0"}
            card = super().read_card(rewritten(data, lambda keys: {**keys, **one}))
            return card._replace(alpha=math.inf)


CARD_FAULTS = faults_in(globals())
