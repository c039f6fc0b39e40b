"""The tree of a two-player zero-sum game as arrays: flattening, best response, exploitability, readable strategies.

`flatten` walks the rules (`etude.blocks.games.Game`) once and keeps what the value of two strategies depends on, the
*sequence form* (von Stengel, "Efficient Computation of Behavior Strategies", 1996): the information sets of either
player, parents first, and for every end of the game the last action of either player on the way there. The value is
then  Σ_z chance(z) · utility(z) · π₀(z) · π₁(z),  π the product of a player's own action probabilities. No history is
stored, so a tree costs 13 to 16 bytes a history, and a sweep touches each end once a player.

Names. *History*: a node of the game's tree. *Information set*: histories that the player to move cannot tell apart.
*Sequence*: an information set with one of its actions, or (one a player) having played nothing yet. A *strategy* of
both players is one float64 array indexed by sequence: the probabilities of each set sum to 1, "nothing" has 1.
"""

from __future__ import annotations

import functools
import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from etude.blocks.games import CHANCE, OVER, Game
from etude.core.errors import UserError

DEPTH = 10_000  # moves of one history at most; more is taken for a game without end
WARM_UP = 200_000  # array elements a kernel visits in Python before it is worth compiling (about 0.3 s)


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


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Run an array loop as machine code once that pays: ``call(work, *arguments)`` with the elements it will visit.

    The first WARM_UP elements are visited in Python, with equal results to the last bit, so that a small game needs
    neither numba nor its compile time. Machine code is kept on disk: beside the source file, or in NUMBA_CACHE_DIR or
    the user's cache folder where that is read-only; with no writable place each process compiles anew.
    ``call.build()`` compiles now.
    """
    spent = 0

    @functools.cache
    def build() -> Callable[..., Any]:
        import numba

        try:
            return numba.njit(cache=True)(kernel)
        except RuntimeError:  # no writable place for the cache
            return numba.njit(kernel)

    @functools.wraps(kernel)
    def call(work: int, *arguments: Any) -> Any:
        nonlocal spent
        spent += work
        return (kernel if spent <= WARM_UP else build())(*arguments)

    call.build = build  # type: ignore[attr-defined]
    return call


@compiled
def _reach(first, parent, strategy, reach):
    for i in range(len(parent)):
        for s in range(first[i], first[i + 1]):
            reach[s] = reach[parent[i]] * strategy[s]


@compiled
def _best_response(first, parent, row, column, weight, begin, end, low, high, reach, value, strategy):
    for s in range(low, high):
        for z in range(row[s], row[s + 1]):  # expectation over chance and the other player
            value[s] += weight[z] * reach[column[z]]
    for i in range(end - 1, begin - 1, -1):  # maximum over the player's own actions, the deepest sets first
        best = first[i]
        for s in range(first[i], first[i + 1]):
            strategy[s] = 0.0
            if value[s] > value[best]:
                best = s
        strategy[best] = 1.0
        value[parent[i]] += value[best]


def reach(tree: Tree, strategy: np.ndarray) -> np.ndarray:
    """π(s), the product of the acting player's own probabilities along each sequence; float64 (S,)."""
    filled = np.ones(tree.sequences[2])
    _reach(tree.size, tree.first, tree.parent, strategy, filled)
    return filled


def best_response(tree: Tree, strategy: np.ndarray, player: int) -> tuple[float, np.ndarray]:
    """Return (value, strategy) of an exact best response of `player` to the other's part of `strategy` (S,).

    Expectation over chance and the opponent, maximum over the player's actions *information set by information set*
    (the player does not see what is hidden). Ties go to the first action. The strategy returned is that of both: the
    player's part is pure, the other's is as given.
    """
    arrays = (tree.first, tree.parent, tree.row, tree.column, tree.weight)
    bounds = (*tree.sets[player : player + 2], *tree.sequences[player : player + 2])
    value, response = np.zeros(tree.sequences[2]), strategy.copy()
    _best_response(tree.size, *arrays, *bounds, reach(tree, strategy), value, response)
    return float(value[0 if player == 0 else -1]), response


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


@dataclass(frozen=True)
class Move:
    """One move of a hand: who, what the player knew ("" for chance), the choice, and the probabilities it came from."""

    player: int
    knows: str
    choice: str
    shares: dict[str, float]


