"""DAgger where cloning fails: the expert's few steps do not show what to do when the pole is far from upright."""

import etude


def test_labels_of_its_own_states_make_the_learner_as_good_as_the_expert(tmp_path):
    settings = {"iterations": 4, "updates": 300, "widths": (), "evaluation_episodes": 10, "final_episodes": 20}
    done = etude.run("imitation/dagger", examples=12, out=tmp_path / "run", quiet=True, **settings)
    assert done.metrics["learner_return"] >= 475
    assert done.metrics["cloned_return"] <= 300
