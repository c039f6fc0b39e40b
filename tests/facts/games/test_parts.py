"""Rules, flattening, best response and exploitability against closed forms, brute force and linear programming."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.optimize import linprog

sys.path.insert(0, str(Path(__file__).parent))
from game_oracle import RandomGame, best_value, nash_gap, sets_of, value

from etude.core.errors import UserError
from etude.games.parts import strategies
from etude.games.parts.rules import CHANCE, OVER, Kuhn, Leduc, LiarsDice, Matrix, load_game
from etude.games.parts.showing import deal, strategy_figure, strategy_text, table
from etude.games.parts.strategies import (
    best_response,
    expected_value,
    exploitability,
    normalised,
    policy,
    reach,
    uniform,
)
from etude.games.parts.tree import flatten

KUHN, LEDUC = flatten(Kuhn()), flatten(Leduc())


def as_policy(game, tree, strategy):
    """The strategy for the oracle: by (player, label) and the game's own actions."""
    return {key: dict(zip(moves, policy(tree, strategy, *key).values())) for key, moves in sets_of(game).items()}


def random_strategy(tree, seed):
    rng = np.random.default_rng(seed)
    weights = rng.random(tree.sequences[2]) * (rng.random(tree.sequences[2]) < 0.7)  # some actions never played
    return normalised(tree, weights)


def kuhn_equilibrium(alpha):
    """Kuhn's family: player 0 bets a jack with probability α; everything else follows."""
    plays = {
        (0, "J"): {"bet": alpha},
        (0, "Q"): {"bet": 0.0},
        (0, "K"): {"bet": 3 * alpha},
        (0, "J check bet"): {"call": 0.0},
        (0, "Q check bet"): {"call": alpha + 1 / 3},
        (0, "K check bet"): {"call": 1.0},
        (1, "J check"): {"bet": 1 / 3},
        (1, "Q check"): {"bet": 0.0},
        (1, "K check"): {"bet": 1.0},
        (1, "J bet"): {"call": 0.0},
        (1, "Q bet"): {"call": 1 / 3},
        (1, "K bet"): {"call": 1.0},
    }
    strategy = uniform(KUHN)
    for key, choice in plays.items():
        ((action, share),) = choice.items()
        first = KUHN.first[KUHN.numbers[key]]
        strategy[first : first + 2] = [
            share if name == action else 1 - share for name in KUHN.actions[KUHN.numbers[key]]
        ]
    return strategy


# ------------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("tree", "histories", "ends", "sets", "gap", "first_wins"),
    [
        (KUHN, 58, 30, 12, 11 / 24, 1 / 8),
        (LEDUC, 9457, 5520, 936, 2.373611111111111, -0.078125),
        (flatten(LiarsDice()), 294883, 147420, 24576, 0.7807443231922397, None),
    ],
    ids=["kuhn", "leduc", "liars_dice"],
)
def test_the_games_are_openspiels(tree, histories, ends, sets, gap, first_wins):
    """Counts, and exploitability and value of uniform play, as OpenSpiel 2.0.2 gives them."""
    assert (tree.histories, tree.ends, tree.sets[2]) == (histories, ends, sets)
    assert exploitability(tree, uniform(tree)) == pytest.approx(gap, abs=1e-12)
    if first_wins is not None:
        assert expected_value(tree, uniform(tree)) == pytest.approx(first_wins, abs=1e-12)


@pytest.mark.parametrize("faces", [2, 3, 4])
def test_liars_dice_with_other_dice(faces):
    """6 · 2^(2·6) / 2 · 2 = 24,576 for six faces: every subset of bids with an own die."""
    assert flatten(LiarsDice(faces)).sets[2] == faces * 2 ** (2 * faces)


def test_leduc_pays_what_the_rules_say():
    game = Leduc()

    def play(*moves):
        state = game.initial()
        for move in moves:
            assert move in (game.actions(state) if game.player(state) != CHANCE else dict(game.chances(state)))
            state = game.next(state, move)
        assert game.player(state) == OVER
        return game.utility(state)

    assert play("Js", "Qs", "check", "raise", "fold") == -1
    assert (
        play("Js", "Qs", "raise", "raise", "call", "Jh", "raise", "raise", "call") == 1 + 2 + 2 + 4 + 4
    )  # a pair wins
    assert play("Js", "Qs", "raise", "call", "Ks", "check", "raise", "fold") == -3
    assert play("Js", "Jh", "raise", "call", "Ks", "check", "raise", "call") == 0  # equal ranks share
    assert play("Ks", "Qs", "check", "check", "Qh", "check", "check") == -1
    assert play("Ks", "Qs", "raise", "raise", "fold") == -3
    state = game.next(game.next(game.initial(), "Js"), "Qs")
    assert game.actions(state) == ("check", "raise")  # nobody folds unpressed
    for move in ("raise", "raise"):
        state = game.next(state, move)
    assert game.actions(state) == ("fold", "call")  # two raises a round


