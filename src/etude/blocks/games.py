"""Two-player zero-sum games with hidden information: rules, the flattened tree, best response, exploitability.

A `Game` is seven pure functions on immutable states. `flatten` walks it once and keeps what the value of two strategies
depends on, the *sequence form* (von Stengel, "Efficient Computation of Behavior Strategies", 1996): the information sets of
each player, parents first, and for every end of the game the last action of either player on the way there. The value is
then  Σ_z chance(z) · utility(z) · π₀(z) · π₁(z),  π the product of a player's own action probabilities. No history is
stored, so a tree costs 13 to 17 bytes a history, and a sweep touches each end once a player.

Names. *History*: a node of the game's tree. *Information set*: histories that the player to move cannot tell apart.
*Sequence*: an information set with one of its actions, or (one a player) having played nothing yet. A *strategy* of both
players is one float64 array indexed by sequence: the probabilities of each information set sum to 1, "nothing" has 1.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from etude.core.errors import UserError, nearest

CHANCE, OVER = -1, -2


class Game(Protocol):
    """The rules of a two-player zero-sum game: pure functions on immutable states (a tuple or text is best).

    Actions and chance outcomes may be any hashable value; ``str(action)`` is how it is shown. Players must have perfect
    recall: what `information` says must contain all that the player has seen and done.
    """

    def initial(self) -> Any:
        """The state in which the game begins."""
        ...

    def player(self, state: Any) -> int:
        """Who acts: player 0, player 1, CHANCE, or OVER when the game has ended."""
        ...

    def actions(self, state: Any) -> Sequence[Any]:
        """The legal actions of the player to move (asked only where player 0 or 1 moves)."""
        ...

    def chances(self, state: Any) -> Sequence[tuple[Any, float]]:
        """The outcomes of chance with their probabilities, which sum to 1 (asked only where CHANCE moves)."""
        ...

    def next(self, state: Any, action: Any) -> Any:
        """The state after this action or chance outcome."""
        ...

    def utility(self, state: Any) -> float:
        """What player 0 wins and player 1 loses (asked only where the game is OVER)."""
        ...

    def information(self, state: Any) -> str:
        """All that the player to move knows, readable: the label of the information set."""
        ...


class Kuhn:
    """Kuhn poker (Kuhn, A simplified two-person poker, 1950): three cards, one each, ante 1, one bet of 1.

    State: the two cards dealt so far and the actions so far. 12 information sets; the value to player 0 is −1/18.
    """

    cards = "JQK"

    def initial(self) -> tuple[str, ...]:
        return ()

    def player(self, state: tuple[str, ...]) -> int:
        if len(state) < 2:
            return CHANCE
        history = state[2:]
        over = len(history) == 3 or history[-1:] in (("call",), ("fold",)) or history == ("check", "check")
        return OVER if over else len(history) % 2

    def chances(self, state: tuple[str, ...]) -> list[tuple[str, float]]:
        left = [card for card in self.cards if card not in state]
        return [(card, 1 / len(left)) for card in left]

    def actions(self, state: tuple[str, ...]) -> tuple[str, str]:
        return ("fold", "call") if state[-1] == "bet" else ("check", "bet")

    def next(self, state: tuple[str, ...], action: str) -> tuple[str, ...]:
        return (*state, action)

    def utility(self, state: tuple[str, ...]) -> float:
        first, second, *history = state
        if history[-1] == "fold":
            return 1.0 if len(history) == 2 else -1.0  # the one who did not fold wins the ante
        stake = 2.0 if history[-1] == "call" else 1.0
        return stake if self.cards.index(first) > self.cards.index(second) else -stake

    def information(self, state: tuple[str, ...]) -> str:
        return " ".join((state[self.player(state)], *state[2:]))


@dataclass(frozen=True)
class Hand:
    """A state of Leduc poker: cards dealt, actions by round, chips of either player in the pot, who moves next."""

    cards: tuple[str, ...] = ()
    rounds: tuple[tuple[str, ...], ...] = ((),)
    chips: tuple[int, int] = (1, 1)
    folded: int | None = None


class Leduc:
    """Leduc hold'em (Southey et al., Bayes' bluff, 2005): six cards, one each, a public card after the first round.

    Ante 1; raises of 2 before the public card and 4 after it, at most two a round; a pair with the public card wins,
    otherwise the higher rank, and equal ranks share. Suits are told apart, so there are 936 information sets.
    """

    deck = ("Js", "Jh", "Qs", "Qh", "Ks", "Kh")

    def initial(self) -> Hand:
        return Hand()

    def player(self, state: Hand) -> int:
        if state.folded is not None:
            return OVER
        if len(state.cards) < 2:
            return CHANCE
        if not self._settled(state.rounds[-1]):
            return len(state.rounds[-1]) % 2
        return CHANCE if len(state.rounds) == 1 else OVER

    def chances(self, state: Hand) -> list[tuple[str, float]]:
        left = [card for card in self.deck if card not in state.cards]
        return [(card, 1 / len(left)) for card in left]

    def actions(self, state: Hand) -> tuple[str, ...]:
        last = state.rounds[-1]
        calls = ("fold", "call") if last[-1:] == ("raise",) else ("check",)
        return (*calls, "raise") if last.count("raise") < 2 else calls

    def next(self, state: Hand, action: str) -> Hand:
        if self.player(state) == CHANCE:
            rounds = (*state.rounds, ()) if len(state.cards) == 2 else state.rounds
            return Hand((*state.cards, action), rounds, state.chips)
        me = self.player(state)
        rounds = (*state.rounds[:-1], (*state.rounds[-1], action))
        put = max(state.chips)  # a call evens the pot, a raise evens it and adds
        if action == "raise":
            put += 2 if len(rounds) == 1 else 4
        mine = put if action in ("call", "raise") else state.chips[me]
        chips = (mine, state.chips[1]) if me == 0 else (state.chips[0], mine)
        return Hand(state.cards, rounds, chips, me if action == "fold" else None)

    def utility(self, state: Hand) -> float:
        if state.folded is not None:
            return float(state.chips[1] if state.folded == 1 else -state.chips[0])
        first, second, public = (card[0] for card in state.cards)
        if first == second:
            return 0.0
        wins = first == public or (second != public and "JQK".index(first) > "JQK".index(second))
        return float(state.chips[1] if wins else -state.chips[0])

    def information(self, state: Hand) -> str:
        first, *second = state.rounds
        known = [state.cards[self.player(state)], *first]
        return " ".join(known + ["|", state.cards[2], *second[0]] if second else known)

    @staticmethod
    def _settled(actions: tuple[str, ...]) -> bool:
        return actions[-1:] == ("call",) or actions[-2:] == ("check", "check")


@dataclass(frozen=True)
class LiarsDice:
    """Liar's dice with one die each: raise the bid "this many of this face on the table" or call the other a liar.

    Bids are ordered 1x1, 1x2, …, 1x6, 2x1, …, 2x6; the highest face is wild and counts as any. Whoever is wrong loses 1.
    State: the rolls and bids so far, and "liar". 24,576 information sets with six faces.
    """

    faces: int = 6

    def initial(self) -> tuple[int | str, ...]:
        return ()

    def player(self, state: tuple[int | str, ...]) -> int:
        if len(state) < 2:
            return CHANCE
        return OVER if state[-1] == "liar" else len(state) % 2

    def chances(self, state: tuple[int | str, ...]) -> list[tuple[int, float]]:
        return [(face, 1 / self.faces) for face in range(1, self.faces + 1)]

    @functools.cached_property
    def bids(self) -> tuple[str, ...]:
        return tuple(f"{many}x{face}" for many in (1, 2) for face in range(1, self.faces + 1))

    def actions(self, state: tuple[int | str, ...]) -> tuple[str, ...]:
        if len(state) == 2:
            return self.bids
        return (*self.bids[self.bids.index(str(state[-1])) + 1 :], "liar")

    def next(self, state: tuple[int | str, ...], action: int | str) -> tuple[int | str, ...]:
        return (*state, action)

    def utility(self, state: tuple[int | str, ...]) -> float:
        many, face = (int(part) for part in str(state[-2]).split("x"))
        true = sum(die in (face, self.faces) for die in state[:2]) >= many
        bidder = (len(state) - 2) % 2  # the bid is the last but one move
        return 1.0 if true == (bidder == 0) else -1.0

    def information(self, state: tuple[int | str, ...]) -> str:
        return " ".join(map(str, (state[self.player(state)], *state[2:])))


@dataclass(frozen=True)
class Matrix:
    """A matrix game: player 0 picks a row and player 1 a column unseen; player 0 wins that entry.

    `rows` (R, C) are the winnings of player 0; `names` label the rows and the columns.
    """

    rows: tuple[tuple[float, ...], ...]
    names: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    def initial(self) -> tuple[int, ...]:
        return ()

    def player(self, state: tuple[int, ...]) -> int:
        return OVER if len(state) == 2 else len(state)

    def chances(self, state: tuple[int, ...]) -> list[tuple[Any, float]]:
        return []

    def actions(self, state: tuple[int, ...]) -> Sequence[Any]:
        return self._names[len(state)]

    def next(self, state: tuple[int, ...], action: Any) -> tuple[int, ...]:
        return (*state, self._names[len(state)].index(action))

    def utility(self, state: tuple[int, ...]) -> float:
        return float(self.rows[state[0]][state[1]])

    def information(self, state: tuple[int, ...]) -> str:
        return ("row", "column")[len(state)]

    @functools.cached_property
    def _names(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.names or (range(len(self.rows)), range(len(self.rows[0])))


GAMES: dict[str, Callable[[], Game]] = {"kuhn": Kuhn, "leduc": Leduc, "liars_dice": LiarsDice}


def load_game(name: str) -> Game:
    """Return the game of this name, or ``Name`` from a Python file given as ``path/to/file.py:Name`` (which is run).

    Raises UserError for an unknown name, a missing file, a file that fails, or a `Name` without a game's functions.
    """
    if name in GAMES:
        return GAMES[name]()
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        known = ", ".join(GAMES)
        raise UserError(
            f"there is no game '{name}'{nearest(name, GAMES)}; the games are {known}, or your own as path/to/file.py:Name"
        )
    if not Path(path).is_file():
        raise UserError(f"the game file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"etude_game_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        found = getattr(module, attribute, None)
        game = found() if isinstance(found, type) else found
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"the game file {path} cannot be used: {type(error).__name__}: {error}") from error
    if game is None:
        raise UserError(f"{path} defines no '{attribute}'{nearest(attribute, vars(module))}")
    missing = [part for part in _PARTS if not callable(getattr(game, part, None))]
    if missing:
        raise UserError(f"{name} is not a game: it lacks the function {', '.join(missing)} (etude.blocks.games.Game)")
    return game


_PARTS = ("initial", "player", "actions", "chances", "next", "utility", "information")


@dataclass(frozen=True)
class Tree:
    """A game flattened into arrays: I information sets, S sequences, Z ends that pay something.

    Player 0 has the sets ``sets[0] … sets[1]−1`` and the sequences ``sequences[0] … sequences[1]−1``, player 1 the rest. The
    sequences of set i are ``first[i] … first[i+1]−1``; "nothing played" is sequence 0 for player 0 and S−1 for player 1.
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
    def bytes_per_history(self) -> float:
        """Bytes of the arrays divided by the number of histories (labels not counted)."""
        return sum(part.nbytes for part in self._arrays) / self.histories

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
    a distribution, when a player has no action or two alike, when an information set is met with differing actions, when a
    payoff is not finite, or when a player forgets (imperfect recall, for which CFR has no guarantee).
    """
    name = type(game).__name__
    numbers: dict[tuple[int, str], int] = {}
    labels: tuple[list[str], list[str]] = ([], [])
    actions: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
    raw: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] = ([], [])
    first: tuple[array[int], array[int]] = (array("i", [1]), array("i", [1]))
    parent: tuple[array[int], array[int]] = (array("i"), array("i"))
    last: tuple[array[int], array[int]] = (array("i"), array("i"))  # of each end: either player's last sequence
    payoff = array("d")
    histories = ends = 0
    # (state, last sequence of player 0, of player 1, chance probability, how it was reached: (path, action))
    stack: list[tuple[Any, int, int, float, Any]] = [(game.initial(), 0, 0, 1.0, None)]
    while stack:
        state, mine, other, chance, path = stack.pop()
        histories += 1
        if histories > limit:
            raise UserError(f"{name} has more than {limit:,} histories: the tree is too large for memory, or never ends")
        player = game.player(state)
        if player == OVER:
            value = float(game.utility(state))
            if not math.isfinite(value):
                raise UserError(f"{name}: the utility {_after(path)} is {value}; it must be a finite number")
            ends += 1
            if value * chance != 0.0:  # an end that pays nothing adds nothing to any value
                last[0].append(mine)
                last[1].append(other)
                payoff.append(value * chance)
        elif player == CHANCE:
            outcomes = list(game.chances(state))
            total = math.fsum(probability for _, probability in outcomes)
            if abs(total - 1) > 1e-9 or any(not probability >= 0 for _, probability in outcomes):
                raise UserError(f"{name}: the chance probabilities {_after(path)} are {_shares(outcomes)}, sum {total:g}")
            for outcome, probability in reversed(outcomes):
                stack.append((game.next(state, outcome), mine, other, chance * probability, (path, outcome)))
        elif player in (0, 1):
            own = mine if player == 0 else other
            label, legal = game.information(state), tuple(game.actions(state))
            i = numbers.get((player, label))
            if i is None:
                if not legal or len({str(action) for action in legal}) < len(legal):
                    wrong = f"two actions of one name ({', '.join(map(str, legal))})" if legal else "no action"
                    raise UserError(f"{name}: player {player} has {wrong} {_after(path)}; let player() say OVER at an end")
                i = numbers[player, label] = len(parent[player])
                labels[player].append(label)
                raw[player].append(legal)
                actions[player].append(tuple(map(str, legal)))
                parent[player].append(own)
                first[player].append(first[player][-1] + len(legal))
            elif legal != raw[player][i]:
                raise UserError(
                    f"{name}: player {player}'s information set '{label}' has the actions {_names(raw[player][i])} in one"
                    f" history and {_names(legal)} {_after(path)}; what a player cannot tell apart must allow the same actions"
                )
            elif parent[player][i] != own:
                here, there = (_sequence(player, s, labels, actions, first) for s in (own, parent[player][i]))
                raise UserError(
                    f"{name} has no perfect recall: player {player} meets '{label}' both {there} and {here}, having"
                    " forgotten which; let information() hold all that the player has seen and done"
                )
            start = first[player][i]
            for k in range(len(legal) - 1, -1, -1):
                after = (path, legal[k])
                if player == 0:
                    stack.append((game.next(state, legal[k]), start + k, other, chance, after))
                else:
                    stack.append((game.next(state, legal[k]), mine, start + k, chance, after))
        else:
            raise UserError(f"{name}: player() gives {player!r} {_after(path)}; it must be 0, 1, CHANCE (-1) or OVER (-2)")
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
    while path is not None:
        path, action = path
        steps.append(str(action))
    return f"after {', '.join(reversed(steps))}" if steps else "at the start"


def _names(actions: Sequence[Any]) -> str:
    return "(" + ", ".join(map(str, actions)) + ")"


def _shares(outcomes: list[tuple[Any, float]]) -> str:
    return ", ".join(f"{outcome} {probability:g}" for outcome, probability in outcomes) or "none"


def _sequence(player: int, sequence: int, labels: Any, actions: Any, first: Any) -> str:
    if sequence == 0:
        return "having played nothing"
    i = int(np.searchsorted(first[player], sequence, side="right")) - 1
    return f"after '{actions[player][i][sequence - first[player][i]]}' in '{labels[player][i]}'"


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an array loop with numba at its first call; numba is not imported before.

    The machine code is kept on disk (beside the source file, or in NUMBA_CACHE_DIR or the user's cache folder where that
    is read-only; without any writable place it is compiled anew in each process). ``kernel.__wrapped__`` is the Python.
    """

    @functools.cache
    def build() -> Callable[..., Any]:
        import numba

        try:
            return numba.njit(cache=True)(kernel)
        except RuntimeError:  # no writable place for the cache
            return numba.njit(kernel)

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        return build()(*arguments)

    return call


