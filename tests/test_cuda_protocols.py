"""The exchanges of csrc/cuda/cluster.cuh and grid.cuh as state machines, in every interleaving.

A state of the model is what all warps are about to do, the barriers, what lies in memory, and the
messages under way, which may arrive in any order. From the first state all that can follow are
visited; each must allow something to happen until all warps are done (no deadlock), and every read
must find what it is meant to read. What the models leave out (addresses, numbers, the memory's own
weaknesses) the simulator and a GPU have to show. Each mutant leaves out something that a kernel
does, and must be refuted.
"""

from collections.abc import Callable, Hashable, Iterable

import pytest


class Violation(Exception):
    """A state that must not be; the message says why."""


def explore(first: Hashable, following: Callable[[Hashable], Iterable], done: Callable) -> int:
    """Visit every state that can come; how many there are.

    Raises:
        Violation: `following` did, or nothing can follow a state that is not `done`.
    """
    seen, todo = {first}, [first]
    while todo:
        state = todo.pop()
        after = list(following(state))
        if not after and not done(state):
            raise Violation("deadlock")
        fresh = set(after) - seen
        seen |= fresh
        todo += fresh
    return len(seen)


def replaced(items: tuple, index: int, item) -> tuple:
    return (*items[:index], item, *items[index + 1 :])


# What a warp is about to do.
WAIT, ARM, READ, MEET, SEND, DONE = range(6)


