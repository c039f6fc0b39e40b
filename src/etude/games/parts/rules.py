"""Two-player zero-sum games with hidden information: the rules interface, Kuhn and Leduc poker, liar's dice.

A `Game` is seven pure functions on immutable states, so a game of your own is one short class; `load_game` finds it by
``path/to/file.py:Name``. `etude.games.parts.tree` flattens a game into arrays, `etude.games.parts.strategies` measures
strategies on it, `etude.games.parts.showing` makes them readable.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from etude.core.errors import UserError, nearest
from etude.core.folder import read_bytes
from etude.core.trust import permit

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

    Bids are ordered 1x1, 1x2, …, 1x6, 2x1, …, 2x6; the highest face is wild and counts as any. Whoever is wrong
    loses 1. State: the rolls and bids so far, and "liar". 24,576 information sets with six faces.
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
            f"there is no game '{name}'{nearest(name, GAMES)}; known are {known}, or your own as path/to/file.py:Name"
        )
    if not Path(path).is_file():
        raise UserError(f"there is no game file {path} (seen from {Path.cwd()})")
    source = read_bytes(Path(path))
    permit({Path(path).name: source}, f"the game file {path}")
    module = ModuleType(f"etude_game_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        found = getattr(module, attribute, None)
        game = found() if isinstance(found, type) else found
    except Exception as error:
        del sys.modules[module.__name__]
        raise UserError(f"the game file {path} cannot be used: {type(error).__name__}: {error}") from error
    if game is None:
        raise UserError(f"{path} defines no '{attribute}'{nearest(attribute, vars(module))}")
    missing = [part for part in _PARTS if not callable(getattr(game, part, None))]
    if missing:
        raise UserError(
            f"{name} is not a game: it lacks the function {', '.join(missing)} (etude.games.parts.rules.Game)"
        )
    return game


_PARTS = ("initial", "player", "actions", "chances", "next", "utility", "information")