@compiled
def _reach(first, parent, strategy):
    reach = np.ones(len(strategy))
    for i in range(len(parent)):
        for s in range(first[i], first[i + 1]):
            reach[s] = reach[parent[i]] * strategy[s]
    return reach


@compiled
def _best_response(first, parent, row, column, weight, reach, begin, end, low, high, root):
    value, response = np.zeros(len(reach)), np.zeros(len(reach))
    for s in range(low, high):
        for z in range(row[s], row[s + 1]):  # expectation over chance and the other player
            value[s] += weight[z] * reach[column[z]]
    for i in range(end - 1, begin - 1, -1):  # maximum over the player's own actions, the deepest sets first
        best = first[i]
        for s in range(first[i] + 1, first[i + 1]):
            if value[s] > value[best]:
                best = s
        response[best] = 1.0
        value[parent[i]] += value[best]
    response[root] = 1.0
    return value[root], response


def reach(tree: Tree, strategy: np.ndarray) -> np.ndarray:
    """π(s), the product of the acting player's own probabilities along each sequence; float64 (S,)."""
    return _reach(tree.first, tree.parent, strategy)


def best_response(tree: Tree, strategy: np.ndarray, player: int) -> tuple[float, np.ndarray]:
    """Return (value to `player`, strategy) of an exact best response of `player` to the other's part of `strategy` (S,).

    Expectation over chance and the opponent, maximum over the player's actions *information set by information set*
    (the player does not see what is hidden). Ties go to the first action. The strategy returned is that of both: the
    player's part is pure, the other's is as given.
    """
    begin, end, low, high = *tree.sets[player : player + 2], *tree.sequences[player : player + 2]
    root = 0 if player == 0 else high - 1
    arrays = (tree.first, tree.parent, tree.row, tree.column, tree.weight)
    value, response = _best_response(*arrays, reach(tree, strategy), begin, end, low, high, root)
    return value, np.concatenate([strategy[:low], response[low:high], strategy[high:]])


