"""Textbook references on the rules alone: recursions over histories that know nothing of the flattened tree."""

from __future__ import annotations

import itertools
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


def best_value(game, policy: Policy, me: int, chosen: dict[str, object] | None = None) -> float:
    """What `me` wins by the best pure plan against `policy`: one choice an information set, the last ones first.

    `chosen` takes the plan up.
    """
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

    chosen = {} if chosen is None else chosen

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


def own_path(game, state=None, path=((), ()), found=None) -> dict[tuple[int, str], tuple]:
    """For every information set what its player did on the way there: ((label, action), …)."""
    state, found = game.initial() if state is None else state, {} if found is None else found
    player = game.player(state)
    if player == OVER:
        return found
    if player == CHANCE:
        for outcome, _ in game.chances(state):
            own_path(game, game.next(state, outcome), path, found)
        return found
    label = game.information(state)
    found[player, label] = path[player]
    for move in game.actions(state):
        longer = (*path[player], (label, move))
        own_path(game, game.next(state, move), (longer, path[1]) if player == 0 else (path[0], longer), found)
    return found


class PlainFictitiousPlay:
    """Brown's process on whole strategies: all that were ever played are kept, and one of them is drawn before a game."""

    def __init__(self, game, alternating: bool = False) -> None:
        self.game, self.alternating, self.path = game, alternating, own_path(game)
        self.sets = sets_of(game)
        even = {key: dict.fromkeys(moves, 1 / len(moves)) for key, moves in self.sets.items()}
        self.played: tuple[list[Policy], list[Policy]] = ([even], [even])

    def average(self) -> Policy:
        """The strategy that plays as the draw does: in each set those count that come there."""
        found: Policy = {}
        for (player, label), moves in self.sets.items():
            sums = dict.fromkeys(moves, 0.0)
            for policy in self.played[player]:
                there = 1.0
                for before, move in self.path[player, label]:
                    there *= policy[player, before][move]
                for move in moves:
                    sums[move] += there * policy[player, label][move]
            total = sum(sums.values())
            found[player, label] = {m: part / total if total else 1 / len(moves) for m, part in sums.items()}
        return found

    def iterate(self) -> None:
        before = self.average()
        answers = [best_policy(self.game, before, 0)]
        if self.alternating:
            self.played[0].append(answers[0])
            before = self.average()
            self.played[0].pop()
        answers.append(best_policy(self.game, before, 1))
        for player in (0, 1):
            self.played[player].append(answers[player])

    def last(self) -> Policy:
        return {key: self.played[key[0]][-1][key] for key in self.sets}


def best_policy(game, policy: Policy, me: int) -> Policy:
    """The plan of `best_value`, by information set: the first of the best actions."""
    chosen: dict[str, object] = {}
    best_value(game, policy, me, chosen)
    return {
        key: {move: float(move == chosen.get(key[1], moves[0])) for move in moves}
        for key, moves in sets_of(game).items()
        if key[0] == me
    }


def dealt(game, policy: Policy, rng, hands: int) -> list[float]:
    """What player 0 wins in each of so many hands, dealt from `rng` by inverting cumulated shares."""
    won = []
    for _ in range(hands):
        state = game.initial()
        while (player := game.player(state)) != OVER:
            shares = dict(game.chances(state)) if player == CHANCE else policy[player, game.information(state)]
            ends, dart = list(itertools.accumulate(shares.values())), rng.random()
            state = game.next(state, next((m for m, end in zip(shares, ends) if dart < end), list(shares)[-1]))
        won.append(game.utility(state))
    return won
