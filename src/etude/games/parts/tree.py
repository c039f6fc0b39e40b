"""The tree of a two-player zero-sum game as arrays.

`flatten` walks the rules (`etude.games.parts.rules.Game`) once and keeps what the value of two strategies depends on, the
*sequence form* (von Stengel, "Efficient Computation of Behavior Strategies", 1996): the information sets of either
player, parents first, and for every end of the game the last action of either player on the way there. The value is
then  Σ_z chance(z) · utility(z) · π₀(z) · π₁(z),  π the product of a player's own action probabilities. No history is
stored, so a tree costs 13 to 16 bytes a history, and a sweep touches each end once a player.

Names. *History*: a node of the game's tree. *Information set*: histories that the player to move cannot tell apart.
*Sequence*: an information set with one of its actions, or (one a player) having played nothing yet. A *strategy* of
both players is one float64 array indexed by sequence: the probabilities of each set sum to 1, "nothing" has 1.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from etude.core.errors import UserError
from etude.games.parts.rules import CHANCE, OVER, Game

DEPTH = 10_000  # moves of one history at most; more is taken for a game without end


@dataclass(frozen=True)
class Tree:
    """A game flattened into arrays: I information sets, S sequences, Z ends that pay something.

    Player 0 has the sets ``sets[0] … sets[1]−1`` and the sequences ``sequences[0] … sequences[1]−1``, player 1 the
    rest. The sequences of set i are ``first[i] … first[i+1]−1``; "nothing played" is sequence 0 for player 0 and S−1
    for player 1.
    """

    labels: tuple[str, ...]
    """What the player knows in each information set, (I,)."""
    actions: tuple[tuple[str, ...], ...]
    """Names of the actions of each information set, (I,)."""
    sets: tuple[int, int, int]
    """Where the information sets of either player begin, and I."""
    sequences: tuple[int, int, int]
    """Where the sequences of either player begin, and S."""
    first: np.ndarray
    """First sequence of each information set, and the end of the last; int32 (I + 1,)."""
    parent: np.ndarray
    """The player's own last sequence before each information set, whose set stands earlier; int32 (I,)."""
    row: np.ndarray
    """The ends whose last sequence of this player is s are ``row[s] … row[s+1]−1``; int32 (S + 1,)."""
    column: np.ndarray
    """The other player's last sequence of each end; int32 (2 Z,): each end stands once under either player."""
    weight: np.ndarray
    """Chance probability times what the player of the row wins at each end; float64 (2 Z,)."""
    histories: int
    """Nodes of the game's tree, its ends and chance nodes included."""
    ends: int
    """Ends of the game, those that pay nothing included."""
    numbers: dict[tuple[int, str], int] = field(repr=False)
    """The number of each information set by (player, label)."""

    @property
    def size(self) -> int:
        """Array elements that one sweep over both players visits."""
        return len(self.column) + self.sequences[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays (labels not counted): 12 an end and player, 8 an information set, 4 a sequence."""
        return sum(part.nbytes for part in self._arrays)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over labels, actions and arrays: equal for equal games."""
        digest = hashlib.sha256(repr((self.labels, self.actions, self.sets, self.sequences)).encode())
        for part in self._arrays:
            digest.update(part.tobytes())
        return digest.hexdigest()

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.first, self.parent, self.row, self.column, self.weight


def flatten(game: Game, limit: int = 10_000_000) -> Tree:
    """Walk the whole game once, depth first, and return its arrays.

    Raises UserError, naming the place, when the game has more than `limit` histories, when chance probabilities are not
    a distribution, when a player has no action or two alike, when an information set is met with differing actions,
    when a payoff is not finite, when a function of the game raises, or when a player forgets (imperfect recall, for
    which CFR has no guarantee).
    """
    name = type(game).__name__
    numbers: dict[tuple[int, str], int] = {}
    labels: tuple[list[str], list[str]] = ([], [])
    actions: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
    raw: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] = ([], [])
    # sequences are numbered within a player here, 0 being nothing played; `_join` puts the players in one row
    first: tuple[array[int], array[int]] = (array("i", [1]), array("i", [1]))
    parent: tuple[array[int], array[int]] = (array("i"), array("i"))
    last: tuple[array[int], array[int]] = (array("i"), array("i"))  # of each end: either player's last sequence
    payoff = array("d")
    histories = ends = 0
    path: Any = None  # how a state was reached, for messages: (path before, action, length)
    try:
        stack: list[tuple[Any, tuple[int, int], float, Any]] = [(game.initial(), (0, 0), 1.0, None)]
        while stack:
            state, played, chance, path = stack.pop()
            histories += 1
            if histories > limit:
                raise UserError(
                    f"{name} has more than {limit:,} histories: the tree is too large to flatten, or never ends"
                )
            depth = path[2] + 1 if path else 1
            if depth > DEPTH:
                raise UserError(f"{name} has a history of more than {DEPTH:,} moves; a game must come to an end")
            player = game.player(state)
            if player == OVER:
                value = float(game.utility(state))
                if not math.isfinite(value):
                    raise UserError(f"{name}: the utility {_after(path)} is {value}; it must be a finite number")
                ends += 1
                if value * chance != 0.0:  # an end that pays nothing adds nothing to any value
                    last[0].append(played[0])
                    last[1].append(played[1])
                    payoff.append(value * chance)
            elif player == CHANCE:
                outcomes = list(game.chances(state))
                total = math.fsum(probability for _, probability in outcomes)
                if abs(total - 1) > 1e-9 or any(not probability >= 0 for _, probability in outcomes):
                    raise UserError(
                        f"{name}: the chance probabilities {_after(path)} are {_shares(outcomes)}; they must be at"
                        f" least 0 and sum to 1, not {total:g}"
                    )
                for outcome, probability in reversed(outcomes):
                    after = (path, outcome, depth)
                    stack.append((game.next(state, outcome), played, chance * probability, after))
            elif player in (0, 1):
                label, legal, own = str(game.information(state)), tuple(game.actions(state)), played[player]
                i = numbers.get((player, label))
                if i is None:
                    names = tuple(map(str, legal))
                    if not legal:
                        raise UserError(
                            f"{name}: player {player} has no action {_after(path)}; at an end player() is OVER"
                        )
                    if len(set(names)) < len(names):
                        raise UserError(
                            f"{name}: player {player} has two actions of one name {_after(path)}: {', '.join(names)}"
                        )
                    i = numbers[player, label] = len(parent[player])
                    labels[player].append(label)
                    raw[player].append(legal)
                    actions[player].append(names)
                    parent[player].append(own)
                    first[player].append(first[player][-1] + len(legal))
                elif legal != raw[player][i]:
                    raise UserError(
                        f"{name}: player {player}'s information set '{label}' has the actions {_listed(legal)}"
                        f" {_after(path)} but {_listed(raw[player][i])} elsewhere; what a player cannot tell apart must"
                        " allow the same actions"
                    )
                elif parent[player][i] != own:
                    here, there = (
                        _sequence(s, labels[player], actions[player], first[player]) for s in (own, parent[player][i])
                    )
                    raise UserError(
                        f"{name} has no perfect recall: player {player} meets '{label}' both {there} and {here} and has"
                        " forgotten which; let information() tell all that the player has seen and done"
                    )
                start = first[player][i]
                for k in range(len(legal) - 1, -1, -1):
                    now = (start + k, played[1]) if player == 0 else (played[0], start + k)
                    stack.append((game.next(state, legal[k]), now, chance, (path, legal[k], depth)))
            else:
                raise UserError(
                    f"{name}: player() is {player!r} {_after(path)}; it must be 0, 1, CHANCE (-1) or OVER (-2)"
                )
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{name} fails {_after(path)} with {type(error).__name__}: {error}") from error
    return _join(labels, actions, first, parent, last, payoff, histories, ends, numbers)


