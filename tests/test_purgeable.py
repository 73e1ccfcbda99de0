"""Purgeable memory: what the kernel took is known, what it did not take is right."""

import ctypes
import gc
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cgroups import memory_limit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support import MIB, PAGE, pattern, run_forked, run_script, status_bytes, view, vma_count

import quire

MADV_PAGEOUT = 21
LIBC = ctypes.CDLL(None, use_errno=True)


def take(address: int, length: int) -> None:
    """Have the kernel reclaim pages as it does when memory is short: released ones go, dirty ones stay."""
    if LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_PAGEOUT) != 0:
        pytest.skip(f"MADV_PAGEOUT: {os.strerror(ctypes.get_errno())}")


def take_caches() -> None:
    """The same for all anonymous memory in which a cache may have its pages."""
    with open("/proc/self/maps", encoding="ascii") as lines:
        for line in lines:
            where, access, _, _, inode, *name = line.split()
            start, stop = (int(end, 16) for end in where.split("-"))
            if access == "rw-p" and inode == "0" and not name and stop - start >= 64 * MIB:
                take(start, stop - start)


def check_truth(memory: quire.Purgeable, expected: np.ndarray) -> int:
    """Lock; every page must be right, or listed as lost and zero. The number of bytes lost."""
    survived = memory.lock()
    lost = memory.lost
    assert survived == (not lost)
    want = expected.copy()
    for start, stop in lost:
        assert want[start:stop].any()
        want[start:stop] = 0
    assert np.array_equal(view(memory), want)
    return lost.total_bytes


