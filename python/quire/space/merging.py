"""When two neighbours become one VMA, and what happens to their anon_vmas then.

A neighbour takes part if its flags, its file and the offset agree, and its anon_vma is compatible: the same,
or one side has none and the other was not inherited by a fork. With two neighbours that fit a new piece but
not each other, the piece joins the lower one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quire.space.constants import PAGE_SHIFT, VM_ACCESS, VM_STICKY, flag_names
from quire.space.outcome import Change
from quire.space.vma import VMA, clone_chain, prepare_new, prepare_shared, unlink_chain

if TYPE_CHECKING:
    from quire.space.state import State
    from quire.space.vma import AnonVma, File


class Piece(NamedTuple):
    """A range that looks for neighbours to merge with.

    Attributes:
        start: First address.
        end: Address after the last.
        flags: As it will have them.
        pgoff: Page offset of ``start``.
        file: What is mapped, or None.
        anon_vma: Of the pages it brings, or None.
        source: The VMA that it is a part of, or a copy of.
    """

    start: int
    end: int
    flags: int
    pgoff: int
    file: File | None
    anon_vma: AnonVma | None = None
    source: VMA | None = None


def inherited(vma: VMA | None) -> bool:
    """Whether a VMA came through a fork and may still show pages of the parent."""
    return vma is not None and vma.anon_vma is not None and len(vma.chain) > 1


def obstacle(state: State, piece: Piece, neighbour: VMA, *, above: bool) -> str | None:
    """Say what keeps a piece from merging with an adjacent VMA, or None."""
    if (neighbour.flags ^ piece.flags) & ~VM_STICKY:
        more = [f"+{name}" for name in flag_names(piece.flags & ~neighbour.flags)]
        less = [f"-{name}" for name in flag_names(neighbour.flags & ~piece.flags)]
        return f"different flags: {', '.join(more + less)}"
    if neighbour.file is not piece.file:
        return "different file"
    mine, theirs = piece.anon_vma, neighbour.anon_vma
    if mine is not theirs:
        if mine is not None and theirs is not None:
            return "different anon_vma"
        if mine is not None:
            if not state.rules.merge_into_unfaulted:
                return "pages were faulted on one side only"
            if inherited(piece.source):
                return "anon_vma inherited by fork"
        elif inherited(neighbour):
            return "anon_vma inherited by fork"
    if above:
        if neighbour.pgoff != piece.pgoff + ((piece.end - piece.start) >> PAGE_SHIFT):
            return "offset not contiguous"
    elif neighbour.pgoff + ((neighbour.end - neighbour.start) >> PAGE_SHIFT) != piece.pgoff:
        return "offset not contiguous"
    return None


def _fits(state: State, piece: Piece, neighbour: VMA, *, above: bool) -> bool:
    # The common answer first: making the sentence costs more than all the rest.
    if (neighbour.flags ^ piece.flags) & ~VM_STICKY and not state.explains:
        return False
    why = obstacle(state, piece, neighbour, above=above)
    if why is None:
        return True
    if state.explains:
        state.why_not.append(f"not merged with {neighbour.start:#x}-{neighbour.end:#x}: {why}")
    return False


def _sides(
    state: State, piece: Piece, before: VMA | None, after: VMA | None
) -> tuple[VMA | None, VMA | None]:
    """Return those of the two neighbours that the piece merges with."""
    if before is not None and (before.end != piece.start or not _fits(state, piece, before, above=False)):
        before = None
    if after is not None and (after.start != piece.end or not _fits(state, piece, after, above=True)):
        after = None
    if (
        before is not None
        and after is not None
        and before.anon_vma is not after.anon_vma
        and before.anon_vma is not None
        and after.anon_vma is not None
    ):
        if state.explains:
            state.why_not.append(
                f"not merged with {after.start:#x}-{after.end:#x}: different anon_vma than the VMA below"
            )
        after = None
    return before, after


def _adopt(target: VMA, source: VMA) -> None:
    """Let a VMA that takes over pages of another belong to that one's anon_vmas."""
    if source.anon_vma is not None and target.anon_vma is None:
        clone_chain(target, source)


def merge_new(
    state: State,
    piece: Piece,
    before: VMA | None,
    after: VMA | None,
    *,
    only_below: bool = False,
) -> VMA | None:
    """Add a range that is free by extending a neighbour, or closing the gap between two.

    Args:
        state: The space.
        piece: What is added.
        before: The VMA below it, adjacent or not.
        after: The VMA above it, adjacent or not.
        only_below: Whether the VMA above is left alone, as ``brk`` does.

    Returns:
        The VMA that has the range now, or None if no neighbour fits.
    """
    if only_below:
        after = None
    if (before is None or before.end != piece.start) and (after is None or after.start != piece.end):
        return None
    before, after = _sides(state, piece, before, after)
    if before is not None:
        end = piece.end
        before.flags |= piece.flags & VM_STICKY
        if after is not None:
            end = after.end
            before.flags |= after.flags & VM_STICKY
            _adopt(before, after)
            state.tree.remove(after)
            unlink_chain(after)
            state.drop_file(after)
            state.changes.append(Change("merged", before.start, end, "closed the gap between two VMAs"))
        else:
            state.changes.append(Change("extended", before.start, end, "upward"))
        if piece.source is not None:
            _adopt(before, piece.source)
        state.tree.resize(before, before.start, end)
        return before
    if after is not None:
        if piece.source is not None:
            _adopt(after, piece.source)
        state.changes.append(Change("extended", piece.start, after.end, "downward"))
        after.pgoff = piece.pgoff
        after.flags |= piece.flags & VM_STICKY
        state.tree.resize(after, piece.start, after.end)
        return after
    return None


