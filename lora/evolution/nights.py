"""Nights by the calendar: whether one is due. No clock is read here.

A night is a calendar date. It begins at a given time on the local wall clock and is run once, so a
summer-time change neither skips a night nor runs one twice.

Requirements: R19.
"""

from datetime import date, datetime, time, timedelta

from lora.errors import ArgumentError, shown

DAY = timedelta(days=1)


def parse_at(text: str) -> time:
    """Read a time of day, `hh:mm`.

    Examples:
        >>> parse_at("02:00")
        datetime.time(2, 0)
    """
    try:
        return datetime.strptime(text, "%H:%M").time()  # noqa: DTZ007 - a wall clock has no zone
    except (TypeError, ValueError) as error:
        raise ArgumentError("at", "a time of day such as 02:00", shown(text)) from error


def night_of(at: time, now: datetime) -> date:
    """Return the night that began last; `now` is on the local wall clock, without a zone."""
    return now.date() if now.time() >= at else now.date() - DAY


def due(at: time, last: date, now: datetime) -> date | None:
    """Return the latest night if it was not run yet; `last` is the last night that was run.

    If the clock was set back by more than a day, the night is run again.

    Examples:
        >>> due(parse_at("02:00"), date(2026, 3, 1), datetime(2026, 3, 5, 12))
        datetime.date(2026, 3, 5)
    """
    night = night_of(at, now)
    return night if night > last or last - night > DAY else None
