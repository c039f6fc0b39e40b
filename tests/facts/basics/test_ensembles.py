"""Ensembles: Jensen, voting against scikit-learn, bootstrap, shared trunks, snapshots against torch's swa_utils (E22, E23)."""

import contextlib
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import VotingClassifier
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import etude
from etude import optim
from etude.basics.ensembles import Config, answers, build, classifier, jensen_slack, worth
from etude.basics.mlp import MLP
from etude.basics.mlp import Config as MLPConfig
from etude.basics.mlp import build as build_mlp
from etude.blocks.classifying.batches import subset, training_images
from etude.blocks.classifying.ensembles import (
    Ensemble,
    Snapshots,
    average_parameters,
    bootstrap,
    combine,
    disagreement,
    mean_log_probability,
    member_seed,
    reestimate,
    shared_trunk,
    snapshot_moments,
    split,
    spread,
    vote_log_share,
)
from etude.blocks.nn.norm import BatchNorm
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data import images
from etude.data.batches import Stream
from etude.data.sets import Split
from etude.optim.clipping import clip_norm_
from etude.robustness.fgsm import fgsm
from etude.vision.lenet import LeNet

SPEC = Spec(shape=(1, 3, 4), classes=tuple("abcde"), mean=(0.5,), std=(0.25,))
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing takes most of a tiny run; the learning tests and the contract tests draw."""
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def networks(count, normalizer="none", seed=0):
    torch.manual_seed(seed)
    made = [MLP(12, (7, 6), 5, (0.5,), (0.25,), normalizer=normalizer).double() for _ in range(count)]
    return [network.eval() for network in made]


def pictures(count=9, seed=1):
    return torch.rand(count, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- combining answers


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_jensen_for_every_example(scale):
    logits, y = draw(5, 400, 10, scale=scale), torch.arange(400) % 10
    slack = jensen_slack(logits, y)
    assert float(slack.min()) >= -1e-10 * scale
    assert float(slack.max()) > 0
    brute = -logits.softmax(-1).mean(0).clamp(min=1e-300)[range(400), y].log()
    single = torch.stack([F.cross_entropy(one, y, reduction="none") for one in logits]).mean(0)
    if scale < 100:  # probabilities themselves underflow there
        torch.testing.assert_close(slack, single - brute, rtol=1e-9, atol=1e-12)
    assert torch.equal(jensen_slack(logits[:1].expand(4, -1, -1), y).abs() < 1e-9 * max(1, scale), torch.ones(400) > 0)


def test_log_mean_probability_stays_finite_where_probabilities_underflow():
    logits = torch.tensor([[[0.0, -2000.0]], [[-3000.0, 0.0]]])
    torch.testing.assert_close(mean_log_probability(logits), torch.full((1, 2), math.log(0.5)))
    far = mean_log_probability(torch.tensor([[[0.0, -2000.0]], [[0.0, -3000.0]]]))
    torch.testing.assert_close(far, torch.tensor([[0.0, -2000 - math.log(2)]]))


class Fixed(ClassifierMixin, BaseEstimator):
    """Answers example number x with row x of a table."""

    def __init__(self, table=None):
        self.table = table

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, x):
        return self.table[x[:, 0].astype(int)]

    def predict(self, x):
        return self.classes_[self.predict_proba(x).argmax(1)]


@pytest.mark.parametrize("members", [1, 2, 4, 5])
def test_votes_are_scikit_learns(members):
    """Soft and hard, ties included: with four members and three classes a quarter of the votes are tied."""
    logits, x, y = draw(members, 300, 3), np.arange(300)[:, None], np.arange(300) % 3
    tables = [(f"m{i}", Fixed(table)) for i, table in enumerate(logits.softmax(-1).numpy())]
    for how, name in (("probability", "soft"), ("vote", "hard")):
        theirs = VotingClassifier(tables, voting=name).fit(x, y)
        np.testing.assert_array_equal(combine(logits, how).argmax(1).numpy(), theirs.predict(x))
    soft = VotingClassifier(tables, voting="soft").fit(x, y).predict_proba(x)
    np.testing.assert_allclose(combine(logits).exp().numpy(), soft, rtol=1e-12)
    votes = F.one_hot(logits.argmax(-1), 3).sum(0)
    tied = (votes == votes.max(1, keepdim=True).values).sum(1) > 1
    assert bool(tied.any()) == (members in (2, 4, 5))


def test_a_tied_vote_goes_to_the_lowest_class():
    logits = torch.full((4, 1, 4), -9.0)
    for member, taken in enumerate((3, 1, 3, 1)):
        logits[member, 0, taken] = 9.0
    share = vote_log_share(logits)
    assert share.argmax(1).tolist() == [1]
    torch.testing.assert_close(share.exp(), torch.tensor([[1, 3, 1, 3]]) / 8)  # (votes + 1)/(M + C)
    assert combine(torch.zeros(1, 1, 4), "vote").argmax().item() == 0  # a member that cannot decide


@pytest.mark.parametrize("how", ["probability", "vote"])
def test_the_ensemble_is_the_formula_and_sums_to_one(how):
    members, x = networks(3), pictures()
    p = torch.stack([member(x).softmax(-1) for member in members])
    expected = p.mean(0) if how == "probability" else (F.one_hot(p.argmax(-1), 5).sum(0) + 1) / 8
    found = Ensemble(members, how)(x)
    torch.testing.assert_close(found.exp(), expected.double(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(9, dtype=torch.float64))


def test_one_member_is_the_network_itself():
    (network,), x = networks(1), pictures()
    torch.testing.assert_close(Ensemble([network])(x), network(x).log_softmax(-1), rtol=1e-14, atol=0)
    assert torch.equal(Ensemble([network])([x])[0], network(x))


def test_an_attack_works_on_an_ensemble():
    """It goes through the log of the mean: its gradient is that of the formula written out."""
    members, x, y = networks(3), pictures().float(), torch.arange(9) % 5
    model = Ensemble(members).float()
    attacked = fgsm(model, x, y, 0.05)
    assert float((attacked - x).abs().max()) == pytest.approx(0.05, abs=1e-6)
    before, after = (F.cross_entropy(model(z), y, reduction="none") for z in (x, attacked))
    assert bool((after > before).all())


def test_wrong_numbers_of_members():
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble([])
    with pytest.raises(ValueError, match="2 inputs for 3 members"):
        Ensemble(networks(3))([pictures(), pictures()])
    with pytest.raises(ValueError, match="weights"):
        Ensemble(networks(2), "weights")


# --------------------------------------------------------------------------------------------- bootstrap, E22's formula


def test_bootstrap_covers_a_share_of_one_minus_one_over_e():
    """E22: with replacement, so 63.2 % of the examples occur."""
    n = 20_000
    drawn = [bootstrap(n, 3, member) for member in range(3)]
    for index in drawn:
        assert index.shape == (n,)
        assert (int(index.min()), int(index.max()) < n) == (int(index.min()), True)
        assert len(index.unique()) / n == pytest.approx(1 - 1 / math.e, abs=0.01)  # deviation 0.0022
        counts = torch.bincount(index, minlength=n).double()
        assert float((counts == 1).double().mean()) == pytest.approx(1 / math.e, abs=0.015)
    assert torch.equal(drawn[1], bootstrap(n, 3, 1))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], bootstrap(n, 4, 0))


@pytest.mark.parametrize("members", [1, 2, 5])
def test_the_variance_formula_holds_exactly(members):
    """E22: var = ρσ² + (1 − ρ)σ²/M, so correlation limits the gain."""
    logits, y = draw(members, 60, 4) + draw(1, 60, 4, seed=5), torch.arange(60) % 4
    share = spread(logits, y)
    errors = 1 - logits.softmax(-1).numpy()[:, np.arange(60), y.numpy()]
    assert share.measured == pytest.approx(errors.mean(0).var(), rel=1e-12)
    assert share.formula == pytest.approx(share.measured, rel=1e-10)
    assert share.variance == pytest.approx(errors.var(1).mean(), rel=1e-12)
    if members == 2:
        covariance = np.cov(errors, bias=True)
        assert share.correlation == pytest.approx(covariance[0, 1] / np.diag(covariance).mean(), rel=1e-12)
    assert (share.correlation == 1) == (members == 1)


def test_equal_members_gain_nothing_and_independent_ones_divide_the_variance():
    y = torch.zeros(100_000, dtype=torch.int64)
    own = draw(4, 100_000, 2)
    independent, equal = spread(own, y), spread(own[:1].expand(4, -1, -1), y)
    assert equal.correlation == pytest.approx(1)
    assert equal.measured == pytest.approx(equal.variance)
    assert independent.correlation == pytest.approx(0, abs=0.01)
    assert independent.measured == pytest.approx(independent.variance / 4, rel=0.03)


def test_disagreement_counts_pairs():
    taken = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 0], [0, 2, 0, 0]])
    assert disagreement(F.one_hot(taken).double()) == pytest.approx((1 / 4 + 2 / 4 + 2 / 4) / 3)
    assert disagreement(F.one_hot(taken[:1]).double()) == 0


def test_worth_is_of_the_first_m_members():
    logits, y = draw(4, 50, 3), torch.arange(50) % 3
    found = worth(logits, y)
    assert found["nll"][0] == found["single_nll"][0]
    for m in range(1, 5):
        p = logits[:m].softmax(-1).mean(0)
        assert found["nll"][m - 1] == pytest.approx(float(-p[range(50), y].log().mean()))
        assert found["accuracy"][m - 1] == pytest.approx(float((p.argmax(1) == y).double().mean()))


# ------------------------------------------------------------------------------------------------------ shared trunk


@pytest.mark.parametrize(("make", "at", "shape"), [
    (lambda: networks(1)[0], None, (1, 3, 4)),
    (lambda: networks(1)[0], "layers.3", (1, 3, 4)),
    (lambda: LeNet(10, size=28).double(), None, (1, 28, 28)),
    (lambda: LeNet(10, size=28, normalizer="layer").double(), "classifier.1", (1, 28, 28)),
])  # fmt: skip
def test_a_split_network_computes_what_it_did(make, at, shape):
    torch.manual_seed(0)
    network = make()
    x = torch.rand(4, *shape, dtype=torch.float64)
    before, parameters = network(x), sum(p.numel() for p in network.parameters())
    trunk, head = split(network, at)
    assert torch.equal(head(trunk(x)), before)
    assert sum(p.numel() for part in (trunk, head) for p in part.parameters()) == parameters
    assert isinstance(head, nn.Linear) == (at is None)


def test_the_trunk_gets_the_sum_of_the_heads_gradients():
    members, x, y = networks(3), pictures(), torch.arange(9) % 5
    model = shared_trunk(copy.deepcopy(members))
    torch.stack([F.cross_entropy(logits, y) for logits in model([x])]).sum().backward()
    total = {name: torch.zeros_like(p) for name, p in model.trunk.named_parameters()}
    for head in model.members:
        alone = copy.deepcopy(nn.Sequential(model.trunk, head))
        alone.zero_grad()
        F.cross_entropy(alone(x), y).backward()
        for name, parameter in alone[0].named_parameters():
            total[name] += parameter.grad
        torch.testing.assert_close(head.weight.grad, alone[1].weight.grad, rtol=1e-12, atol=1e-15)
    for name, parameter in model.trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, total[name], rtol=1e-12, atol=1e-15)
    assert torch.equal(model.each(x)[0], members[0](x))  # the first head is the network it came from
    assert [tuple(n(x).shape) for n in model.networks()] == [(9, 5)] * 3


@pytest.mark.parametrize(
    ("network", "at", "said"),
    [
        (lambda: MLP(12, (), 5), None, "before 'layers.1' there is nothing to learn"),
        (lambda: networks(1)[0], "layers.9", "has no part 'layers.9'"),
        (lambda: networks(1)[0], "standardise", "split at one of layers.0, layers.1"),
        (lambda: nn.Conv2d(1, 1, 1), None, "does not end in a linear layer"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "1", "behind '1' there is nothing to learn"),
    ],
)
def test_splits_that_make_no_sense(network, at, said):
    with pytest.raises(UserError, match=said):
        split(network(), at)


# ------------------------------------------------------------------------------------------------ snapshots, averages


def test_linear_model_averaging_weights_is_averaging_outputs():
    torch.manual_seed(0)
    models, x = [nn.Linear(6, 3).double() for _ in range(4)], draw(8, 6)
    outputs = torch.stack([model(x) for model in models]).mean(0)
    torch.testing.assert_close(average_parameters(models)(x), outputs, rtol=1e-12, atol=1e-14)
    heads = shared_trunk(networks(4))  # linear heads are such models of the trunk's output
    average = average_parameters(heads.networks())
    torch.testing.assert_close(average(pictures()), heads.each(pictures()).mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ours", [BatchNorm, nn.BatchNorm1d])
def test_averaged_weights_and_statistics_are_swa_utils(ours):
    """E23. AveragedModel and update_bn: the same parameters and statistics, from batches of unequal size too."""
    torch.manual_seed(0)
    network, twin = (
        nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)).double() for norm in (ours, nn.BatchNorm1d)
    )  # the twin, because update_bn passes over batch-norm layers that are not torch's own
    theirs, snapshots, kept = AveragedModel(twin), Snapshots(network, 4, "weights"), []
    batches = [draw(16, 6, seed=k) for k in range(3)] + [draw(5, 6, seed=9)]
    for step in range(4):
        network(batches[step % 3])  # statistics move as well
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        twin.load_state_dict(network.state_dict())
        theirs.update_parameters(twin)
        snapshots.take()
        kept.append(copy.deepcopy(network))
    update_bn(batches, theirs)
    mine, at_once = snapshots.networks()[0], average_parameters(kept)
    calls = []
    for average in (mine, at_once):
        assert reestimate(average, lambda: calls.append(1) or iter(batches))
    assert len(calls) == 2
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(at_once.state_dict()[name], value, rtol=1e-12, atol=1e-13)
    snapshots.eval()
    torch.testing.assert_close(snapshots(batches[3]), theirs.eval()(batches[3]), rtol=1e-12, atol=1e-13)
    assert mine[1].momentum == 0.1


def test_reestimation_keeps_modes_leaves_dropout_off_and_needs_no_data_without_batch_norm():
    network = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.9), BatchNorm(8)).double()
    network[0].eval()
    modes = [part.training for part in network.modules()]
    reestimate(network, lambda: [draw(50, 6)])
    assert [part.training for part in network.modules()] == modes
    torch.testing.assert_close(network[2].running_mean, network[0](draw(50, 6)).mean(0).detach())
    assert not reestimate(nn.Linear(2, 2), lambda: pytest.fail("asked for data"))


def test_snapshots_train_one_network_and_answer_with_those_taken():
    network, x = networks(1)[0], pictures()
    model = Snapshots(network, 3)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"live"}
    model.eval()
    assert torch.equal(model(x), network(x))  # before the first
    seen = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.3)
        seen.append(network(x).detach())
        model.take()
        torch.testing.assert_close(model(x), mean_log_probability(torch.stack(seen)), rtol=1e-13, atol=0)
    assert torch.equal(model.train()(x), network(x))
    with pytest.raises(ValueError, match="all 3 snapshots are taken"):
        model.take()


def test_moments_of_snapshots():
    """E23: only of a cyclic or a constant rate."""
    assert snapshot_moments("cyclic", 20, 4) == [4, 9, 14, 19]
    assert snapshot_moments("constant", 320, 10) == [175 + 16 * k for k in range(10)]  # the last ten sixteenths
    assert snapshot_moments("constant", 3, 3) == [0, 1, 2]
    with pytest.raises(UserError, match="snapshots of a one_cycle schedule would all be alike"):
        snapshot_moments("one_cycle", 20, 4)
    for schedule in ("cyclic", "constant"):
        with pytest.raises(UserError, match=r"--steps 7 has no room for 8 snapshots"):
            snapshot_moments(schedule, 7, 8)


# ---------------------------------------------------------------------------------------------- members, as in a run


@pytest.mark.parametrize("kind", ["seeds", "bagging"])
def test_a_member_inside_learns_as_it_does_alone(kind, tmp_path):
    """Bit for bit, with clipping and batch normalisation: streams, gradients, clipping and statistics are its own."""
    flags = {"normalizer": "batch", "clip_norm": 0.3, "optimizer": "adam", "evaluate_every": 7}
    done = etude.run("basics/mlp", **TINY, **flags, ensemble=kind, members=3, out=tmp_path / "run")
    inside = etude.load(done.folder).model
    data = images("digits")
    config = MLPConfig(widths=(32,), normalizer="batch")
    torch.manual_seed(fold(0, 0, 0, "init"))
    alone = [build_mlp(config, data.spec)["model"] for _ in range(3)]
    clipped = 0
    for member in (0, 2):
        network = alone[member].train()
        optimizer = optim.make("adam", network.parameters(), 1e-3)
        stream = Stream(len(data.train.y), 32, member_seed(0, member))
        drawn = bootstrap(len(data.train.y), 0, member) if kind == "bagging" else torch.arange(len(data.train.y))
        for step in range(30):
            index = drawn[stream.indices(step)]
            optimizer.zero_grad()
            F.cross_entropy(network(data.train.x[index]), data.train.y[index]).backward()
            clipped += float(clip_norm_(network.parameters(), 0.3)) > 0.3
            optimizer.step()
        for name, value in inside.members[member].state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), (member, name)
    assert clipped > 30
    assert not torch.equal(inside.members[0].layers[1].weight, inside.members[1].layers[1].weight)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("basics/mlp", "seeds"), ("basics/mlp", "heads"), ("basics/mlp", "snapshots"), ("vision/lenet", "heads")],
)
def test_one_member_is_the_single_run_exactly(name, kind, tmp_path):
    flags = {"steps": 6, "schedule": "constant", "clip_value": 0.01}
    single = etude.load(etude.run(name, **TINY, **flags, out=tmp_path / "single").folder).model
    done = etude.run(name, **TINY, **flags, ensemble=kind, members=1, out=tmp_path / "one")
    model = etude.load(done.folder).model
    (network,) = model.networks()
    for one, two in zip(network.parameters(), single.parameters(), strict=True):
        assert torch.equal(one, two)
    x = images("digits", 28 if name == "vision/lenet" else None).test.x[:50]
    assert torch.equal(model(x).argmax(1), single(x).argmax(1))
    losses = [[line.split('"test_loss"')[0] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
              for run in ("single", "one")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("flags", [
    {"ensemble": "snapshots", "combine": "weights", "normalizer": "batch"},
    {"ensemble": "snapshots", "schedule": "cyclic", "dropout": 0.3},
    {"ensemble": "bagging", "combine": "vote"},
    {"ensemble": "heads", "dropout": 0.3},
])  # fmt: skip
def test_killed_and_resumed_is_bit_exact(flags, tmp_path, monkeypatch):
    flags = {**TINY, **flags, "steps": 12, "members": 3, "evaluate_every": 4}
    whole = etude.run("basics/mlp", **flags, out=tmp_path / "whole")
    steps = Run.steps

    def dying(self, total):
        with contextlib.closing(steps(self, total)) as inner:
            for step in inner:
                if step == 9:  # behind the first snapshot, in the middle of the second cycle
                    raise SystemExit
                yield step

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", dying)
        with pytest.raises(SystemExit):
            etude.run("basics/mlp", **flags, save_every=3, out=tmp_path / "killed")
    resumed = etude.resume(tmp_path / "killed")
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()
    assert resumed.metrics == whole.metrics
    one, two = (etude.load(done.folder).model.state_dict() for done in (whole, resumed))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_statistics_of_one_image_more_than_fill_the_batches():
    """1,001 images: two batches of nearly one size, where a last batch of one image would have no variance."""
    split = images("digits").train
    run, data = (
        SimpleNamespace(device=torch.device("cpu")),
        SimpleNamespace(train=Split(split.x[:1001], split.y[:1001])),
    )
    parts = list(training_images(run, data))
    assert [len(part) for part in parts] == [501, 500]
    assert torch.equal(torch.cat(parts), split.x[:1001])
    assert [len(part) for part in training_images(run, data, 2000)] == [1001]


# --------------------------------------------------------------------------------------------------------- the method


def test_of_any_classifier_with_settings_in_words():
    config = Config(of="vision/lenet", settings=("style=1998", "learning-rate=0.01", "size=32"))
    module, of = classifier(config)
    assert (module.__name__, of.style, of.learning_rate, of.size, of.steps) == (
        "etude.vision.lenet",
        "1998",
        0.01,
        32,
        600,
    )
    assert classifier(Config(settings=("widths=[5,4]", "examples=none")))[1].widths == (5, 4)
    assert classifier(Config(settings=("steps=3",), data="mnist", examples=9))[1].data == "mnist"


@pytest.mark.parametrize(("flags", "said"), [
    ({"of": "games/cfr"}, "--of games/cfr learns no classifier of images"),
    ({"of": "gans/gan"}, "--of gans/gan learns no classifier of images"),
    ({"of": "lenett"}, "did you mean 'vision/lenet'"),
    ({"of_preset": "tinny"}, "basics/mlp has no preset 'tinny'; did you mean 'tiny'"),
    ({"settings": ("stesp=3",)}, "there is no 'stesp'; did you mean 'steps'"),
    ({"settings": ("steps",)}, "write name=value"),
    ({"settings": ("steps=0",)}, "--steps is 0; it must be a whole number at least 1"),
    ({"settings": ("members=3",)}, "there is no 'members'"),
    ({"ensemble": "snapshots", "settings": ("schedule=cosine",)}, "take --schedule cyclic"),
    ({"split": "layers.3"}, "it needs --ensemble heads"),
    ({"examples": 10_000}, "--examples 10000 is more than the 1,293 training images of digits"),
])  # fmt: skip
def test_settings_that_make_no_sense_for_the_method(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("basics/ensembles", **TINY, **flags, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_members_of_the_method_are_the_classifier_s_own_ensemble(tmp_path):
    """`basics/ensembles --of M` and `M --ensemble` train the same members, to the last bit."""
    flags = {"ensemble": "bagging", "members": 2, "examples": 100}
    ours = etude.run("basics/ensembles", **TINY, of="vision/lenet", settings=("steps=4",),
                     **flags, out=tmp_path / "a")  # fmt: skip
    theirs = etude.run("vision/lenet", **TINY, steps=4, **flags, out=tmp_path / "b")
    one, two = (etude.load(done.folder).model for done in (ours, theirs))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]
    data = subset(images("digits", 28), 100, 0)
    logits = answers(one.networks(), data.test.x, torch.device("cpu"))
    assert ours.metrics["test_nll"] == pytest.approx(worth(logits, data.test.y)["nll"][-1])
    assert ours.metrics["test_nll"] == pytest.approx(ours.metrics["test_loss"], rel=1e-5)
    assert {file.name for file in Path(ours.folder, "artifacts").iterdir()} >= {
        "members.png",
        "errors.png",
        "table.json",
    }


def test_build_needs_no_data():
    config = Config(ensemble="heads", members=4, split="layers.3", settings=("widths=[6,5]",))
    model = build(config, SPEC)["model"]
    assert (len(model), model(pictures(2).float()).shape) == (4, (2, 5))
    assert len({head[0].weight.sum().item() for head in model.members}) == 4  # every head starts on its own


def test_a_subset_is_drawn_by_the_seed_with_statistics_of_its_own():
    data = images("digits")
    one, again, other = (subset(data, 50, seed) for seed in (0, 0, 1))
    assert one.train.x.shape == (50, 1, 8, 8)
    assert torch.equal(one.train.x, again.train.x)
    assert not torch.equal(one.train.x, other.train.x)
    assert one.spec.mean[0] == pytest.approx(float(one.train.x.double().mean()) / 255, abs=2e-6)
    assert one.spec.mean != data.spec.mean
    assert torch.equal(one.test.x, data.test.x)
    every = {bytes(row.flatten().tolist()) for row in data.train.x}
    assert all(bytes(row.flatten().tolist()) in every for row in one.train.x)
    assert subset(data, None, 0) is data