def modify(state: State, vma: VMA, start: int, end: int, flags: int) -> VMA | None:
    """Give a part of a VMA other flags: merge it with neighbours, else split it off.

    Args:
        state: The space.
        vma: Which has the range.
        start: First address of the part.
        end: Address after the last.
        flags: What it gets.

    Returns:
        The VMA that has the part now, with its old flags unless it merged: the caller sets them; or None if a
        split would make too many VMAs. Splits made before that remain.
    """
    left, right = start == vma.start, end == vma.end
    if left or right:
        before, after = state.tree.neighbours(vma.start, vma.end)
        piece = Piece(
            start, end, flags, vma.pgoff + ((start - vma.start) >> PAGE_SHIFT), vma.file, vma.anon_vma, vma
        )
        before, after = _sides(state, piece, before if left else None, after if right else None)
        if before is not None or after is not None:
            return _merge_part(state, vma, piece, before, after)
    if start > vma.start:
        if not state.may_split():
            return None
        split(state, vma, start, keep_upper=True)
    if end < vma.end:
        if not state.may_split():
            return None
        split(state, vma, end, keep_upper=False)
    return vma


def _merge_part(state: State, vma: VMA, piece: Piece, before: VMA | None, after: VMA | None) -> VMA:
    tree = state.tree
    whole = piece.start == vma.start and piece.end == vma.end
    target = before if before is not None else after
    assert target is not None
    for other in (vma, before, after):
        if other is not None:
            target.flags |= other.flags & VM_STICKY
    if before is not None and after is not None:
        state.changes.append(Change("merged", before.start, after.end, "three VMAs into one"))
        _adopt(before, after if after.anon_vma is not None else vma)
        for gone in (vma, after):
            tree.remove(gone)
            unlink_chain(gone)
            state.drop_file(gone)
        tree.resize(before, before.start, after.end)
        return before
    _adopt(target, vma)
    if whole:
        state.changes.append(
            Change("merged", min(vma.start, target.start), max(vma.end, target.end), "two VMAs into one")
        )
        tree.remove(vma)
        unlink_chain(vma)
        state.drop_file(vma)
    elif before is not None:
        state.changes.append(Change("truncated", piece.end, vma.end, "its start went to the VMA below"))
        vma.pgoff += (piece.end - vma.start) >> PAGE_SHIFT
        tree.resize(vma, piece.end, vma.end)
    else:
        state.changes.append(Change("truncated", vma.start, piece.start, "its end went to the VMA above"))
        tree.resize(vma, vma.start, piece.start)
    if before is not None:
        tree.resize(before, before.start, piece.end)
    else:
        assert after is not None
        after.pgoff -= (after.start - piece.start) >> PAGE_SHIFT
        tree.resize(after, piece.start, after.end)
    return target


def split(state: State, vma: VMA, address: int, *, keep_upper: bool) -> VMA:
    """Split a VMA in two at an address inside it.

    Args:
        state: The space.
        vma: Which keeps one part.
        address: First of the upper part.
        keep_upper: Whether it keeps the upper part.

    Returns:
        The new VMA, which has the other part.
    """
    state.changes.append(Change("split", vma.start, vma.end, f"at {address:#x}"))
    if keep_upper:
        new = VMA(vma.start, address, vma.flags, vma.pgoff, vma.file)
        vma.pgoff += (address - vma.start) >> PAGE_SHIFT
        state.tree.resize(vma, address, vma.end)
    else:
        new = VMA(address, vma.end, vma.flags, vma.pgoff + ((address - vma.start) >> PAGE_SHIFT), vma.file)
        state.tree.resize(vma, vma.start, address)
    if vma.file is not None:
        vma.file.mappings += 1
    if vma.chain:
        clone_chain(new, vma)
    state.tree.insert(new)
    return new


def prepare_anonymous(state: State, vma: VMA) -> None:
    """Give a VMA an anon_vma before its first anonymous page: a neighbour's, if they might become one VMA."""
    if vma.anon_vma is not None:
        return
    before, after = state.tree.neighbours(vma.start, vma.end)
    if after is not None and after.start == vma.end and _reusable(vma, after, after):
        assert after.anon_vma is not None
        prepare_shared(vma, after.anon_vma)
    elif before is not None and before.end == vma.start and _reusable(before, vma, before):
        assert before.anon_vma is not None
        prepare_shared(vma, before.anon_vma)
    else:
        prepare_new(vma)


def _reusable(below: VMA, above: VMA, owner: VMA) -> bool:
    """Whether two adjacent VMAs, which may differ in protection, can use the anon_vma of one of them."""
    return (
        owner.anon_vma is not None
        and len(owner.chain) == 1
        and below.file is above.file
        and not (below.flags ^ above.flags) & ~(VM_ACCESS | VM_STICKY)
        and above.pgoff == below.pgoff + ((above.start - below.start) >> PAGE_SHIFT)
    )