def test_the_wild_face_counts():
    game = LiarsDice(6)
    assert game.utility((6, 2, "2x2", "liar")) == 1.0  # 6 is wild: two twos on the table
    assert game.utility((6, 6, "2x6", "liar")) == 1.0
    assert game.utility((1, 2, "1x3", "liar")) == -1.0
    assert game.utility((1, 2, "1x1", "1x3", "liar")) == 1.0  # player 1 lied


# ------------------------------------------------------------------------------- values against independent oracles


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.2, 0.25, 1 / 3])
def test_kuhns_equilibria(alpha):
    strategy = kuhn_equilibrium(alpha)
    assert abs(exploitability(KUHN, strategy)) <= 1e-12
    assert expected_value(KUHN, strategy) == pytest.approx(-1 / 18, abs=1e-15)


def test_off_the_family_is_exploitable():
    strategy = kuhn_equilibrium(0.2)
    i = KUHN.first[KUHN.numbers[1, "Q bet"]]
    strategy[i : i + 2] = 0.5, 0.5
    assert exploitability(KUHN, strategy) > 1e-3


def test_an_equilibrium_may_lose_in_one_seat():
    """Erratum E141: what it ensures is the game's value; 0 only as the mean of the seats."""
    strategy = kuhn_equilibrium(0.2)
    against = [best_response(KUHN, strategy, player)[0] for player in (0, 1)]
    assert against == pytest.approx([-1 / 18, 1 / 18], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_best_response_in_kuhn_is_the_best_of_all_64_plans(seed):
    strategy = random_strategy(KUHN, seed)
    fixed = as_policy(Kuhn(), KUHN, strategy)
    for me in (0, 1):
        mine = [key for key in fixed if key[0] == me]
        plans = itertools.product(*(list(fixed[key]) for key in mine))
        best = max(
            (1 if me == 0 else -1) * value(Kuhn(), fixed | {key: {move: 1.0} for key, move in zip(mine, plan)} | {})
            for plan in plans
        )
        found, response = best_response(KUHN, strategy, me)
        assert found == pytest.approx(best, abs=1e-12)
        # the returned strategy attains it, and leaves the other player alone
        assert (1 if me == 0 else -1) * expected_value(KUHN, response) == pytest.approx(best, abs=1e-12)
        low, high = KUHN.sequences[1 - me : 3 - me]
        assert np.array_equal(response[low:high], strategy[low:high])


@settings(max_examples=60)
@given(number=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_any_game_equals_recursion_over_histories(number, seed):
    game = RandomGame(number)
    tree = flatten(game)
    strategy = random_strategy(tree, seed)
    fixed = as_policy(game, tree, strategy)
    assert expected_value(tree, strategy) == pytest.approx(value(game, fixed), abs=1e-12)
    for me in (0, 1):
        assert best_response(tree, strategy, me)[0] == pytest.approx(best_value(game, fixed, me), abs=1e-12)
    assert exploitability(tree, strategy) == pytest.approx(nash_gap(game, fixed), abs=1e-12)
    assert exploitability(tree, strategy) >= -1e-12


def test_leduc_equals_recursion_over_histories():
    strategy = random_strategy(LEDUC, 0)
    assert expected_value(LEDUC, strategy) == pytest.approx(
        value(Leduc(), as_policy(Leduc(), LEDUC, strategy)), abs=1e-12
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_matrix_games_against_linear_programming(seed, rows, columns):
    wins = np.random.default_rng(seed).normal(size=(rows, columns))
    tree = flatten(Matrix(tuple(map(tuple, wins))))

    def side(matrix):
        """max v with x a distribution and every column of xᵀ·matrix at least v."""
        n, m = matrix.shape
        found = linprog(
            np.append(np.zeros(n), -1.0), A_ub=np.hstack([-matrix.T, np.ones((m, 1))]), b_ub=np.zeros(m),
            A_eq=np.append(np.ones(n), 0.0)[None], b_eq=[1.0], bounds=[(0, None)] * n + [(None, None)],
        )  # fmt: skip
        return found.x[:n], found.x[n]

    x, worth = side(wins)
    y, _ = side(-wins.T)
    strategy = np.concatenate([[1.0], x, y, [1.0]])
    assert abs(exploitability(tree, strategy)) < 1e-8
    assert expected_value(tree, strategy) == pytest.approx(worth, abs=1e-8)
    mixed = uniform(tree)
    assert best_response(tree, mixed, 0)[0] == pytest.approx(wins.mean(1).max(), abs=1e-12)
    assert best_response(tree, mixed, 1)[0] == pytest.approx(-wins.mean(0).min(), abs=1e-12)


def test_python_and_machine_code_agree_to_the_last_bit():
    strategy, size = random_strategy(LEDUC, 3), LEDUC.sequences[2]
    results = []
    for kind in ("__wrapped__", "build"):
        down, up = (getattr(kernel, kind) for kernel in (strategies._reach, strategies._best_response))
        if kind == "build":
            down, up = down(), up()
        plans = np.ones(size)
        down(LEDUC.first, LEDUC.parent, strategy, plans)
        results.append([plans])
        for player in (0, 1):
            bounds = (*LEDUC.sets[player : player + 2], *LEDUC.sequences[player : player + 2])
            worth, response = np.zeros(size), strategy.copy()
            up(LEDUC.first, LEDUC.parent, LEDUC.row, LEDUC.column, LEDUC.weight, *bounds, plans, worth, response)
            results[-1] += [worth, response]
    assert all(np.array_equal(plain, machine) for plain, machine in zip(*results))


# ------------------------------------------------------------------------------------------------------ the arrays


@pytest.mark.parametrize("tree", [KUHN, LEDUC], ids=["kuhn", "leduc"])
def test_layout(tree):
    assert tree.first[0] == 1
    assert tree.first[-1] == tree.sequences[2] - 1
    assert tree.first[tree.sets[1]] == tree.sequences[1]
    assert np.all(np.diff(tree.first) == [len(names) for names in tree.actions])
    roots = (tree.parent == 0) | (tree.parent == tree.sequences[2] - 1)
    assert np.all(roots | (tree.parent < tree.first[:-1]))  # parents stand first
    assert tree.row[-1] == len(tree.column) == len(tree.weight)
    assert tree.nbytes == 12 * len(tree.column) + 8 * tree.sets[2] + 4 * (tree.sequences[2] + 2)
    assert tree.nbytes / tree.histories < 18
    plans = reach(tree, uniform(tree))
    for i in range(tree.sets[2]):  # a realisation plan: what flows into a set flows out of it
        assert plans[tree.first[i] : tree.first[i + 1]].sum() == pytest.approx(plans[tree.parent[i]])


def test_fingerprint_tells_games_apart():
    class Cheaper(Kuhn):
        def utility(self, state):
            return super().utility(state) / 2

    assert flatten(Kuhn()).fingerprint == KUHN.fingerprint
    assert len({KUHN.fingerprint, LEDUC.fingerprint, flatten(Cheaper()).fingerprint}) == 3


def test_readable_table():
    strategy = kuhn_equilibrium(0.3)
    rows = table(KUHN, strategy)
    assert len(rows) == 12
    king = next(row for row in rows if (row["player"], row["knows"]) == (0, "K"))
    assert king["plays"] == pytest.approx({"check": 0.1, "bet": 0.9})
    called = next(row for row in rows if row["knows"] == "K check bet")
    assert called["reach"] == pytest.approx(0.1)
    text = strategy_text(KUHN, strategy, 3)
    assert "check 0.100  bet 0.900" in text
    assert "9 more information sets" in text


def test_hands_are_dealt_as_the_strategy_says():
    strategy = kuhn_equilibrium(0.2)
    rng = np.random.default_rng(0)
    played = [deal(Kuhn(), KUHN, strategy, rng) for _ in range(4000)]
    won = np.array([win for _, win in played])
    assert abs(won.mean() + 1 / 18) < 4 * won.std() / math.sqrt(len(won))
    bluffs = [moves[2].choice == "bet" for moves, _ in played if moves[2].knows == "J"]
    assert abs(np.mean(bluffs) - 0.2) < 4 * math.sqrt(0.16 / len(bluffs))
    assert not any(moves[2].choice == "bet" for moves, _ in played if moves[2].knows == "Q")


# ------------------------------------------------------------------------------------------------- what is refused


class Broken(Kuhn):
    """Kuhn poker with one rule replaced."""

    def __init__(self, **rules):
        self.__dict__.update(rules)


def no_third_card(state):
    return [(card, 0.4) for card in "JQK" if card not in state]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"chances": no_third_card}, "chance probabilities at the start are J: 0.4, Q: 0.4, K: 0.4.*not 1.2"),
        ({"chances": lambda state: [("J", 1.5), ("Q", -0.5)]}, "at least 0"),
        ({"chances": lambda state: []}, "none"),
        ({"actions": lambda state: ()}, "player 0 has no action after J, Q"),
        ({"actions": lambda state: ("bet", "bet")}, "two actions of one name after J, Q: bet, bet"),
        ({"actions": lambda state: (state[1], "bet")}, "'J' has the actions .K, bet. after J, K but .Q, bet. else"),
        ({"utility": lambda state: math.nan}, "utility after J, Q, check, check is nan"),
        ({"player": lambda state: 2}, r"player\(\) is 2 at the start"),
        ({"next": lambda state, action: None}, "fails after J with TypeError"),
    ],
)  # fmt: skip
def test_a_bad_game_is_named(rules, says):
    with pytest.raises(UserError, match=says):
        flatten(Broken(**rules))


