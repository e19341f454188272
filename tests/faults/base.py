"""What every fault is: the reference with one mistake, and the requirement that it breaks."""

from lora.testing.reference import Reference


class Fault(Reference):
    """A wrong implementation; `breaks` is the requirement that it was made to break (others may turn red with it)."""

    breaks: str

    def __init_subclass__(cls) -> None:
        cls.name = f"faulty: {cls.__name__}"
