"""Everything that can be done to segments, snapshots and mappings, in any order, against a model of bytes."""

import gc
import os
import pathlib
import shutil
import socket
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import MIB, PAGE, changed_ranges, descriptor_count, pattern, run_again_with_comparison, view

import quire

SIZES = st.one_of(
    st.integers(1, 3 * PAGE),
    st.sampled_from([PAGE, 511 * PAGE, 512 * PAGE, 512 * PAGE + 1, 513 * PAGE - 1]),
    st.integers(3 * PAGE, 3 * MIB),
)
PICK = st.integers(0, 63)
PLACE = st.floats(0, 1, exclude_max=True)
SEED = st.integers(0, 1 << 20)
AT_MOST = 7
MAX_SIZE = 4 * MIB


class Machine(RuleBasedStateMachine):
    """Pairs of an object of quire and the bytes it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[tuple[quire.Segment, np.ndarray]] = []
        self.snapshots: list[tuple[quire.Snapshot, np.ndarray]] = []
        self.mappings: list[tuple[quire.Mapping, np.ndarray]] = []
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.path = self.folder / "saved"
        gc.collect()
        self.descriptors = descriptor_count()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
        self.segments.clear()
        self.mappings.clear()
        self.snapshots.clear()
        gc.collect()
        assert descriptor_count() == self.descriptors

    def keep(self, snapshot: quire.Snapshot, model: np.ndarray) -> None:
        assert snapshot.size == len(model)
        assert 1 <= snapshot.layers <= 64
        self.snapshots.append((snapshot, model.copy()))
        if len(self.snapshots) > AT_MOST:
            del self.snapshots[0]

    @initialize(size=SIZES, seed=SEED)
    def first(self, size: int, seed: int) -> None:
        model = pattern(size, seed)
        self.segments.append((quire.Segment.from_buffer(model), model))

    @precondition(lambda self: len(self.segments) < AT_MOST)
    @rule(size=SIZES)
    def make(self, size: int) -> None:
        self.segments.append((quire.Segment(size), np.zeros(size, np.uint8)))

    def store(self, target, model: np.ndarray, place: float, data: bytes) -> None:
        start = int(place * len(model))
        data = data[: len(model) - start]
        target[start : start + len(data)] = data
        model[start : start + len(data)] = np.frombuffer(data, np.uint8)

    @precondition(lambda self: self.segments)
    @rule(pick=PICK, place=PLACE, length=st.integers(1, 6 * PAGE), seed=SEED)
    def write_by_call(self, pick: int, place: float, length: int, seed: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        self.store(segment, model, place, pattern(length, seed).tobytes())

    @precondition(lambda self: self.segments)
    @rule(pick=PICK, place=PLACE, length=st.integers(1, 2 * MIB), seed=SEED)
    def write_by_view(self, pick: int, place: float, length: int, seed: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        start = int(place * len(model))
        stop = min(len(model), start + length)
        model[start:stop] = segment.array(np.uint8)[start:stop] = pattern(stop - start, seed)

    @precondition(lambda self: self.segments)
    @rule(pick=PICK, place=PLACE, length=st.integers(1, 40 * PAGE), aligned=st.booleans())
    def write_zeros(self, pick: int, place: float, length: int, aligned: bool) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        if aligned:
            place = int(place * len(model)) // PAGE * PAGE / len(model)
        self.store(segment, model, place, bytes(length))

    @precondition(lambda self: self.segments)
    @rule(pick=PICK, step=st.sampled_from([2, 3, 7, 64, 600]), seed=SEED)
    def write_scattered(self, pick: int, step: int, seed: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        at = slice(seed % PAGE, None, step * PAGE)
        model[at] = segment.array(np.uint8)[at] = seed % 256

    @precondition(lambda self: self.segments)
    @rule(pick=PICK)
    def write_the_same(self, pick: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        segment.array(np.uint8)[:] = model

    @precondition(lambda self: self.segments)
    @rule(pick=PICK)
    def snapshot(self, pick: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        self.keep(segment.snapshot(), model)

    @precondition(lambda self: self.segments)
    @rule(pick=PICK, times=st.sampled_from([3, 40, 70]), seed=SEED)
    def snapshot_often(self, pick: int, times: int, seed: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        generator = np.random.default_rng(seed)
        array = segment.array(np.uint8)
        for _ in range(times):
            at = generator.integers(0, len(model), 3)
            array[at] = model[at] = generator.integers(0, 256)
            last = segment.snapshot()
            assert last.layers <= 64
            last._core.check_invariants()
        del array
        self.keep(last, model)

    @precondition(lambda self: self.segments)
    @rule(pick=PICK)
    def sever(self, pick: int) -> None:
        segment, model = self.segments[pick % len(self.segments)]
        self.keep(segment.sever(), model)
        model[:] = 0

    @precondition(lambda self: self.segments)
    @rule(pick=PICK, more=SIZES)
    def grow(self, pick: int, more: int) -> None:
        pick %= len(self.segments)
        segment, model = self.segments[pick]
        size = min(MAX_SIZE, len(model) + more)
        segment.grow(size)
        assert segment.size == size
        self.segments[pick] = segment, np.concatenate([model, np.zeros(size - len(model), np.uint8)])

    @precondition(lambda self: self.snapshots and len(self.segments) < AT_MOST)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        snapshot, model = self.snapshots[pick % len(self.snapshots)]
        self.segments.append((snapshot.fork(), model.copy()))

    @precondition(lambda self: self.snapshots and len(self.mappings) < AT_MOST)
    @rule(pick=PICK, private=st.booleans())
    def map(self, pick: int, private: bool) -> None:
        snapshot, model = self.snapshots[pick % len(self.snapshots)]
        self.mappings.append((snapshot.map(private=private), model.copy()))

    @precondition(lambda self: any(mapping.private for mapping, _ in self.mappings))
    @rule(pick=PICK, place=PLACE, length=st.integers(1, 20 * PAGE), seed=SEED)
    def write_privately(self, pick: int, place: float, length: int, seed: int) -> None:
        private = [pair for pair in self.mappings if pair[0].private]
        mapping, model = private[pick % len(private)]
        self.store(mapping, model, place, pattern(length, seed).tobytes())

    @precondition(lambda self: self.mappings and self.snapshots)
    @rule(pick=PICK, to=PICK)
    def advance(self, pick: int, to: int) -> None:
        mapping, shown = self.mappings[pick % len(self.mappings)]
        snapshot, model = self.snapshots[to % len(self.snapshots)]
        address = mapping.address
        before = view(mapping)
        if mapping.private or len(model) != len(shown):
            with pytest.raises(ValueError, match=r"private|bytes"):
                mapping.advance(snapshot)
        else:
            mapping.advance(snapshot)
            shown[:] = model
        assert mapping.address == address
        assert np.shares_memory(before, view(mapping))

    @precondition(lambda self: len(self.snapshots) > 1)
    @rule(one=PICK, other=PICK)
    def diff(self, one: int, other: int) -> None:
        old, before = self.snapshots[one % len(self.snapshots)]
        new, after = self.snapshots[other % len(self.snapshots)]
        assert new.diff(old) == changed_ranges(before, after)
        assert old.diff(new) == changed_ranges(before, after)

    @precondition(lambda self: self.snapshots)
    @rule(pick=PICK, copy=st.booleans(), check=st.booleans())
    def save_and_load(self, pick: int, copy: bool, check: bool) -> None:
        snapshot, model = self.snapshots[pick % len(self.snapshots)]
        snapshot.save(self.path)
        assert os.path.getsize(self.path) % PAGE == 0
        loaded = quire.load(self.path, copy=copy, check=check)
        assert snapshot.diff(loaded) == []
        self.keep(loaded, model)

    @precondition(lambda self: self.snapshots)
    @rule(pick=PICK)
    def send(self, pick: int) -> None:
        snapshot, model = self.snapshots[pick % len(self.snapshots)]
        here, there = socket.socketpair()
        with here, there:
            try:
                quire.send(here, snapshot)
            except quire.NotImmutable:
                try:
                    snapshot.verify()
                except quire.NotImmutable:
                    return
                raise
            received = quire.recv(there)
        received.verify()
        assert snapshot.diff(received) == []
        self.keep(received, model)

    @rule(kind=st.sampled_from(["segments", "snapshots", "mappings"]), pick=PICK, drop=st.booleans())
    def end(self, kind: str, pick: int, drop: bool) -> None:
        objects = getattr(self, kind)
        if not objects:
            return
        ended, _ = objects.pop(pick % len(objects))
        if not drop:
            ended.close()
            assert ended.closed

    @invariant()
    def tables_are_sound(self) -> None:
        for segment, _ in self.segments:
            segment.check_invariants()
        for snapshot, _ in self.snapshots:
            snapshot._core.check_invariants()

    @invariant()
    def bytes_are_right(self) -> None:
        for segment, model in self.segments:
            assert np.array_equal(view(segment), model), f"{segment} has other bytes than were written"
        for mapping, model in self.mappings:
            assert np.array_equal(view(mapping), model), f"{mapping} changed"
        for snapshot, model in self.snapshots:
            with snapshot.map() as mapping:
                same = np.array_equal(view(mapping), model)
            assert same, f"{snapshot} changed"


Machine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


def test_the_same_with_comparison() -> None:
    run_again_with_comparison(__file__)
