"""Our reverse-mode engine against torch.autograd, finite differences and the adjoint identity (E14)."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F

import etude
from etude import data as room
from etude.basics.backprop import engine
from etude.basics.backprop.engine import Node, backward, cross_entropy, fold, log_softmax, topological
from etude.basics.backprop.train import Config, backpropagate, build, example, forward
from etude.basics.parts.training_nulls import straight_through
from etude.core import randomness
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.data.batches import Stream


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ROWS = torch.tensor([1, 0, 1, 1])
OPERATIONS = {  # name: (ours, torch's, shapes of the operands)
    "add": (lambda a, b: a + b, torch.add, [(2, 3), (2, 3)]),
    "add_vector": (lambda a, b: a + b, torch.add, [(2, 3), (3,)]),
    "add_scalar": (lambda a, b: a + b, torch.add, [(), (2, 3)]),
    "subtract_column": (lambda a, b: a - b, torch.sub, [(2, 1), (4, 2, 3)]),
    "constants": (lambda a: 2 - 3 * a / 4 + 1, lambda a: 2 - 3 * a / 4 + 1, [(2, 3)]),
    "multiply_outer": (lambda a, b: a * b, torch.mul, [(2, 1), (1, 3)]),
    "divide": (lambda a, b: a / b**2, lambda a, b: a / b**2, [(2, 3), (3,)]),
    "reciprocal": (lambda a: 1 / a, lambda a: 1 / a, [(2, 3)]),
    "cube": (lambda a: a**3, lambda a: a**3, [(2, 3)]),
    "matmul": (lambda a, b: a @ b, torch.matmul, [(2, 3), (3, 4)]),
    "matmul_batch": (lambda a, b: a @ b, torch.matmul, [(5, 2, 3), (3, 4)]),
    "matmul_outer": (lambda a, b: a @ b, torch.matmul, [(5, 1, 2, 3), (4, 3, 2)]),
    "exp": (engine.exp, torch.exp, [(2, 3)]),
    "log": (lambda a: engine.log(a * a), lambda a: (a * a).log(), [(2, 3)]),
    "tanh": (engine.tanh, torch.tanh, [(2, 3)]),
    "relu": (engine.relu, torch.relu, [(2, 3)]),
    "sum": (engine.total, torch.sum, [(2, 3)]),
    "sum_axis": (lambda a: engine.total(a, 1), lambda a: a.sum(1), [(2, 3, 4)]),
    "sum_axes_kept": (lambda a: engine.total(a, (0, -1), True), lambda a: a.sum((0, -1), True), [(2, 3, 4)]),
    "mean": (engine.mean, torch.mean, [(2, 3)]),
    "mean_axis": (lambda a: engine.mean(a, -1), lambda a: a.mean(-1), [(2, 3)]),
    "reshape": (lambda a: engine.reshape(a, 3, -1), lambda a: a.reshape(3, -1), [(2, 6)]),
    "transpose": (engine.transpose, lambda a: a.mT, [(2, 3, 4)]),
    "concatenate": (
        lambda a, b: engine.concatenate([a, b, a], 1),
        lambda a, b: torch.cat([a, b, a], 1),
        [(2, 1), (2, 3)],
    ),
    "slice": (lambda a: a[:, 1:], lambda a: a[:, 1:], [(2, 3)]),
    "rows_twice": (lambda a: a[ROWS], lambda a: a[ROWS], [(2, 3)]),
    "pairs": (lambda a: a[ROWS, ROWS + 1], lambda a: a[ROWS, ROWS + 1], [(2, 3)]),
    "log_softmax": (log_softmax, lambda a: a.log_softmax(-1), [(2, 5)]),
    "cross_entropy": (lambda a: cross_entropy(a, ROWS), lambda a: F.cross_entropy(a, ROWS), [(4, 3)]),
}


class Wrapped(torch.autograd.Function):
    """Our engine as one torch function, so that `gradcheck` can hold it against finite differences."""

    @staticmethod
    def forward(ctx, operation, *operands):
        ctx.nodes = [Node(operand.detach()) for operand in operands]
        ctx.result = operation(*ctx.nodes)
        return ctx.result.value

    @staticmethod
    def backward(ctx, delta):
        backward(ctx.result, deltas=[delta])
        return None, *(node.grad for node in ctx.nodes)


# torch's forward mode compiles its own decompositions with torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    """Values and gradients as torch's, finite differences, and ⟨Jv, u⟩ = ⟨v, Jᵀu⟩ with Jv by forward mode."""
    ours, theirs, shapes = OPERATIONS[name]
    operands = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    expected = theirs(*operands)
    nodes = [Node(operand.detach()) for operand in operands]
    result = ours(*nodes)
    torch.testing.assert_close(result.value, expected.detach(), rtol=1e-14, atol=1e-14)
    u = normal(*expected.shape, seed=9)
    backward(result, deltas=[u])
    for node, gradient in zip(nodes, torch.autograd.grad(expected, operands, u)):
        assert node.grad.shape == gradient.shape
        torch.testing.assert_close(node.grad, gradient, rtol=1e-12, atol=1e-13)

    assert torch.autograd.gradcheck(Wrapped.apply, (ours, *operands))

    v = tuple(normal(*shape, seed=20 + i) for i, shape in enumerate(shapes))
    values = tuple(operand.detach() for operand in operands)
    _, jv = torch.func.jvp(lambda *x: ours(*map(Node, x)).value, values, v)
    adjoint = sum((a * node.grad).sum() for a, node in zip(v, nodes))
    torch.testing.assert_close((jv * u).sum(), adjoint, rtol=1e-12, atol=1e-12)