def cluster(blocks: int, warps: int, steps: int, mutant: str = "") -> int:
    """cluster.cuh: two states a block, each with a barrier that counts what comes; no step's state
    but by messages. The first warp of a block arms. A message is a warp's part for one block, sent
    when it has added up what all the block's warps left in one buffer of partial sums (the kernels
    have two)."""
    parts = blocks * warps
    buffers = 1 if mutant == "one state" else 2

    def settled(barrier):
        phase, arrivals, expected = barrier
        return (phase + 1, 1, 0) if arrivals == 0 and expected == 0 else barrier

    def following(state):
        running, barriers, memory, partials, messages = state
        if messages and all(doing == DONE for _, doing, _ in running):
            raise Violation("a message comes when its receiver has left")
        for i, (t, doing, sent) in enumerate(running):
            block, warp = divmod(i, warps)
            at, mine = block * 2 + t % buffers, range(block * warps, (block + 1) * warps)

            def goes_on(to, barriers=barriers, partials=partials, messages=messages, i=i):
                return replaced(running, i, to), barriers, memory, partials, messages

            if doing == WAIT:
                arms = ARM if warp == 0 and t > 0 and mutant != "never armed again" else READ
                wrong = mutant == "wrong parity"
                if t == 0 or barriers[at][0] % 2 != (t - 1 + wrong) // 2 % 2 or mutant == "no wait":
                    yield goes_on((t, arms, 0))
            elif doing == ARM:
                phase, arrivals, expected = barriers[at]
                if arrivals == 0:
                    raise Violation("a barrier has more arrivals than it waits for")
                armed = settled((phase, arrivals - 1, expected + parts))
                yield goes_on((t, READ, 0), replaced(barriers, at, armed))
            elif doing == READ:
                if any(tag != t for tag in memory[at * parts : (at + 1) * parts]):
                    raise Violation(f"a read of state {t} finds another")
                yield goes_on((t, MEET, 0), partials=replaced(partials, i, t))
            elif doing == MEET:
                if mutant == "no block_sync":
                    yield goes_on((t, SEND, 0))
                elif warp == 0 and all(running[j][:2] == (t, MEET) for j in mine):
                    together = running
                    for j in mine:
                        together = replaced(together, j, (t, SEND, 0))
                    yield together, barriers, memory, partials, messages
            elif doing == SEND:
                if sent == 0 and any(partials[j] != t for j in mine):
                    raise Violation(f"partial sums of step {t} are another step's")
                if t + 1 == steps and mutant != "the last step sends":
                    yield goes_on((t, DONE, 0))
                elif sent < blocks:
                    message = (sent * 2 + (t + 1) % buffers, i, t + 1)
                    yield goes_on((t, SEND, sent + 1), messages=messages | {message})
                else:
                    yield goes_on((t + 1, WAIT, 0) if t + 1 < steps else (t, DONE, 0))
        for message in messages:
            at, part, tag = message
            for t, doing, _ in running[at // 2 * warps : (at // 2 + 1) * warps]:
                if doing == READ and at % 2 == t % buffers:
                    raise Violation("a state is overwritten while it is read")
            phase, arrivals, expected = barriers[at]
            yield (
                running,
                replaced(barriers, at, settled((phase, arrivals, expected - 1))),
                replaced(memory, at * parts + part, tag),
                partials,
                messages - {message},
            )

    first = (
        ((0, READ, 0),) * parts,
        # Initialised for one arrival, which has been made.
        ((0, 0, parts),) * (2 * blocks),
        (0,) * (2 * blocks * parts),
        (-1,) * parts,
        frozenset(),
    )
    return explore(first, following, lambda s: all(w[1] == DONE for w in s[0]))


def grid(blocks: int, warps: int, steps: int, mutant: str = "") -> int:
    """grid.cuh: a warp gathers what the blocks with its part of the depth have written, leaves its
    partial sums in one of two buffers, meets the others, and adds up and writes its own units."""
    buffers = 1 if mutant == "one buffer of partial sums" else 2
    mailbox = 1 if mutant == "one state in the mailbox" else steps

    def following(state):
        running, partials, written = state
        for i, (t, doing) in enumerate(running):
            block, warp = divmod(i, warps)
            buffer = (block * 2 + t % buffers) * warps
            mine = range(block * warps, (block + 1) * warps)

            def goes_on(to, partials=partials, written=written, i=i):
                return replaced(running, i, to), partials, written

            if doing == WAIT:  # for the blocks whose units are this warp's part of the depth
                theirs = [written[b * warps + w] for b in range(blocks) for w in range(warps)]
                needed = theirs[warp::warps]
                if any(n > t for n in needed) and mailbox == 1:
                    raise Violation("what is gathered has been overwritten")
                if t == 0 or all(n >= t for n in needed) or mutant == "no wait":
                    if any(n < t for n in needed):
                        raise Violation(f"state {t} is gathered before it is written")
                    yield goes_on((t, READ))
            elif doing == READ:  # multiplies, and leaves its partial sums
                for j in mine:
                    if running[j][1] == SEND and running[j][0] % buffers == t % buffers and j != i:
                        raise Violation("partial sums are overwritten while they are read")
                yield goes_on((t, MEET), replaced(partials, buffer + warp, t))
            elif doing == MEET:
                if mutant == "no block_sync":
                    yield goes_on((t, SEND))
                elif warp == 0 and all(running[j] == (t, MEET) for j in mine):
                    together = running
                    for j in mine:
                        together = replaced(together, j, (t, SEND))
                    yield together, partials, written
            elif doing == SEND:  # adds up and writes
                if any(tag != t for tag in partials[buffer : buffer + warps]):
                    raise Violation(f"partial sums of step {t} are another step's")
                to = (t + 1, WAIT) if t + 1 < steps else (t, DONE)
                yield goes_on(to, written=replaced(written, i, t + 1))

    first = (
        ((0, WAIT),) * (blocks * warps),
        (-1,) * (2 * blocks * warps),
        (0,) * (blocks * warps),
    )
    return explore(first, following, lambda s: all(w[1] == DONE for w in s[0]))


@pytest.mark.parametrize("blocks, warps, steps", [(2, 2, 4), (3, 1, 4), (1, 3, 5)])
def test_cluster(blocks, warps, steps):
    assert cluster(blocks, warps, steps) > 100


@pytest.mark.parametrize(
    "mutant",
    ["one state", "never armed again", "no block_sync", "the last step sends", "wrong parity"]
    + ["no wait"],
)
def test_cluster_mutants(mutant):
    with pytest.raises(Violation):
        cluster(2, 2, 4, mutant)


@pytest.mark.parametrize("blocks, warps, steps", [(2, 2, 4), (3, 2, 3), (2, 3, 3), (1, 3, 5)])
def test_grid(blocks, warps, steps):
    assert grid(blocks, warps, steps) > 20


@pytest.mark.parametrize(
    "mutant",
    ["one buffer of partial sums", "no block_sync", "no wait", "one state in the mailbox"],
)
def test_grid_mutants(mutant):
    with pytest.raises(Violation):
        grid(2, 2, 4, mutant)
