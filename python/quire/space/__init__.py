"""A model of a process's address space with the kernel's rules.

`AddressSpace` has the calls; `Rules` what differs between kernels. See docs/space.md.
"""

from quire.space.accounting import Sizes
from quire.space.address_space import AddressSpace
from quire.space.faults import Fault, FaultKind
from quire.space.machine import Machine
from quire.space.outcome import CallError, Change, Outcome
from quire.space.probing import running_rules
from quire.space.rules import Rules
from quire.space.vma import VMA, AnonVma, File

__all__ = [
    "VMA",
    "AddressSpace",
    "AnonVma",
    "CallError",
    "Change",
    "Fault",
    "FaultKind",
    "File",
    "Machine",
    "Outcome",
    "Rules",
    "Sizes",
    "running_rules",
]
