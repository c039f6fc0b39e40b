"""The steps of DAgger by hand: who acts, who labels, what is kept."""

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import RunError, UserError
from etude.core.spec import Spec
from etude.imitation.dagger import Config, disagreement, first_steps, fresh, label, mixed
from etude.imitation.parts import experts, obstacle
from etude.imitation.parts.nulls import own_label

STATES = np.arange(40, dtype=np.float32).reshape(20, 2)


def ones(states):
    return np.ones(len(states), np.int64)


def zeros(states):
    return np.zeros(len(states), np.int64)


def test_labels_are_the_experts_and_nobody_elses():
    done = np.arange(20) % 2
    np.testing.assert_array_equal(label(STATES, done, ones), np.ones(20))
    np.testing.assert_array_equal(own_label(STATES, done, ones), done)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_expert_acts_in_a_share_beta_of_the_steps(beta):
    act = mixed(ones, zeros, beta, np.random.default_rng(0))
    drawn = np.concatenate([act(np.zeros((500, 2), np.float32)) for _ in range(40)])
    assert abs(drawn.mean() - beta) <= 4 * np.sqrt(beta * (1 - beta) / len(drawn))


def test_all_numbers_of_an_action_are_of_one_of_the_two():
    act = mixed(lambda s: np.ones((len(s), 3)), lambda s: np.zeros((len(s), 3)), 0.5, np.random.default_rng(1))
    drawn = act(np.zeros((1000, 2), np.float32))
    assert set(drawn.sum(1)) == {0.0, 3.0}


def test_disagreement_counts_actions_or_measures_distances():
    assert disagreement(ones, lambda s: np.arange(len(s)) % 2, STATES) == 0.5
    assert disagreement(lambda s: s + np.array([3.0, 4.0]), lambda s: s, STATES) == pytest.approx(5.0)


def test_the_first_steps_are_whole_episodes_cut_off_at_the_count():
    expert = experts.Expert("", 2, 2, False, obstacle.LIMIT, obstacle.Obstacle, obstacle.two_ways, obstacle.nearer)
    few, more = first_steps(expert, 30, 5), first_steps(expert, 75, 5)
    assert (len(few), len(more)) == (30, 75)
    assert more.ends[29] or more.longest <= obstacle.LIMIT
    assert len(np.unique(more.observations[more.first], axis=0)) >= 2


def test_fresh_weights_are_new_in_every_iteration_and_equal_on_every_rank():
    spec, drawn = Spec(extra={"size": 2, "actions": 2, "discrete": False}), []
    for stream, step in ((0, 1), (1, 1), (0, 2)):
        torch.manual_seed(stream)  # in a loop each rank has a stream of its own
        drawn.append(
            torch.cat([x.flatten() for n, x in fresh(Config(), spec, 7, step).items() if n.startswith("head")])
        )
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).all()


def test_the_obstacles_expert_answers_for_the_side_on_which_the_point_is():
    states = np.array([[-0.1, 0.0], [0.1, 0.0], [0.1, 0.9]], np.float32)
    moves = obstacle.nearer(states)
    assert moves[0, 0] < 0 < moves[1, 0]
    np.testing.assert_allclose(moves[2], [0.0, obstacle.SPEED], atol=1e-7)  # past the gate it goes straight on
    np.testing.assert_allclose(np.linalg.norm(moves, axis=1), obstacle.SPEED, rtol=1e-6)


@pytest.mark.parametrize("expert", ["sinusoid"])
def test_an_expert_that_cannot_be_asked_is_refused(expert, tmp_path):
    with pytest.raises(UserError, match="cannot be asked what it would do"):
        etude.run("imitation/dagger", expert=expert, out=tmp_path / "run", quiet=True)


def test_divergence_is_said_in_a_sentence(tmp_path):
    with pytest.raises(RunError, match="not finite|is nan|is inf"):
        etude.run("imitation/dagger", preset="tiny", learning_rate=1e30, out=tmp_path / "run", quiet=True)
