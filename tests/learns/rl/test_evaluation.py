"""Both estimates come to the exact values of the walk."""

import etude


def test_both_come_to_the_values(tmp_path):
    settings = {"episodes": 800, "rounds": 10, "td_learning_rate": 0.02, "monte_carlo_learning_rate": 0.005}
    done = etude.run("rl/evaluation", out=tmp_path / "run", quiet=True, **settings)
    assert done.metrics["td_rmse"] < 0.04  # measured 0.024
    assert done.metrics["monte_carlo_rmse"] < 0.06  # measured 0.040