class TestPurgeable:
    def test_it_is_ordinary_memory_while_locked(self) -> None:
        with quire.Purgeable(3 * PAGE + 5) as memory:
            assert memory.is_locked
            assert memory.lock() is True
            assert bytes(memory) == bytes(3 * PAGE + 5)
            memory[:3] = b"abc"
            memory.array("u1")[-1] = 9
            assert memory[:3] == b"abc"
            assert memory[memory.size - 1] == 9
            assert memory.lost == []
            assert "locked" in repr(memory)
        assert memory.closed
        with pytest.raises(ValueError, match="closed"):
            memory.unlock()

    def test_what_is_not_taken_survives(self) -> None:
        data = pattern(MIB + 17, 1)
        with quire.Purgeable(len(data)) as memory:
            memory[:] = data
            memory.unlock()
            memory.unlock()
            assert not memory.is_locked
            check_truth(memory, data)
            assert memory.is_locked

    def test_what_is_taken_is_named(self) -> None:
        data = pattern(40 * PAGE, 1)
        data[3 * PAGE : 5 * PAGE] = 0
        with quire.Purgeable(len(data)) as memory:
            memory[:] = data
            memory.unlock()
            take(memory.address + 2 * PAGE, 10 * PAGE)
            check_truth(memory, data)
            # The kernel may not have taken all that it was asked to; zero pages cannot be lost.
            assert set(memory.lost) <= {(2 * PAGE, 3 * PAGE), (5 * PAGE, 12 * PAGE)}
            assert memory.lost
            with memory.locked() as survived:
                assert survived
            assert memory.is_locked

    def test_what_is_locked_is_not_taken(self) -> None:
        data = pattern(MIB, 2)
        with quire.Purgeable(MIB) as memory:
            memory[:] = data
            memory.unlock()
            lost = check_truth(memory, data)
            for start, stop in memory.lost:
                memory[start:stop] = data[start:stop]
            take(memory.address, MIB)
            assert np.array_equal(view(memory), data), lost

    def test_words_anywhere_in_a_page_prove_it(self) -> None:
        with quire.Purgeable(512 * PAGE) as memory:
            pages = memory.array("u8", (512, 512))
            pages[np.arange(512), np.arange(512)] = 1 << 63
            data = view(memory).copy()
            del pages
            memory.unlock()
            take(memory.address, memory.size)
            assert check_truth(memory, data) > 0

    def test_lost_memory_costs_nothing_until_it_is_written(self) -> None:
        with quire.Purgeable(64 * MIB) as memory:
            memory.array("u1")[:] = 1
            memory.unlock()
            take(memory.address, memory.size)
            before = status_bytes("RssAnon")
            memory.lock()
            kept = memory.size - memory.lost.total_bytes
            assert status_bytes("RssAnon") <= before + kept + MIB

    def test_views_keep_it_locked(self) -> None:
        with quire.Purgeable(PAGE) as memory:
            array = memory.array("u1")
            with pytest.raises(BufferError, match="1 exported view"):
                memory.unlock()
            with pytest.raises(BufferError):
                memory.close()
            assert memory.is_locked
            array[0] = 1
            del array
            memory.unlock()
            for attempt in (lambda: memoryview(memory), lambda: memory[0], lambda: memory.array("u1")):
                with pytest.raises(BufferError, match="lock"):
                    attempt()
            memory.lock()
            assert memory[0] in (0, 1)

    def test_the_context_manager_restores_the_state(self) -> None:
        with quire.Purgeable(PAGE) as memory:
            memory.unlock()
            with memory.locked() as survived:
                assert survived
                memory[0] = 1
            assert not memory.is_locked
            with pytest.raises(BufferError), memory.locked():
                array = memory.array("u1")
            assert memory.is_locked
            del array
            memory.unlock()

            def fail_with_a_view_out() -> None:
                with memory.locked():
                    kept.append(memory.array("u1"))
                    raise KeyError

            kept: list[np.ndarray] = []
            with pytest.raises(KeyError) as caught:
                fail_with_a_view_out()
            assert "stayed locked" in caught.value.__notes__[0]
            kept.clear()

    def test_bad_sizes(self) -> None:
        for size in (0, -1, 1 << 63):
            with pytest.raises(ValueError, match="size"):
                quire.Purgeable(size)
        with pytest.raises(TypeError):
            pickle.dumps(quire.Purgeable(1))

    def test_a_child_has_its_own(self) -> None:
        data = pattern(MIB, 3)
        with quire.Purgeable(MIB) as memory:
            memory[:] = data

            def unlocked_in_child() -> None:
                memory.unlock()
                take(memory.address, MIB)
                check_truth(memory, data)

            run_forked(unlocked_in_child)
            assert np.array_equal(view(memory), data)
            memory.unlock()

            def locked_in_child() -> None:
                check_truth(memory, data)
                run_forked(memory.unlock)
                memory[:] = bytes(MIB)

            run_forked(locked_in_child)
            take(memory.address, MIB)
            check_truth(memory, data)

    def test_threads_and_forks(self) -> None:
        """A call in another thread is over before a fork, so that the child finds no lock taken."""
        data = pattern(4 * MIB, 4)
        with quire.Purgeable(4 * MIB) as memory:
            memory[:] = data
            stop = threading.Event()

            def toggle() -> None:
                while not stop.is_set():
                    memory.unlock()
                    memory.lock()

            threads = [threading.Thread(target=toggle) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                for _ in range(10):
                    run_forked(lambda: check_truth(memory, data))
            finally:
                stop.set()
                for thread in threads:
                    thread.join()

    def test_memory_that_mlockall_holds_is_refused(self) -> None:
        printed = run_script("""
import ctypes, quire
with quire.Purgeable(1 << 20) as memory:
    memory[:5] = b"12345"
    if ctypes.CDLL(None).mlockall(3):
        print("skipped")
    else:
        for attempt in (memory.unlock, lambda: quire.PurgeableCache().__setitem__(1, bytes(1 << 20))):
            try:
                attempt()
            except OSError as error:
                assert "mlockall" in str(error), error
            else:
                raise AssertionError("not refused")
        assert memory.is_locked and memory[:5] == b"12345"
""")
        if printed:
            pytest.skip("mlockall is refused to this user")


JOIN = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
import mmap
import numpy as np
sys.path.insert(0, os.getcwd())
import quire
MIB = 1 << 20
def hog(mib):
    memory = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, mib * MIB, 4096):
        memory[at] = 1
    return memory
"""


class TestPressure:
    """In a cgroup whose limit is far below what is stored: the kernel takes pages, and ends nobody."""

    def test_purgeables_go_and_locked_ones_stay(self) -> None:
        script = """
