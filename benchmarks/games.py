"""CFR and CFR+ against OpenSpiel's C++ solvers, fictitious play against its XFP (Python), on equal games to equal values.

Needs the peer: pip install --no-deps open_spiel==2.0.2 absl-py attrs ml-collections. Seconds are an iteration of the
solver; flattening, compiling and our memory are printed beside, and are not in the ratio (nor is OpenSpiel's set-up).
`cfr` or `fictitious_play` behind the command renews these rows alone.
"""

from __future__ import annotations

import functools
import json
import sys
import time

from race import RESULTS, race, report

# game, OpenSpiel's name, variant, iterations before comparing, iterations timed (ours, theirs), bar
RACES = (
    ("kuhn", "kuhn_poker", "cfr", 100, (20_000, 500), 30.0),
    ("kuhn", "kuhn_poker", "cfr_plus", 100, (20_000, 500), 30.0),
    ("leduc", "leduc_poker", "cfr", 50, (200, 4), 50.0),
    ("leduc", "leduc_poker", "cfr_plus", 50, (200, 4), 50.0),
    ("liars_dice", "liars_dice", "cfr", 3, (10, 1), 50.0),
    ("liars_dice", "liars_dice", "cfr_plus", 3, (10, 1), 50.0),
)


def rows(part: str = "") -> list[dict]:
    parts = {"cfr": _cfr, "fictitious_play": _fictitious_play}
    return [row for name, made in parts.items() if part in ("", name) for row in made()]


def _fictitious_play() -> list[dict]:
    """An iteration of either, at equal exploitability after 50 iterations of Leduc poker."""
    import pyspiel
    from open_spiel.python.algorithms import exploitability as peer
    from open_spiel.python.algorithms import fictitious_play as xfp

    from etude.games.fictitious_play import answer
    from etude.games.parts import strategies
    from etude.games.parts.rules import load_game
    from etude.games.parts.tree import flatten

    strategies.WARM_UP = 0  # compile at the first call
    tree, game = flatten(load_game("leduc")), pyspiel.load_game("leduc_poker")
    average, solver = strategies.reach(tree, strategies.uniform(tree)), xfp.XFPSolver(game)
    for _ in range(50):
        answer(tree, average)
        solver.iteration()
    ours = strategies.exploitability(tree, strategies.normalised(tree, average))
    theirs = peer.exploitability(game, solver.average_policy())
    if abs(ours - theirs) > 5e-11:
        raise AssertionError(f"exploitability {ours!r} against OpenSpiel's {theirs!r}")

    def timed(iterate, count) -> float:
        start = time.perf_counter()
        for _ in range(count):
            iterate()
        return (time.perf_counter() - start) / count

    mine = functools.partial(timed, functools.partial(answer, tree, average), 1000)
    its = functools.partial(timed, solver.iteration, 2)
    equal = f"rules, both answer at once; exploitability at 50 iterations {ours:.10f}, apart {abs(ours - theirs):.0e}"
    return [race("fictitious play leduc", mine, its, "OpenSpiel XFP (Python)", _version("open_spiel"), 50.0, equal)]


def _cfr() -> list[dict]:
    import pyspiel

    from etude.games import cfr
    from etude.games.parts import strategies
    from etude.games.parts.rules import load_game
    from etude.games.parts.tree import flatten

    version = _version("open_spiel")
    start = time.perf_counter()
    strategies.WARM_UP = 0  # compile at the first call
    _solver(cfr, flatten(load_game("kuhn")), "cfr")(1)
    _note(f"importing and compiling (or loading compiled kernels): {time.perf_counter() - start:.2f} s")
    found = []
    for name, peer_name, variant, compared, (ours_count, peer_count), bar in RACES:
        start = time.perf_counter()
        tree = flatten(load_game(name))
        held = cfr.tables(tree)
        memory = tree.nbytes + sum(array.nbytes for array in held.state_dict().values())
        _note(
            f"{name}: flattened in {time.perf_counter() - start:.2f} s; {tree.histories:,} histories,"
            f" {memory / tree.histories:.1f} bytes a history (tree {tree.nbytes / tree.histories:.1f} and tables)"
        )
        game = pyspiel.load_game(peer_name)
        solver = {"cfr": pyspiel.CFRSolver, "cfr_plus": pyspiel.CFRPlusSolver}[variant](game)
        cfr.iterate(tree, held, 0, compared, variant)
        for _ in range(compared):
            solver.evaluate_and_update_policy()
        ours = strategies.exploitability(tree, strategies.normalised(tree, held.average))
        theirs = pyspiel.exploitability(game, solver.average_policy())
        if abs(ours - theirs) > 5e-11:
            raise AssertionError(f"{name} {variant}: exploitability {ours!r} against OpenSpiel's {theirs!r}")
        equal = (
            f"rules, update order; exploitability at {compared} iterations {ours:.10f}, apart {abs(ours - theirs):.0e}"
        )
        steps = _solver(cfr, tree, variant)

        def our_iterations(steps=steps, count=ours_count) -> float:
            start = time.perf_counter()
            steps(count)
            return (time.perf_counter() - start) / count

        def peer_iterations(solver=solver, count=peer_count) -> float:
            start = time.perf_counter()
            for _ in range(count):
                solver.evaluate_and_update_policy()
            return (time.perf_counter() - start) / count

        row = race(f"{variant} {name}", our_iterations, peer_iterations, "OpenSpiel C++", version, bar, equal)
        found.append(row | {"bytes_a_history": round(memory / tree.histories, 1)})
    return found


def _solver(cfr, tree, variant):
    """A function that goes on for so many iterations."""
    held, done = cfr.tables(tree), [0]

    def steps(count: int) -> None:
        cfr.iterate(tree, held, done[0], count, variant)
        done[0] += count

    return steps


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    chosen = " ".join(sys.argv[1:])
    known = json.loads((RESULTS / "games.json").read_text()) if chosen else []
    fresh = rows(chosen)
    names = {row["name"] for row in fresh}
    report("games", [row for row in known if row["name"] not in names] + fresh)
