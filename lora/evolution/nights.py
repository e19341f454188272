"""Nightly times by the calendar: whether a night is due, and when the next one is. No clock is read
here.

A night is a calendar date; it begins at the given time on the local wall clock, and is run once. So
a summer-time change neither leaves out a night, where that time does not exist, nor runs one twice,
where it comes twice.

Requirements: R19.
"""

from datetime import date, datetime, time, timedelta

from lora.errors import ArgumentError, shown

DAY = timedelta(days=1)


def parse_at(text: str) -> time:
    """A time of day, ``hh:mm``.

    Raises:
        ArgumentError: If it is none.

    Examples:
        >>> parse_at("02:00")
        datetime.time(2, 0)
    """
    try:
        return datetime.strptime(text, "%H:%M").time()  # noqa: DTZ007 - a wall clock has no zone
    except (TypeError, ValueError) as error:
        raise ArgumentError("at", "a time of day such as 02:00", shown(text)) from error


def night_of(at: time, now: datetime) -> date:
    """The night that began last.

    Args:
        at: When nights begin.
        now: On the local wall clock, without a zone.

    Examples:
        >>> night_of(parse_at("02:00"), datetime(2026, 3, 1, 1, 59)), night_of(parse_at("02:00"), datetime(2026, 3, 1, 2))
        (datetime.date(2026, 2, 28), datetime.date(2026, 3, 1))
    """
    return now.date() if now.time() >= at else now.date() - DAY


def due(at: time, last: date, now: datetime) -> date | None:
    """The night to run now, if there is one: the latest that began and was not run.

    Of several that were missed only the latest is run. A clock that was set back by less than a day
    runs no night twice; one that was set back by more was wrong when it said `last`, and is
    believed now.

    Args:
        at, now: As `night_of`'s.
        last: The last night that was run.

    Examples:
        >>> due(parse_at("02:00"), date(2026, 3, 1), datetime(2026, 3, 5, 12))
        datetime.date(2026, 3, 5)
        >>> due(parse_at("02:00"), date(2026, 3, 5), datetime(2026, 3, 5, 12))
    """
    night = night_of(at, now)
    return night if night > last or last - night > DAY else None


def next_night(at: time, last: date | None, now: datetime) -> datetime:
    """When the next night is due on the wall clock; not later than now if one is due already.

    Args:
        at, last, now: As `due`'s; without a last night, none was missed.

    Examples:
        >>> next_night(parse_at("02:00"), date(2026, 3, 5), datetime(2026, 3, 5, 12))
        datetime.datetime(2026, 3, 6, 2, 0)
    """
    night = night_of(at, now)
    if last is not None and due(at, last, now):
        return datetime.combine(night, at)
    return datetime.combine(max(last or night, night) + DAY, at)
