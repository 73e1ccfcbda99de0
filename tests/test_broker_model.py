"""Random clients against a model of banks and leases: honest, hostile, slow and dying ones."""

import contextlib

import hypothesis
import pytest
from brokermodel import Machine
from hypothesis import strategies as st

import quire
from quire.broker.banks import NOTHING, UNLIMITED, Amount, Bank

# Every step looks at the maps of all processes and at every byte.
pytestmark = pytest.mark.timeout(400)

TestModel = Machine.TestCase
TestModel.settings = hypothesis.settings(
    max_examples=15,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def end_guests():
    yield
    Machine.close_guests()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_banks_against_sums(data: st.DataObject) -> None:
    """Charges, transfers and ends in any order: what a bank has used is what is charged to it and below."""
    root = Bank(1, UNLIMITED)
    banks = [root]
    charges: list[tuple[Bank, Amount]] = []
    amounts = st.builds(Amount, st.integers(0, 50), st.integers(0, 3), st.integers(0, 3))
    for number in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.integers(0, 3))
        if what == 0 and len(banks) < 12:
            with contextlib.suppress(quire.QuotaExceeded):
                banks.append(
                    Bank(
                        number,
                        Amount(data.draw(st.integers(0, 200)), 10, 10),
                        data.draw(st.sampled_from(banks)),
                    )
                )
        elif what == 1:
            bank, amount = data.draw(st.sampled_from(banks)), data.draw(amounts)
            with contextlib.suppress(quire.QuotaExceeded):
                bank.charge(amount)
                charges.append((bank, amount))
        elif what == 2 and charges:
            index = data.draw(st.integers(0, len(charges) - 1))
            bank, amount = charges[index]
            to = data.draw(st.sampled_from(banks))
            with contextlib.suppress(quire.QuotaExceeded):
                bank.transfer(amount, to)
                charges[index] = to, amount
        elif charges:
            bank, amount = charges.pop(data.draw(st.integers(0, len(charges) - 1)))
            bank.discharge(amount)
        for bank in banks:
            due = NOTHING
            for payer, amount in charges:
                if bank in payer.line():
                    due = due.plus(amount)
            assert bank.used == due
            assert all(used <= limit for used, limit in zip(bank.used, bank.limit, strict=True))