UNARY = [  # bounded, so that 30 in a row stay in range
    (engine.tanh, torch.tanh),
    (lambda a: engine.exp(engine.tanh(a)), lambda a: a.tanh().exp()),
    (lambda a: engine.log(a * a + 1), lambda a: (a * a + 1).log()),
    (engine.relu, torch.relu),
    (lambda a: a / (1 + a * a), lambda a: a / (1 + a * a)),
    (lambda a: engine.mean(a, -1, True), lambda a: a.mean(-1, True)),
    (lambda a: log_softmax(a) * 0.1, lambda a: a.log_softmax(-1) * 0.1),
]
BINARY = [
    (lambda a, b: a + b, lambda a, b: a + b),
    (lambda a, b: a * 0.5 - b, lambda a, b: a * 0.5 - b),
    (lambda a, b: engine.tanh(a * b), lambda a, b: (a * b).tanh()),
    (lambda a, b: a * engine.tanh(b), lambda a, b: a * b.tanh()),
]


def random_graph(seed):
    """Leaves of broadcastable shapes and up to 30 operations on any earlier values, in both engines."""
    stream = torch.Generator().manual_seed(seed)

    def pick(count):
        return int(torch.randint(count, (), generator=stream))

    shapes = [(2, 3), (3,), (1, 3), (2, 1), (), (4, 1, 1)]
    leaves = [normal(*shapes[pick(len(shapes))], seed=1000 * seed + i) for i in range(2 + pick(4))]
    ours, theirs = [Node(leaf) for leaf in leaves], [leaf.clone().requires_grad_() for leaf in leaves]
    starts = (list(ours), list(theirs))
    for _ in range(5 + pick(26)):
        i, j = pick(len(ours)), pick(len(ours))
        if pick(2):
            f, g = BINARY[pick(len(BINARY))]
            ours.append(f(ours[i], ours[j]))
            theirs.append(g(theirs[i], theirs[j]))
        elif ours[i].value.dim():
            f, g = UNARY[pick(len(UNARY))]
            ours.append(f(ours[i]))
            theirs.append(g(theirs[i]))
    heads = sorted({len(ours) - 1, *(pick(len(ours)) for _ in range(pick(3)))})
    return starts, [ours[i] for i in heads], [theirs[i] for i in heads]