class Counting:
    """A game of moves "a" and "b" alone, as text; `player` and `information` are given."""

    actions = staticmethod(lambda state: "ab")
    next = staticmethod(lambda state, action: state + action)
    utility = staticmethod(lambda state: float(len(state)))
    initial = staticmethod(str)

    def __init__(self, player, information):
        self.player, self.information = player, information


def test_forgetting_is_refused():
    def player(state):
        return (0, 1, 0, OVER)[len(state)]

    flatten(Counting(player, lambda state: state))
    flatten(Counting(player, lambda state: state[::2]))  # the other's move may stay unseen
    with pytest.raises(
        UserError, match="no perfect recall: player 0 meets 'a' both after 'a' in '' and after 'b' in ''"
    ):
        flatten(Counting(player, lambda state: state[1:]))  # one's own may not
    with pytest.raises(
        UserError, match=r"no perfect recall: player 0 meets '\?' both having played nothing and after 'a'"
    ):
        flatten(Counting(lambda state: 0 if len(state) < 2 else OVER, lambda state: "?"))  # nor whether one has moved


def test_a_game_without_end_is_refused():
    endless = Counting(lambda state: 0, lambda state: str(len(state)))
    endless.actions, endless.next, endless.initial = (lambda state: "a"), (lambda state, action: (state, 1)), tuple
    endless.information = id
    with pytest.raises(UserError, match="more than 10,000 moves"):
        flatten(endless)