def _join(labels, actions, first, parent, last, payoff, histories, ends, numbers) -> Tree:  # type: ignore[no-untyped-def]
    """Number the sequences of both players in one row: player 0's nothing, its sets, player 1's sets, its nothing."""
    mine, total = first[0][-1], first[0][-1] + first[1][-1]

    def of_one(local: np.ndarray) -> np.ndarray:
        return np.where(local == 0, total - 1, local + (mine - 1)).astype(np.int32)

    ends_of = [np.array(last[0], np.int32), of_one(np.array(last[1], np.int32))]
    own, other = np.concatenate(ends_of), np.concatenate(ends_of[::-1])
    pay = np.array(payoff, np.float64)
    order = np.lexsort((other, own))  # by own sequence, then by the other player's
    row = np.zeros(total + 1, np.int32)
    np.cumsum(np.bincount(own, minlength=total), out=row[1:])
    count = len(parent[0])
    return Tree(
        labels=(*labels[0], *labels[1]),
        actions=(*actions[0], *actions[1]),
        sets=(0, count, count + len(parent[1])),
        sequences=(0, mine, total),
        first=np.concatenate([np.array(first[0], np.int32), of_one(np.array(first[1], np.int32))[1:]]),
        parent=np.concatenate([np.array(parent[0], np.int32), of_one(np.array(parent[1], np.int32))]),
        row=row,
        column=other[order],
        weight=np.concatenate([pay, -pay])[order],
        histories=histories,
        ends=ends,
        numbers={key: i + (count if key[0] else 0) for key, i in numbers.items()},
    )


def _after(path: Any) -> str:
    steps: list[str] = []
    while path is not None and len(steps) < 40:
        path, action, _ = path
        steps.append(str(action))
    return f"after {', '.join(reversed(steps))}" if steps else "at the start"


def _listed(actions: Sequence[Any]) -> str:
    return "(" + ", ".join(map(str, actions)) + ")"


def _shares(outcomes: list[tuple[Any, float]]) -> str:
    return ", ".join(f"{outcome}: {probability:g}" for outcome, probability in outcomes) or "none"


def _sequence(sequence: int, labels: list[str], actions: list[tuple[str, ...]], first: array[int]) -> str:
    if sequence == 0:
        return "having played nothing"
    i = int(np.searchsorted(first, sequence, side="right")) - 1
    return f"after '{actions[i][sequence - first[i]]}' in '{labels[i]}'"
