"""What every store promises. A test class per store inherits it and gives the fixture `store`."""

import threading

import pytest

from trm_dist.checkpoint.store import HIDDEN, Store

BIG = bytes(range(256)) * (6 << 12) + b"end"  # more than any store sends or reads in one go


class ForbiddenError(Exception):
    """A guard's answer."""


def forbid() -> None:
    raise ForbiddenError


def content(store: Store) -> dict[str, bytes]:
    """Return everything at the top level."""
    return {entry.name: store.read(entry.name) for entry in store.entries()}


class StoreContract:
    def test_it_satisfies_the_protocol(self, store: Store) -> None:
        assert isinstance(store, Store)

    def test_it_is_empty_before_the_first_write(self, store: Store) -> None:
        assert store.entries() == []

    # -- put and read ------------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"", b"x", BIG])
    def test_put_is_read_back(self, store: Store, data: bytes) -> None:
        store.put("a.pt", [data])

        assert store.read("a.pt") == data

    def test_put_joins_the_pieces(self, store: Store) -> None:
        store.put("a.pt", [b"01", memoryview(b"_23_")[1:3], b"", memoryview(bytearray(b"4"))])

        assert store.read("a.pt") == b"01234"

    def test_put_of_no_pieces_is_an_empty_file(self, store: Store) -> None:
        store.put("a.pt", [])

        assert content(store) == {"a.pt": b""}

    @pytest.mark.parametrize("data", [b"new", b"", b"longer than the old one"])
    def test_put_replaces_the_whole_file(self, store: Store, data: bytes) -> None:
        store.put("a.pt", [b"the old one"])

        store.put("a.pt", [data])

        assert content(store) == {"a.pt": data}

    @pytest.mark.parametrize(
        ("start", "num_bytes", "expected"),
        [
            (0, None, b"0123456789"),
            (3, None, b"3456789"),
            (3, 4, b"3456"),
            (0, 0, b""),
            (8, 10, b"89"),
            (9, None, b"9"),
            (10, None, b""),
            (10, 5, b""),
            (99, 1, b""),
            (-3, None, b"789"),
            (-3, 2, b"78"),
            (-3, 99, b"789"),
            (-10, None, b"0123456789"),
            (-99, None, b"0123456789"),
            (-99, 2, b"01"),
        ],
    )
    def test_read_returns_a_range(
        self, store: Store, start: int, num_bytes: int | None, expected: bytes
    ) -> None:
        store.put("a.pt", [b"0123456789"])

        assert store.read("a.pt", start, num_bytes) == expected

    @pytest.mark.parametrize(
        ("start", "num_bytes"),
        [
            (0, None),
            (1, None),
            (2 << 20, None),
            (7, 3 << 20),
            (-3 << 20, None),
            (-4 << 20, 2 << 20),
        ],
    )
    def test_read_returns_a_big_range(
        self, store: Store, start: int, num_bytes: int | None
    ) -> None:
        store.put("a.pt", [BIG])

        expected = BIG[start:] if num_bytes is None else BIG[start:][:num_bytes]
        assert store.read("a.pt", start, num_bytes) == expected

    @pytest.mark.parametrize(("start", "num_bytes"), [(0, None), (0, 5), (5, None), (-5, None)])
    def test_read_of_an_empty_file_is_empty(
        self, store: Store, start: int, num_bytes: int | None
    ) -> None:
        store.put("a.pt", [b""])

        assert store.read("a.pt", start, num_bytes) == b""

    @pytest.mark.parametrize(("start", "num_bytes"), [(0, None), (0, 0), (5, None), (-5, 2)])
    @pytest.mark.parametrize("has_files", [False, True])
    def test_read_of_a_missing_file_raises(
        self, store: Store, has_files: bool, start: int, num_bytes: int | None
    ) -> None:
        if has_files:
            store.put("a.pt", [b"123"])

        with pytest.raises(FileNotFoundError):
            store.read("b.pt", start, num_bytes)

    # -- view --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"x", BIG])
    def test_view_is_the_whole_file_and_may_be_written_to(self, store: Store, data: bytes) -> None:
        store.put("a.pt", [data])

        view = store.view("a.pt")

        assert view == data
        view[0] ^= 1
        assert store.read("a.pt") == data

    def test_view_of_an_empty_file_is_empty(self, store: Store) -> None:
        store.put("a.pt", [])

        assert len(store.view("a.pt")) == 0

    def test_view_stays_when_the_file_is_replaced_and_deleted(self, store: Store) -> None:
        store.put("a.pt", [b"the old one"])
        view = store.view("a.pt")

        store.put("a.pt", [b"new"])
        store.delete("a.pt")

        assert bytes(view) == b"the old one"

    def test_view_of_a_missing_file_raises(self, store: Store) -> None:
        with pytest.raises(FileNotFoundError):
            store.view("b.pt")

    # -- entries -----------------------------------------------------------------------------------

    def test_entries_give_names_and_sizes(self, store: Store) -> None:
        store.put("a.pt", [b"123"])
        store.put("b.pt", [b""])

        assert {entry.name: entry.size_bytes for entry in store.entries()} == {"a.pt": 3, "b.pt": 0}

    def test_entries_leave_out_what_is_hidden(self, store: Store) -> None:
        store.put("a.pt", [b"123"])
        store.put(f"{HIDDEN}/run.json", [b"{}"])

        assert [entry.name for entry in store.entries()] == ["a.pt"]

    def test_entries_of_a_folder_are_named_within_it(self, store: Store) -> None:
        store.put("a.pt", [b"123"])
        store.put(f"{HIDDEN}/run.json", [b"{}"])

        assert {each.name: each.size_bytes for each in store.entries(HIDDEN)}["run.json"] == 2
        assert "a.pt" not in {each.name for each in store.entries(HIDDEN)}

    def test_folder_that_does_not_exist_is_empty(self, store: Store) -> None:
        assert store.entries(HIDDEN) == []

    def test_hidden_file_is_read_back_by_its_path(self, store: Store) -> None:
        store.put(f"{HIDDEN}/run.json", [b"{}"])

        assert store.read(f"{HIDDEN}/run.json") == b"{}"

    # -- copy and delete ---------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"", b"123", BIG])
    def test_copy_gives_the_content_to_another_name(self, store: Store, data: bytes) -> None:
        store.put("a.pt", [data])

        store.copy("a.pt", "b.pt")

        assert content(store) == {"a.pt": data, "b.pt": data}

    def test_copy_replaces_an_older_file(self, store: Store) -> None:
        store.put("a.pt", [b"new"])
        store.put("b.pt", [b"older"])

        store.copy("a.pt", "b.pt")

        assert store.read("b.pt") == b"new"

    def test_copy_stays_when_its_source_is_replaced(self, store: Store) -> None:
        store.put("a.pt", [b"one"])
        store.copy("a.pt", "b.pt")

        store.put("a.pt", [b"two"])

        assert content(store) == {"a.pt": b"two", "b.pt": b"one"}

    def test_copy_stays_when_its_source_is_deleted(self, store: Store) -> None:
        store.put("a.pt", [b"one"])
        store.copy("a.pt", "b.pt")

        store.delete("a.pt")

        assert content(store) == {"b.pt": b"one"}

    def test_copy_may_be_repeated(self, store: Store) -> None:
        store.put("a.pt", [b"one"])

        store.copy("a.pt", "b.pt")
        store.copy("a.pt", "b.pt")

        assert store.read("b.pt") == b"one"

    def test_copy_of_a_missing_file_raises(self, store: Store) -> None:
        store.put("b.pt", [b"stays"])

        with pytest.raises(FileNotFoundError):
            store.copy("a.pt", "b.pt")

        assert content(store) == {"b.pt": b"stays"}

    @pytest.mark.parametrize("name", ["a.pt", "missing.pt"])
    def test_delete_leaves_no_file_of_the_name(self, store: Store, name: str) -> None:
        store.put("a.pt", [b"one"])

        store.delete(name)

        assert name not in content(store)

    # -- guards ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("old", [{}, {"b.pt": b"old"}])
    @pytest.mark.parametrize("data", [b"new", BIG])
    def test_guard_that_raises_keeps_put_from_being_seen(
        self, store: Store, data: bytes, old: dict[str, bytes]
    ) -> None:
        for name, old_data in old.items():
            store.put(name, [old_data])

        with pytest.raises(ForbiddenError):
            store.put("b.pt", [data], forbid)

        assert content(store) == old

    @pytest.mark.parametrize("old", [{}, {"b.pt": b"old"}])
    def test_guard_that_raises_keeps_copy_from_being_seen(
        self, store: Store, old: dict[str, bytes]
    ) -> None:
        old = {"a.pt": b"new", **old}
        for name, old_data in old.items():
            store.put(name, [old_data])

        with pytest.raises(ForbiddenError):
            store.copy("a.pt", "b.pt", forbid)

        assert content(store) == old

    @pytest.mark.parametrize("error", [OSError(5, "guard"), FileNotFoundError(2, "guard")])
    def test_what_a_guard_raises_comes_out_unchanged(self, store: Store, error: OSError) -> None:
        def fail() -> None:
            raise error

        store.put("a.pt", [b"old"])

        for write in (
            lambda: store.put("a.pt", [b"new"], fail),
            lambda: store.put("a.pt", [BIG], fail),
            lambda: store.copy("a.pt", "b.pt", fail),
        ):
            with pytest.raises(OSError, match="guard") as caught:
                write()
            assert caught.value is error

    @pytest.mark.parametrize("data", [b"new", BIG])
    def test_guard_is_asked_once_before_anything_is_seen(self, store: Store, data: bytes) -> None:
        seen: list[object] = []
        store.put("a.pt", [b"old"])

        store.put("a.pt", [data], lambda: seen.append(store.read("a.pt")))
        store.copy("a.pt", "b.pt", lambda: seen.append([each.name for each in store.entries()]))

        assert seen == [b"old", ["a.pt"]]

    def test_guard_is_asked_in_the_callers_thread(self, store: Store) -> None:
        seen: list[threading.Thread] = []

        def note() -> None:
            seen.append(threading.current_thread())

        store.put("a.pt", [b"small"], note)
        store.put("b.pt", [BIG], note)
        store.copy("a.pt", "c.pt", note)

        assert seen == [threading.current_thread()] * 3

    # -- put_if ------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("current", "expected", "is_written"),
        [
            (None, None, True),
            (None, b"old", False),
            (b"old", None, False),
            (b"old", b"old", True),
            (b"old", b"older", False),
            (b"", None, False),
            (b"", b"", True),
            (None, b"", False),
        ],
    )
    def test_put_if_writes_only_over_what_was_expected(
        self, store: Store, current: bytes | None, expected: bytes | None, is_written: bool
    ) -> None:
        if current is not None:
            store.put("run.json", [current])

        assert store.put_if("run.json", b"new", expected) is is_written

        assert content(store).get("run.json") == (b"new" if is_written else current)

    def test_put_if_may_follow_itself(self, store: Store) -> None:
        assert store.put_if("run.json", b"1", None)
        assert store.put_if("run.json", b"2", b"1")
        assert not store.put_if("run.json", b"3", b"1")

        assert content(store) == {"run.json": b"2"}

    # -- the rest ----------------------------------------------------------------------------------

    def test_check_writable_leaves_nothing_behind(self, store: Store) -> None:
        store.check_writable()

        assert store.entries() == []

    def test_what_is_finished_is_no_leftover(self, store: Store) -> None:
        store.put("a.pt", [BIG])
        store.put(f"{HIDDEN}/run.json", [b"{}"])

        assert store.leftovers() == []
        store.remove_leftovers()

        assert content(store) == {"a.pt": BIG}
        assert store.read(f"{HIDDEN}/run.json") == b"{}"

    def test_store_that_does_not_exist_has_no_leftovers(self, store: Store) -> None:
        assert store.leftovers() == []
        store.remove_leftovers()

    def test_free_bytes_is_a_size_or_unknown(self, store: Store) -> None:
        free = store.free_bytes()

        assert free is None or free > 0

    def test_url_and_identity_say_where_it_is(self, store: Store) -> None:
        assert store.url
        assert not store.url.endswith("/")
        assert store.identity