from test_purgeable import check_truth
from support import pattern
data = pattern(40 * MIB, 1)
with quire.Purgeable(40 * MIB) as unlocked, quire.Purgeable(16 * MIB) as locked:
    locked[:] = data[:16 * MIB]
    unlocked[:] = data
    unlocked.unlock()
    big = hog(110)
    big.close()
    print(check_truth(unlocked, data))
    assert np.array_equal(np.frombuffer(locked, "u1"), data[:16 * MIB])
"""
        with memory_limit(220 * MIB) as group:
            lost = int(run_script(JOIN + script, group))
        assert lost > 0

    def test_parent_and_child_both_tell_the_truth(self) -> None:
        script = """
from test_purgeable import check_truth
from support import pattern, fork, wait
data = pattern(40 * MIB, 1)
with quire.Purgeable(40 * MIB) as memory:
    memory[:] = data
    memory.unlock()
    def child():
        big = hog(110)
        big.close()
        print(check_truth(memory, data), flush=True)
    assert wait(fork(child)) == 0
    print(check_truth(memory, data))
"""
        with memory_limit(220 * MIB) as group:
            printed = run_script(JOIN + script, group)
        assert any(int(lost) > 0 for lost in printed.split())

    @pytest.mark.parametrize("length", [1000, 20_000, 200_000, 5_000_000])
    def test_a_cache_far_above_the_limit(self, length: int) -> None:
        script = """