def exploitability(tree: Tree, strategy: np.ndarray) -> float:
    """½ Σ_i max_{π'_i} u_i(π'_i, π_{−i}) = NashConv / 2: 0 exactly at a Nash equilibrium, in units of utility.

    The value of the game cancels in the sum, so this is the mean over the two seats of what a player loses, relative to
    the game's value, against a best response.
    """
    return 0.5 * (best_response(tree, strategy, 0)[0] + best_response(tree, strategy, 1)[0])


def expected_value(tree: Tree, strategy: np.ndarray) -> float:
    """What player 0 wins on average when both follow this strategy (S,)."""
    own = reach(tree, strategy)
    mine = slice(0, tree.row[tree.sequences[1]])
    owner = np.repeat(np.arange(tree.sequences[1]), np.diff(tree.row[: tree.sequences[1] + 1]))
    return float(np.sum(tree.weight[mine] * own[owner] * own[tree.column[mine]]))


def normalised(tree: Tree, weights: np.ndarray) -> np.ndarray:
    """The strategy (S,) in proportion to nonnegative `weights` (S,); uniform in a set whose weights are all 0."""
    sizes = np.diff(tree.first)
    strategy = np.ones(tree.sequences[2])
    if len(sizes):
        inner = weights[1:-1]
        total = np.repeat(np.add.reduceat(inner, tree.first[:-1] - 1), sizes)
        strategy[1:-1] = np.where(total > 0, inner / np.where(total > 0, total, 1.0), np.repeat(1 / sizes, sizes))
    return strategy


def uniform(tree: Tree) -> np.ndarray:
    """The strategy (S,) by which both players take each legal action with equal probability."""
    return normalised(tree, np.zeros(tree.sequences[2]))


def policy(tree: Tree, strategy: np.ndarray, player: int, label: str) -> dict[str, float]:
    """Action names and probabilities in one information set; KeyError if the game has no such set."""
    i = tree.numbers[player, label]
    return dict(zip(tree.actions[i], strategy[tree.first[i] : tree.first[i + 1]].tolist()))


def table(tree: Tree, strategy: np.ndarray) -> list[dict[str, Any]]:
    """The strategy as rows ``{"player", "knows", "reach", "plays": {action: probability}}``, JSON-able.

    `reach` is the player's own probability of playing up to there. Sets of a player come in the order of the tree.
    """
    own = reach(tree, strategy)
    rows = []
    for i, label in enumerate(tree.labels):
        player = int(i >= tree.sets[1])
        plays = policy(tree, strategy, player, label)
        rows.append({"player": player, "knows": label, "reach": float(own[tree.parent[i]]), "plays": plays})
    return rows
