"""Textbook references on the rules alone: recursions over histories that know nothing of the flattened tree."""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass

from etude.games.parts.rules import CHANCE, OVER

Policy = dict[tuple[int, str], dict]  # (player, what it knows) → {action: probability}


@dataclass(frozen=True)
class RandomGame:
    """A game of perfect recall made up from a number: chance, hidden moves, two moves in a row, forced moves."""

    number: int
    length: int = 5

    def initial(self):
        return ()  # the moves so far: (who, action, seen by player 0, seen by player 1)

    def _draw(self, sides: int, *key) -> int:
        return zlib.crc32(repr((self.number, *key)).encode()) % sides

    def player(self, state):
        if len(state) == self.length or (len(state) > 2 and self._draw(6, "over", self._public(state)) == 0):
            return OVER
        return (CHANCE, 0, 0, 1, 1)[self._draw(5, "who", self._public(state))]

    def _public(self, state):
        return tuple(action if a and b else len(str(who)) for who, action, a, b in state)

    def _legal(self, state):
        who = self.player(state)
        seen = self.information(state) if who >= 0 else self._public(state)
        return range(1 + self._draw(3, "how many", seen))

    def actions(self, state):
        return [f"m{k}" for k in self._legal(state)]

    def chances(self, state):
        weights = [1 + self._draw(4, "chance", state, k) for k in self._legal(state)]
        return [(k, weight / sum(weights)) for k, weight in enumerate(weights)]

    def next(self, state, action):
        who, key = self.player(state), (self._public(state), "seen")
        one, two = (who == p or self._draw(2, *key, p) == 0 for p in (0, 1))
        return (*state, (who, action, one, two))

    def utility(self, state):
        return self._draw(201, "win", state) / 50 - 2.0

    def information(self, state):
        me = self.player(state)
        return f"{self._public(state)} " + " ".join(str(m[1]) if m[2 + me] else "?" for m in state)


def sets_of(game, state=None, found=None) -> dict[tuple[int, str], tuple]:
    """Every information set and its actions."""
    state, found = game.initial() if state is None else state, {} if found is None else found
    player = game.player(state)
    if player == OVER:
        return found
    if player == CHANCE:
        moves = [outcome for outcome, _ in game.chances(state)]
    else:
        moves = game.actions(state)
        found.setdefault((player, game.information(state)), tuple(moves))
    for move in moves:
        sets_of(game, game.next(state, move), found)
    return found


def value(game, policy: Policy, state=None) -> float:
    """What player 0 wins on average."""
    state = game.initial() if state is None else state
    player = game.player(state)
    if player == OVER:
        return game.utility(state)
    if player == CHANCE:
        moves = game.chances(state)
    else:
        moves = policy[player, game.information(state)].items()
    return sum(share * value(game, policy, game.next(state, move)) for move, share in moves)


def best_value(game, policy: Policy, me: int) -> float:
    """What `me` wins by the best pure plan against `policy`: one choice an information set, the last ones first."""
    histories = defaultdict(list)  # (label) → [(state, probability that chance and the opponent allow it)]

    def collect(state, allowed, own):
        player = game.player(state)
        if player == OVER:
            return
        if player == me:
            histories[game.information(state)].append((state, allowed, own))
            for move in game.actions(state):
                collect(game.next(state, move), allowed, own + 1)
        else:
            moves = game.chances(state) if player == CHANCE else policy[player, game.information(state)].items()
            for move, share in moves:
                collect(game.next(state, move), allowed * share, own)

    chosen: dict[str, object] = {}

    def worth(state):
        player = game.player(state)
        if player == OVER:
            return game.utility(state) * (1 if me == 0 else -1)
        if player == me:
            return worth(game.next(state, chosen[game.information(state)]))
        moves = game.chances(state) if player == CHANCE else policy[player, game.information(state)].items()
        return sum(share * worth(game.next(state, move)) for move, share in moves)

    collect(game.initial(), 1.0, 0)
    for label, members in sorted(histories.items(), key=lambda item: -item[1][0][2]):
        moves = game.actions(members[0][0])
        gains = [sum(allowed * worth(game.next(state, move)) for state, allowed, _ in members) for move in moves]
        chosen[label] = moves[gains.index(max(gains))]
    return worth(game.initial())


def nash_gap(game, policy: Policy) -> float:
    """Exploitability: half the sum of what the two best answers win."""
    return 0.5 * (best_value(game, policy, 0) + best_value(game, policy, 1))


class TextbookCFR:
    """Zinkevich et al. 2007 as printed: a recursion over histories with both players' reach probabilities."""

    def __init__(self, game, plus: bool, alternating: bool, delay: int) -> None:
        self.game, self.plus, self.alternating, self.delay = game, plus, alternating, delay
        self.sets = sets_of(game)
        self.regret = {key: dict.fromkeys(moves, 0.0) for key, moves in self.sets.items()}
        self.total = {key: dict.fromkeys(moves, 0.0) for key, moves in self.sets.items()}
        self.policy = {key: dict.fromkeys(moves, 1 / len(moves)) for key, moves in self.sets.items()}

    def iterate(self, t: int) -> None:
        for players in ((0,), (1,)) if self.alternating else ((0, 1),):
            counted: set = set()
            self._walk(self.game.initial(), [1.0, 1.0], 1.0, players, t, counted)
            for key, regret in self.regret.items():
                if self.plus and key[0] in players:
                    regret.update({move: max(value, 0.0) for move, value in regret.items()})
                good = {move: max(value, 0.0) for move, value in regret.items()}
                mass = sum(good.values())
                self.policy[key] = {m: v / mass if mass > 0 else 1 / len(good) for m, v in good.items()}

    def _walk(self, state, reach, luck, players, t, counted) -> float:
        game, player = self.game, self.game.player(state)
        if player == OVER:
            return game.utility(state)
        if player == CHANCE:
            return sum(
                p * self._walk(game.next(state, o), reach, luck * p, players, t, counted)
                for o, p in game.chances(state)
            )
        key = player, game.information(state)
        plays, values = self.policy[key], {}
        for move, share in plays.items():
            below = list(reach)
            below[player] *= share
            values[move] = self._walk(game.next(state, move), below, luck, players, t, counted)
        here = sum(plays[move] * values[move] for move in plays)
        if player in players:
            sign = 1 if player == 0 else -1
            for move in plays:
                self.regret[key][move] += luck * reach[1 - player] * sign * (values[move] - here)
            if key not in counted:  # a player's own reach is the same in all histories of a set
                counted.add(key)
                weight = max(t - self.delay, 0) if self.plus else float(t > self.delay)
                for move, share in plays.items():
                    self.total[key][move] += weight * reach[player] * share
        return here