length = int(sys.argv[2])
def value(number):
    return number.to_bytes(8, "little") * (length // 8)
with quire.PurgeableCache() as cache:
    count = 300 * MIB // length
    for number in range(count):
        cache[number] = value(number)
    for number in range(count):
        found = cache.get(number)
        assert found is None or found == value(number), number
    stats = cache.stats
    cache._store.check_invariants()
    assert stats.hits + stats.purged + stats.misses >= count
    print(stats.hits, stats.purged)
"""
        with memory_limit(160 * MIB) as group:
            hits, purged = map(int, run_script(JOIN + script, group, str(length)).split())
        assert hits > 0
        assert purged > 0

    def test_the_index_of_tiny_values_does_not_fill_memory(self) -> None:
        script = """
with quire.PurgeableCache() as cache:
    for number in range(700_000):
        cache[number] = b"tiny"
        if number % 1000 == 0:
            assert cache.get(number, b"tiny") == b"tiny"
    print(len(cache), cache.stats.evicted)
"""
        with memory_limit(80 * MIB) as group:
            entries, evicted = map(int, run_script(JOIN + script, group).split())
        assert entries + evicted >= 600_000
        assert evicted > 0

    def test_a_cache_gives_way_to_other_memory(self) -> None:
        script = """
with quire.PurgeableCache() as cache:
    for number in range(100):
        cache[number] = bytes([number]) * MIB
    big = hog(100)
    for number in range(100):
        assert cache.get(number) in (None, bytes([number]) * MIB)
    print(cache.stats.purged)
"""
        with memory_limit(160 * MIB) as group:
            assert int(run_script(JOIN + script, group)) > 0


@pytest.fixture
def cache():
    with quire.PurgeableCache() as made:
        yield made
        if not made.closed:
            made._store.check_invariants()


class TestCache:
    def test_it_is_a_mapping(self, cache: quire.PurgeableCache) -> None:
        cache["a"] = b"first"
        cache[2] = bytearray(b"second")
        cache[()] = np.arange(3, dtype="u2")
        cache["none"] = b""
        assert cache["a"] == b"first"
        assert cache[2] == b"second"
        assert cache[()] == np.arange(3, dtype="u2").tobytes()
        assert cache["none"] == b""
        assert list(cache) == ["a", 2, (), "none"]
        assert dict(cache.items())["a"] == b"first"
        assert b"second" in cache.values()
        cache["a"] = b"other"
        assert cache.pop("a") == b"other"
        assert cache.pop("a", None) is None
        assert "a" not in cache
        assert cache.popitem() == (2, b"second"), "the least recently used"
        del cache[()]
        for absent in (cache.__getitem__, cache.__delitem__, cache.pop):
            with pytest.raises(KeyError):
                absent("absent")
        cache.clear()
        assert len(cache) == 0
        with pytest.raises(KeyError):
            cache.popitem()
        assert cache.stats.bytes_held == 0
        assert "PurgeableCache" in repr(cache)

    def test_misuse(self, cache: quire.PurgeableCache) -> None:
        with pytest.raises(TypeError):
            cache["key"] = "text"
        with pytest.raises(TypeError):
            cache[[]] = b""
        with pytest.raises(ValueError, match="contiguous"):
            cache["key"] = np.zeros((4, 4))[:, 1]
        with pytest.raises(TypeError):
            pickle.dumps(cache)
        with pytest.raises(ValueError, match="max_bytes"):
            quire.PurgeableCache(PAGE - 1)
        assert len(cache) == 0
        cache.close()
        cache.close()
        for use in (
            lambda: cache["a"],
            lambda: cache.__setitem__("a", b""),
            cache.clear,
            lambda: "a" in cache,
        ):
            with pytest.raises(ValueError, match="closed"):
                use()

    def test_what_is_taken_goes_missing_and_is_counted(self, cache: quire.PurgeableCache) -> None:
        values = {number: pattern(1 + number * 97, number).tobytes() for number in range(1000)}
        for number, value in values.items():
            cache[number] = value
        take_caches()
        assert all(value == values[number] for number, value in cache.items())
        stats = cache.stats
        assert stats.purged > 0
        assert stats.hits + stats.purged == 1000
        assert len(cache) == stats.hits

    def test_the_index_is_swept(self, cache: quire.PurgeableCache) -> None:
        for number in range(20_000):
            cache[number] = bytes([number % 255 + 1]) * 5000
            if number % 1000 == 0:
                take_caches()
        assert len(cache) < 5000
        assert cache.stats.purged > 15_000
        assert cache.resident_bytes < 30 * MIB

    def test_the_least_recently_used_go_first(self) -> None:
        with quire.PurgeableCache(MIB) as cache:
            for number in range(100):
                cache[number] = bytes(50_000)
                assert cache[0] == bytes(50_000)
            assert cache.stats.page_bytes <= MIB
            assert 99 in cache
            assert 98 in cache
            assert 1 not in cache
            cache[0] = bytes(2 * MIB)
            assert 0 not in cache
            assert 99 in cache
            assert cache.stats.evicted >= 80
            cache[1] = bytes(MIB)
            assert cache.stats.page_bytes <= MIB

    def test_memory_comes_back(self) -> None:
        gc.collect()
        before, vmas = status_bytes("RssAnon"), vma_count()
        for _ in range(3):
            with quire.PurgeableCache() as cache:
                for number in range(300):
                    cache[number] = bytes([1]) * 100_000
                for number in range(300):
                    cache[number] = bytes([2]) * 100_000
        assert status_bytes("RssAnon") < before + 4 * MIB
        assert vma_count() <= vmas + 4

    def test_threads_never_see_a_wrong_value(self, cache: quire.PurgeableCache) -> None:
        def work(seed: int) -> int:
            generator = np.random.default_rng(seed)
            found = 0
            for key, length in zip(
                generator.integers(0, 50, 3000).tolist(),
                generator.integers(1, 30_000, 3000).tolist(),
                strict=True,
            ):
                value = cache.get(key)
                if value is not None:
                    assert value == bytes([key]) * len(value)
                    found += 1
                if length % 3:
                    cache[key] = bytes([key]) * length
                elif length % 2:
                    cache.pop(key, None)
                if length % 500 == 0:
                    take_caches()
            return found

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) > 0

    def test_a_child_has_the_values_and_goes_its_own_way(self, cache: quire.PurgeableCache) -> None:
        values = {number: pattern(3000 * (number + 1), number).tobytes() for number in range(50)}
        cache.update(values)

        def child() -> None:
            for number, value in values.items():
                assert cache.get(number) in (None, value)
            cache[3] = b"changed"
            take_caches()
            cache.update(dict.fromkeys(range(100, 200), b"new"))
            assert cache.get(7) in (None, values[7])
            cache._store.check_invariants()
            run_forked(cache.clear)

        run_forked(child)
        assert cache.get(3) in (None, values[3])
        take_caches()
        assert all(value == values[number] for number, value in cache.items())

    def test_forks_while_threads_use_it(self, cache: quire.PurgeableCache) -> None:
        stop = threading.Event()

        def use() -> None:
            while not stop.is_set():
                cache["long"] = bytes(3 * MIB)
                cache.get("long")

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()

        def child() -> None:
            cache["short"] = b"1"
            assert cache.get("short") in (None, b"1")

        try:
            for _ in range(10):
                run_forked(child)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


class TestMemoize:
    def test_results_are_made_once(self, cache: quire.PurgeableCache) -> None:
        calls = []

        @cache.memoize
        def spell(number: int, *, upper: bool = False) -> bytes:
            """Spell."""
            calls.append((number, upper))
            return str(number).encode()

        assert [spell(1), spell(1), spell(1.0), spell(True), spell(1, upper=True)] == [
            b"1",
            b"1",
            b"1.0",
            b"True",
            b"1",
        ]
        assert len(calls) == 4
        assert spell.__doc__ == "Spell."
        assert spell.__wrapped__(5) == b"5"

    def test_functions_do_not_meet(self, cache: quire.PurgeableCache) -> None:
        def make(result: bytes):
            @cache.memoize()
            def function() -> bytes:
                return result

            return function

        assert [make(b"1")(), make(b"2")()] == [b"1", b"2"]

    def test_keys_and_codecs(self, cache: quire.PurgeableCache) -> None:
        calls = []

        @cache.memoize(key=tuple, encode=lambda array: array, decode=np.frombuffer)
        def doubled(items: list[float]) -> np.ndarray:
            calls.append(items)
            return np.array(items) * 2

        assert doubled([1.0, 2.0]).tolist() == doubled([1.0, 2.0]).tolist() == [2.0, 4.0]
        assert len(calls) == 1
        with pytest.raises(TypeError, match="together"):
            cache.memoize(encode=bytes)

    def test_refusals(self, cache: quire.PurgeableCache) -> None:
        @cache.memoize
        def text() -> str:
            return "text"

        with pytest.raises(TypeError, match="returned str"):
            text()

        @cache.memoize
        def failing(error: type[Exception]) -> bytes:
            raise error

        for _ in range(2):
            with pytest.raises(KeyError):
                failing(KeyError)
        with pytest.raises(TypeError, match="unhashable"):
            failing([])


LENGTHS = st.one_of(
    st.integers(0, 300), st.integers(4000, 4200), st.integers(32_600, 32_800), st.integers(250_000, 300_000)
)


class CacheMachine(RuleBasedStateMachine):
    """Against a dict: an entry may be missing, never wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = quire.PurgeableCache(2 * MIB)
        self.model: dict[int, bytes] = {}

    @rule(key=st.integers(0, 20), length=LENGTHS, seed=st.integers(0, 255))
    def put(self, key: int, length: int, seed: int) -> None:
        value = bytes([seed, key]) * (length // 2)
        self.cache[key] = value
        self.model[key] = value

    @rule(key=st.integers(0, 20))
    def get(self, key: int) -> None:
        value = self.cache.get(key)
        assert value is None or value == self.model[key]

    @rule(key=st.integers(0, 20))
    def pop(self, key: int) -> None:
        value = self.cache.pop(key, None)
        assert value is None or value == self.model[key]
        self.model.pop(key, None)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()

    @rule()
    def take(self) -> None:
        take_caches()

    @invariant()
    def holds(self) -> None:
        self.cache._store.check_invariants()
        assert set(self.cache) <= set(self.model)
        assert self.cache.stats.page_bytes <= 2 * MIB

    def teardown(self) -> None:
        assert all(value == self.model[key] for key, value in self.cache.items())
        self.cache.close()


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestCacheAgainstADict = CacheMachine.TestCase


@settings(max_examples=40, deadline=None)
@given(
    spots=st.lists(st.tuples(st.integers(0, 30 * PAGE - 1), st.integers(0, 255)), max_size=60),
    gone=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 10)), max_size=4),
)
def test_any_content_and_any_loss(spots: list[tuple[int, int]], gone: list[tuple[int, int]]) -> None:
    data = np.zeros(30 * PAGE, np.uint8)
    for at, byte in spots:
        data[at] = byte
    with quire.Purgeable(len(data)) as memory:
        for at, byte in spots:
            memory[at] = byte
        memory.unlock()
        for page, count in gone:
            take(memory.address + page * PAGE, min(count, 30 - page) * PAGE)
        check_truth(memory, data)