def deal(game: Game, tree: Tree, strategy: np.ndarray, rng: np.random.Generator) -> tuple[list[Move], float]:
    """Play one hand by `strategy` (S,); return its moves and what player 0 wins."""
    state, moves = game.initial(), []
    while (player := game.player(state)) != OVER:
        if player == CHANCE:
            outcomes, shares = zip(*game.chances(state))
            knows = ""
        else:
            knows, outcomes = str(game.information(state)), tuple(game.actions(state))
            shares = tuple(policy(tree, strategy, player, knows).values())
        pick = min(int(np.searchsorted(np.cumsum(shares), rng.random(), side="right")), len(shares) - 1)
        moves.append(Move(player, knows, str(outcomes[pick]), dict(zip(map(str, outcomes), shares))))
        state = game.next(state, outcomes[pick])
    return moves, float(game.utility(state))


def hand_text(title: str, moves: list[Move], won: float) -> str:
    """A hand as a table: who moved, what that player knew, what it did, and the probabilities it drew from."""
    names = {CHANCE: "chance", 0: "player 0", 1: "player 1"}
    knows, choice = (max((len(getattr(move, part)) for move in moves), default=0) for part in ("knows", "choice"))
    lines = [title]
    for move in moves:
        shares = "  ".join(f"{name} {share:.2f}" for name, share in move.shares.items() if move.player != CHANCE)
        line = f"  {names[move.player]:<8}  {move.knows:<{knows}}  → {move.choice:<{choice}}  {shares}"
        lines.append(line.rstrip())
    end = "nobody wins" if won == 0 else f"player {int(won < 0)} wins {abs(won):g}"
    return "\n".join([*lines, f"  {end}", ""])


def strategy_text(tree: Tree, strategy: np.ndarray, most: int) -> str:
    """The strategy as a table of at most `most` information sets, the first decisions first."""
    rows, order = table(tree, strategy), _by_depth(tree)
    wide = max((len(rows[i]["knows"]) for i in order[:most]), default=5)
    lines = [f"{'player':<6}  {'knows':<{wide}}  reach  plays"]
    for i in order[:most]:
        plays = "  ".join(f"{name} {share:.3f}" for name, share in rows[i]["plays"].items())
        lines.append(f"{rows[i]['player']:<6}  {rows[i]['knows']:<{wide}}  {rows[i]['reach']:.3f}  {plays}")
    left = len(rows) - most
    return "\n".join([*lines, *([f"… and {left:,} more information sets"] if left > 0 else []), ""])


def strategy_figure(tree: Tree, strategy: np.ndarray, most: int = 18) -> Any:
    """A matplotlib Figure: for each player a bar for each of its first `most` information sets, divided by action."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    order, rows = _by_depth(tree), table(tree, strategy)
    chosen = [[i for i in order if rows[i]["player"] == player][:most] for player in (0, 1)]
    names = list(dict.fromkeys(name for i in (*chosen[0], *chosen[1]) for name in rows[i]["plays"]))
    figure = Figure(figsize=(10, 1.2 + 0.28 * max(map(len, chosen))), layout="constrained")
    for player, axes in enumerate(figure.subplots(1, 2)):
        mine = [rows[i] for i in chosen[player]]
        left = np.zeros(len(mine))
        for k, name in enumerate(names):
            width = np.array([row["plays"].get(name, 0.0) for row in mine])
            colour = colormaps["tab20"](2 * (k % 10) + k // 10 % 2)  # ten strong ones, then their pale sisters
            axes.barh(range(len(mine)), width, left=left, color=colour, label=name.replace("$", r"\$"))
            left += width
        axes.set_yticks(range(len(mine)), [row["knows"] for row in mine], parse_math=False)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), title=f"player {player}", xlabel="probability")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 7), frameon=False)
    return figure


def _by_depth(tree: Tree) -> list[int]:
    """Information sets by how many moves of its own a player has behind it, then in the order of the tree."""
    depth = np.zeros(tree.sets[2], int)
    owner = np.searchsorted(tree.first, tree.parent, side="right") - 1  # of the roots: outside the player's sets
    for i, before in enumerate(owner):
        if 0 <= before < tree.sets[2]:
            depth[i] = depth[before] + 1
    return np.argsort(depth, kind="stable").tolist()
