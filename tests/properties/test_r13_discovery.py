"""R13: the table of peers, whatever is announced, denied, answered or not, in any order."""

from hypothesis import given
from hypothesis import strategies as st

from lora.federation.peer_table import MISSES, Peer, PeerBook
from lora.testing.plugin import requirement

KEYS = st.sampled_from([*"abcdefgh", "me", "grpc://static:1"])
STATIC = {"grpc://static:1": Peer("grpc://static:1", static=True)}
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["announced", "goodbye", "answered", "missed"]),
        KEYS,
        st.sampled_from(["grpc://x:1", "grpc://y:2"]),
        st.sampled_from(["me", "", "n1", "n2", "n3"]),
        st.floats(0, 5),
    ),
    max_size=60,
)


def after(book, events):
    """The book before the events, and after each of them."""
    now, states = 0.0, [book]
    for event, key, uri, node_id, pause in events:
        now += pause
        if event == "answered":
            book = book.asked(key, uri, node_id, now=now)
        elif event == "missed":
            book = book.asked(key, now=now)
        else:
            known, goodbye = set(book.peers), event == "goodbye"
            book = book.announced(key, goodbye=goodbye, now=now)
            assert not goodbye or set(book.peers) == known
        states.append(book)
    return states


@requirement("R13.3", "R13.4", "R13.5")
@given(EVENTS, st.integers(1, 4))
def test_no_events_grow_the_book_past_its_cap_or_list_this_node(events, cap):
    for book in after(PeerBook("me", cap, peers=STATIC), events):
        assert sum(not peer.static for peer in book.peers.values()) <= cap
        assert "me" not in book.peers
        assert all(peer.node_id != "me" for peer in book.live())
        uris = [peer.uri for peer in book.live()]
        assert len(set(uris)) == len(uris)
        assert "grpc://static:1" in book.peers


@requirement("R13.4")
@given(EVENTS, KEYS.filter(lambda key: key != "me"))
def test_only_silence_removes_who_has_answered(events, key):
    """Whatever is announced or denied, a peer that answers stays where it answered."""
    book = PeerBook("me", cap=3).announced(key, now=0).asked(key, "grpc://true:1", "true", now=0)
    hints = [event for event in events if event[0] in ("announced", "goodbye")]
    for state in after(book, hints):
        assert [peer.uri for peer in state.live() if peer.node_id == "true"] == ["grpc://true:1"]


@requirement("R13.2")
@given(EVENTS, KEYS.filter(lambda key: key != "me"))
def test_silence_removes_anyone_in_a_bounded_number_of_questions(events, key):
    book = after(PeerBook("me", peers=STATIC), events)[-1]
    for _ in range(MISSES):
        book = book.asked(key, now=1e6)
    assert key not in [peer.key for peer in book.live()]
    assert key not in book.peers or book.peers[key].static


@requirement("R13.2", "R13.4")
@given(st.integers(1, 5))
def test_peers_that_answer_now_and_then_stay_and_leave_no_room_for_others(cap):
    book = PeerBook("me", cap)
    for peer in map(str, range(cap)):
        book = book.announced(peer, now=0).asked(peer, f"grpc://{peer}:1", peer, now=0)
    for now in range(10):
        for peer in map(str, range(cap)):
            book = book.asked(peer, f"grpc://{peer}:1" if now % 2 else "", peer, now=now)
        book = book.announced("late", now=now)
        assert len(book.live()) == len(book.peers) == cap


@requirement("R13.2")
@given(EVENTS)
def test_everyone_in_the_book_is_asked_again_in_time(events):
    book = after(PeerBook("me", interval=10.0), events)[-1]
    end = sum(event[4] for event in events)
    assert set(book.due(now=end + 2.0**MISSES + 10.0)) == set(book.peers)


@requirement("R13.2", "R13.4")
@given(st.integers(0, 30), st.booleans())
def test_announcements_or_goodbyes_in_a_row_ask_once_a_second(count, goodbye):
    book = PeerBook("me").announced("a", now=0).asked("a", "grpc://x:1", "n", now=0)
    for step in range(count):
        book = book.announced("a", goodbye=goodbye, now=step / 31)
    assert book.due(now=0.99) == ()
    assert book.due(now=1.0) == (("a",) if count else ())


@requirement("R13.2")
@given(st.permutations(["a", "b", "c"]))
def test_arrivals_come_in_any_order(order):
    book = PeerBook("me")
    for key in order:
        book = book.announced(key, now=0)
    for key in reversed(order):
        book = book.asked(key, f"grpc://{key}:1", "claimed by all", now=1)
    assert {peer.key for peer in book.live()} == {"a", "b", "c"}