@pytest.mark.parametrize("block", range(10))
def test_two_hundred_random_graphs_as_autograd(block):
    """Shared nodes, broadcasting, one to three heads (some of them made of others), float64."""
    shared = 0
    for seed in range(20 * block, 20 * block + 20):
        (nodes, leaves), heads, expected = random_graph(seed)
        deltas = [normal(*head.shape, seed=seed + 7 + i) for i, head in enumerate(expected)]
        order = backward(*heads, deltas=deltas)
        gradients = torch.autograd.grad(expected, leaves, deltas, allow_unused=True)
        for node, gradient in zip(nodes, gradients):
            if node not in order:
                assert node.grad is None
                assert gradient is None
                continue
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(node.grad, gradient, rtol=1e-12, atol=1e-12 * scale)
        uses = [operand for node in order for operand, _ in node.edges]
        shared += len(uses) > len(set(uses))
    assert shared >= 15  # nearly all of these graphs use a value twice


def test_the_jacobian_is_transposed():
    """E14: with z = A x the notes' (dz/dx) δ = A δ has not even the shape of x; the gradient is Aᵀ δ."""
    a, x, delta = normal(2, 3), Node(normal(3, 1, seed=1)), normal(2, 1, seed=2)
    backward(a @ x, deltas=[delta])
    torch.testing.assert_close(x.grad, a.T @ delta)
    square, y = normal(3, 3, seed=3), Node(normal(3, 1, seed=1))
    backward(square @ y, deltas=[y.value])
    assert (y.grad - square @ y.value).abs().max() > 0.1


def test_fan_out_and_shared_weights_sum():
    """E14: a weight used at every step of a recurrence gets the sum of what each use sends back."""
    w, h0 = normal(3, 3), normal(1, 3, seed=1)
    shared, copies = Node(w), [Node(w) for _ in range(4)]
    for weights in ([shared] * 4, copies):
        h = h0
        for weight in weights:
            h = engine.tanh(h @ weight)
        backward(engine.total(h))
    torch.testing.assert_close(shared.grad, sum(copy.grad for copy in copies), rtol=1e-13, atol=1e-14)
    assert all(copy.grad.abs().max() > 0 for copy in copies)


def test_every_value_waits_for_all_its_uses():
    """2⁶⁰ paths lead from the leaf to the head: each Node is visited once and its gradient is exact."""
    x = y = Node(torch.tensor(1.0, dtype=torch.float64))
    for _ in range(60):
        y = y + y
    order = backward(y)
    assert len(order) == 61
    assert x.grad.item() == 2.0**60
    late = Node(
        torch.tensor(3.0)
    )  # used by the head itself and by a long chain: the order of the stack must not matter
    chain = late * 2
    for head in (chain * chain + late, late + chain * chain, late * 1 + chain * chain):
        backward(head)
        assert late.grad.item() == 25.0


def test_topological_order():
    _, heads, _ = random_graph(3)
    order = topological(heads)
    place = {node: i for i, node in enumerate(order)}
    assert len(place) == len(order)
    assert all(place[operand] < place[node] for node in order for operand, _ in node.edges)
    assert len(topological([*heads, *heads])) == len(order)


def test_several_heads_add_up():
    def graph():
        x = Node(normal(3))
        body = engine.tanh(x * 2)
        return x, body, engine.total(body * body), engine.mean(body)

    x, _, one, two = graph()
    backward(one, two)
    both = x.grad.clone()
    backward(one)
    first = x.grad.clone()
    backward(two)  # starts anew: nothing is left of the call before
    torch.testing.assert_close(first + x.grad, both)
    x, body, one, _ = graph()
    backward(one, body, deltas=[torch.tensor(1.0).double(), normal(3, seed=5)])  # one head is made of the other
    torch.testing.assert_close(x.grad - first, normal(3, seed=5) * 2 * (1 - body.value**2))
    backward(one, one)
    torch.testing.assert_close(x.grad, 2 * first)


