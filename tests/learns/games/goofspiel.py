"""Goofspiel with three cards, written by a user: `etude run games/cfr --game path/to/goofspiel.py:Goofspiel`.

Both players hold 1, 2, 3. For the prizes 3, 2, 1 in turn each lays a card unseen; the higher card takes the prize,
equal cards nobody. Then both cards are shown. Whoever has more prize points wins.
"""

from etude.games.parts.rules import OVER

PRIZES = (3, 2, 1)


class Goofspiel:
    """State: the cards laid so far, player 0's and player 1's in turn."""

    def initial(self):
        return ()

    def player(self, state):
        return OVER if len(state) == 2 * len(PRIZES) else len(state) % 2

    def actions(self, state):
        mine = state[len(state) % 2 :: 2]
        return [card for card in (1, 2, 3) if card not in mine[: len(state) // 2]]

    def chances(self, state):
        return []

    def next(self, state, card):
        return (*state, card)

    def utility(self, state):
        won = sum(prize * ((a > b) - (a < b)) for prize, a, b in zip(PRIZES, state[::2], state[1::2]))
        return float((won > 0) - (won < 0))

    def information(self, state):
        shown = [f"{a}-{b}" for a, b in zip(state[::2], state[1::2])]  # a card laid but not answered is not shown
        return " ".join(shown) or "start"
