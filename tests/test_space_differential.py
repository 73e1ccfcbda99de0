"""Random programs of calls do in the model what they do in real processes: results, maps, pages, flags."""

from collections.abc import Iterator

import pytest
from spaceprograms import Comparison, DisagreementError

from quire.space import running_rules

BATCHES = 10
PROGRAMS = 112
LEAST = 10_000


@pytest.fixture(scope="module")
def tester() -> Iterator[Comparison]:
    with Comparison(running_rules()) as tester:
        yield tester


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_programs_agree(tester: Comparison, batch: int) -> None:
    before = tester.operations
    tester.run_random(batch, PROGRAMS)
    compared = tester.operations - before
    assert compared >= LEAST, f"only {compared} calls were compared"


# Programs that once found a disagreement, shrunk.
FOUND = {
    "a stack's guard gap ends the search from the top for good": (
        "391eb2dbc988d8ed3f6b2ebfbeabe2210480385c86f6a63a2670993a59b709d1"
    ),
    "guards of a file make no anon_vma and keep no VMAs apart": (
        "05a3e6e821a9511e8767e822da7f7952eb33189920266e37183a18694ba550ce05621d085a26ad7d3584647340659"
        "3c029eb46e2d5af54b5678e42226f46e65b6c4056ee59df4d897f769b3a606f7c99a68603cca9406b0f6d1f13cd35206bbe"
    ),
    "guards of shared memory reach a child": (
        "219c95ea9dcc11deaa6114dfb2335c01f26b23f62869ea32f06d7d4c1ca08505f39c970efe219541f74ef60b3ca52fb5"
    ),
    "a move that shrinks unmaps beyond the VMA": "45a00607b90c305da0480377e97e8dee",
    "MREMAP_DONTUNMAP of a part keeps the charge of the whole": "090b6fed69529006890f328cf68f28d7",
    "a move with MREMAP_DONTUNMAP moves each part once": "0abe332ccbdcadd3890f328cf68f28d7",
    "shrinking from beyond the end of the space is refused": "0a27d6e0d21d8411a2e308f766b765dd",
    "a move that shrinks charges what it cuts off": "ec48cb7f3a023f2f9b5782f42da32ac5",
    "the sum of address and old length wraps around": "9e3729f711bf4793",
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(tester: Comparison, name: str) -> None:
    tester.run(bytes.fromhex(FOUND[name]))


def test_a_wrong_model_is_found(tester: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a rule that is off by one page."""
    from dataclasses import replace

    wrong = replace(tester.rules, mmap_base=tester.rules.mmap_base - 4096)
    monkeypatch.setattr(tester, "rules", wrong)
    with pytest.raises(DisagreementError, match="the kernel returned"):
        # mmap of private anonymous memory anywhere
        tester.run(bytes([1, 0, 0, 0, 0, 0, 3, 0x40]))