def test_five_thousand_operations_deep():
    """Ten times deeper than Python's recursion limit, freed again without overflowing the stack."""
    x = y = Node(torch.tensor(0.3, dtype=torch.float64))
    depth = max(5000, 10 * sys.getrecursionlimit())
    for _ in range(depth):
        y = y * 0.9999
    backward(y)
    assert x.grad.item() == pytest.approx(0.9999**depth, rel=1e-9)
    del y


def test_constants_get_no_gradient_and_stand_on_either_side():
    c, n = normal(2, 2), Node(normal(2, 2, seed=1))
    for result, expected in (
        (c + n, c + n.value),
        (c - n, c - n.value),
        (c * n, c * n.value),
        (c / n, c / n.value),
        (c @ n, c @ n.value),
        (n @ c, n.value @ c),
    ):
        assert isinstance(result, Node)
        torch.testing.assert_close(result.value, expected)
        assert all(isinstance(operand, Node) for operand, _ in result.edges)
    assert n.grad is None
    assert len((c + n).edges) == 1


def test_fold_is_the_transpose_of_broadcasting():
    for shape, full in (
        ((3,), (2, 3)),
        ((2, 1), (2, 3)),
        ((1, 1), (4, 2, 3)),
        ((), (2, 3)),
        ((2, 3), (2, 3)),
        ((1,), (1,)),
    ):
        small, delta = normal(*shape), normal(*full, seed=1)
        folded = fold(delta, small)
        assert folded.shape == shape
        torch.testing.assert_close((small.expand(full) * delta).sum(), (small * folded).sum())


def test_cross_entropy_does_not_overflow():
    logits = Node(torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], dtype=torch.float64))
    loss = cross_entropy(logits, torch.tensor([1, 1]))
    assert loss.value.item() == pytest.approx(500)
    backward(loss)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5], [0.0, 0.0]]).double())


def test_relu_has_derivative_zero_at_zero():
    x = Node(torch.tensor([-1.0, 0.0, 2.0]))
    backward(engine.total(engine.relu(x)))
    assert x.grad.tolist() == [0.0, 0.0, 1.0]
    zero = Node(torch.zeros(2))
    backward(engine.total(zero**0))
    assert zero.grad.tolist() == [0.0, 0.0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="not a scalar"):
        backward(Node(torch.ones(2)))
    with pytest.raises(ValueError, match="takes matrices"):
        engine.matmul(Node(torch.ones(2)), torch.ones(2, 2))
    with pytest.raises(ValueError):
        backward(Node(torch.ones(2)), Node(torch.ones(2)), deltas=[torch.ones(2)])


def test_network_gradients_as_autograd():
    """The MLP of basics/mlp in float64: logits, loss and every parameter's gradient."""
    spec = Spec(shape=(1, 4, 4), classes=tuple("abcd"), mean=(0.4,), std=(0.3,))
    torch.manual_seed(0)
    model = build(Config(widths=(8, 6)), spec)["model"].double()
    x, y = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 3])
    nodes = {parameter: Node(parameter.detach()) for parameter in model.parameters()}
    torch.testing.assert_close(forward(model, nodes, x).value, model(x).detach(), rtol=1e-13, atol=1e-13)
    loss = F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(backpropagate(model, x, y), loss.detach(), rtol=1e-13, atol=0)
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_drawn_example():
    """dL/dx of the pictured graph by hand."""
    loss, order = example()
    value = {node.name: node.value for node in order}
    h = torch.tanh(value["w"] * value["x"] + value["b"])
    assert loss.value.item() == pytest.approx(((h + value["v"] * h) ** 2).item(), rel=1e-14)
    slope = 2 * h * (1 + value["v"]) ** 2 * (1 - h**2)
    gradients = {node.name: node.grad.item() for node in order}
    assert gradients["w"] == pytest.approx((slope * value["x"]).item(), rel=1e-12)
    assert gradients["b"] == pytest.approx(slope.item(), rel=1e-12)
    assert gradients["tanh"] == pytest.approx((2 * h * (1 + value["v"]) ** 2).item(), rel=1e-12)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SMALL = {"widths": (7, 5), "steps": 6, "batch": 20, "compare": 4, "evaluate_every": 2}
