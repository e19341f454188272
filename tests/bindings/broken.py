"""Bindings that do not answer as they should: they raise, hang, or answer with nothing."""

import time

from lora.testing.reference import Reference


class _Routers(Reference):
    """The reference, but for what its routers do with many queries."""

    def make_router(self, embed):
        router = super().make_router(embed)
        router.select_many = self.select_many
        return router


class Raising(_Routers):
    """Its routers raise."""

    name = "raising"

    def select_many(self, *_):
        raise RuntimeError("out of order")


class Hanging(_Routers):
    """Its routers never answer."""

    name = "hanging"

    def select_many(self, *_):
        time.sleep(3600)


class Mute(_Routers):
    """Its routers answer with something else."""

    name = "mute"

    def select_many(self, *_):
        return None