def test_too_large_a_game_is_refused():
    with pytest.raises(UserError, match="more than 9,456 histories"):
        flatten(Leduc(), limit=9456)
    flatten(Leduc(), limit=9457)


def test_games_by_name_and_file(tmp_path):
    assert isinstance(load_game("leduc"), Leduc)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from etude.games.parts.rules import Kuhn\nclass Mine(Kuhn):\n    cards = 'AB'\nship = Mine()\nodd = 3\n"
    )
    assert flatten(load_game(f"{mine}:Mine")).histories == flatten(load_game(f"{mine}:ship")).histories
    for name, says in [
        ("khun", "did you mean 'kuhn'"),
        (f"{tmp_path}/none.py:Mine", "there is no game file"),
        (f"{mine}:Nine", "defines no 'Nine'.*did you mean 'Mine'"),
        (f"{mine}:odd", "lacks the function initial, player"),
    ]:
        with pytest.raises(UserError, match=says):
            load_game(name)
    mine.write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="cannot be used: ModuleNotFoundError"):
        load_game(f"{mine}:Mine")


def test_the_picture_shows_names_as_they_are():
    """Dollar signs are no formula (an unclosed one would fail), and twelve actions have twelve colours."""
    stakes = tuple(f"bet ${n}^^ of $" for n in range(12))
    tree = flatten(Matrix(tuple((float(n), 0.0) for n in range(12)), (stakes, ("fold $^^$", "call"))))
    figure = strategy_figure(tree, uniform(tree))
    FigureCanvasAgg(figure).draw()
    assert [text.get_text().replace(r"\$", "$") for text in figure.legends[0].get_texts()][:12] == list(stakes)
    colours = {bar.get_facecolor() for bar in figure.axes[0].patches if bar.get_width() > 0}
    assert len(colours) == 12