TORCHS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def score(model, split):
    with torch.no_grad():
        logits = model(split.x)
    return F.cross_entropy(logits, split.y).item(), (logits.argmax(1) == split.y).double().mean().item()


@pytest.mark.parametrize(
    ("optimizer", "extra"),
    [
        ("adam", {}),
        ("sgd", {"learning_rate": 0.1, "widths": (), "batch": 700}),
        ("momentum", {"learning_rate": 0.02, "compare": 0, "evaluate_every": 0}),
        ("adamw", {"learning_rate": 0.01, "compare": 50}),
    ],
)
def test_loop_equals_a_plain_one(optimizer, extra, tmp_path, double):
    """autograd and torch.optim on the same batches, in float64: both networks, every logged number, the test scores."""
    flags = SMALL | {"optimizer": optimizer} | extra
    done = etude.run("basics/backprop", out=tmp_path / "run", quiet=True, seed=3, **flags)
    data = room.images("digits")
    torch.manual_seed(randomness.fold(3, 0, 0, "init"))
    model = build(Config(**flags), data.spec)["model"]
    sizes = [64, *flags["widths"], 10]
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == list(zip(sizes[1:], sizes))
    stream, rule = Stream(len(data.train), flags["batch"], 3), TORCHS[optimizer](model.parameters())
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    compared, twin = min(flags["compare"], 6), copy.deepcopy(model)
    for step, row in enumerate(rows):
        index = stream.indices(step)
        loss = F.cross_entropy(model(data.train.x[index]), data.train.y[index])
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert ("autograd_loss" in row) == (step < compared)
        if step < compared:
            assert row["autograd_loss"] == pytest.approx(loss.item(), rel=1e-10)
        rule.zero_grad()
        loss.backward()
        rule.step()
        if step == compared - 1:
            twin = copy.deepcopy(model)
        every = flags["evaluate_every"]
        assert ("validation_accuracy" in row) == (step == 5 or (bool(every) and step % every == every - 1))
        if "validation_accuracy" in row:
            assert (row["validation_loss"], row["validation_accuracy"]) == pytest.approx(score(model, data.validation))
    assert len(rows) == 6
    got = etude.load(done.folder)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got.model.state_dict()[name], parameter.detach(), rtol=1e-9, atol=1e-12)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(got.state["twin"][name], parameter.detach(), rtol=1e-9, atol=1e-12)
    assert (done.metrics["test_loss"], done.metrics["test_accuracy"]) == pytest.approx(score(model, data.test))
    assert ("largest_difference" in done.metrics) == (compared > 0)


def test_reported_numbers_are_those_of_the_kept_network_and_the_two_curves(tmp_path):
    done = etude.run(
        "basics/backprop", out=tmp_path / "run", quiet=True, seed=3, **SMALL | {"steps": 40, "compare": 40}
    )
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    apart = [abs(row["loss"] - row["autograd_loss"]) for row in rows]
    assert done.metrics["largest_difference"] == pytest.approx(max(apart), rel=1e-3)
    assert max(apart) < 1e-5
    got = score(etude.load(done.folder).model, room.images("digits").test)
    assert (done.metrics["test_loss"], done.metrics["test_accuracy"]) == pytest.approx(got, rel=1e-5)


def test_a_gradient_that_is_wrong_shows_as_a_difference(tmp_path, monkeypatch):
    """What the largest difference is for: a ReLU without its Jacobian (the control of the experiments)."""
    monkeypatch.setattr("etude.basics.backprop.train.relu", straight_through)
    done = etude.run("basics/backprop", out=tmp_path / "run", quiet=True, seed=3, **SMALL)
    assert done.metrics["largest_difference"] > 1e-3


def test_newton_is_refused(tmp_path):
    with pytest.raises(UserError, match="newton needs second derivatives"):
        etude.run("basics/backprop", out=tmp_path / "run", quiet=True, optimizer="newton")
    assert not (tmp_path / "run").exists()
