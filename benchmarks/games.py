"""CFR and CFR+ against OpenSpiel's C++ solvers, on equal games to equal exploitability.

Needs the peer: pip install --no-deps open_spiel==2.0.2 absl-py attrs ml-collections. Seconds are an iteration of the
solver; flattening, compiling and our memory are printed beside, and are not in the ratio (nor is OpenSpiel's set-up).
"""

from __future__ import annotations

import sys
import time

from race import race, report

# game, OpenSpiel's name, variant, iterations before comparing, iterations timed (ours, theirs), bar
RACES = (
    ("kuhn", "kuhn_poker", "cfr", 100, (20_000, 500), 30.0),
    ("kuhn", "kuhn_poker", "cfr_plus", 100, (20_000, 500), 30.0),
    ("leduc", "leduc_poker", "cfr", 50, (200, 4), 50.0),
    ("leduc", "leduc_poker", "cfr_plus", 50, (200, 4), 50.0),
    ("liars_dice", "liars_dice", "cfr", 3, (10, 1), 50.0),
    ("liars_dice", "liars_dice", "cfr_plus", 3, (10, 1), 50.0),
)


def rows() -> list[dict]:
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
    report("games", rows())
