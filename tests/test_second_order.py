"""Second derivatives against finite differences of plain NumPy, and refusals where there are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, UnsupportedError, asap, sinkhorn_attention, sparse, transport_plan
from ot_attention.certificates import contraction, posterior_bias

pytestmark = pytest.mark.usefixtures("float64")

ROWS, COLUMNS, WIDTH, BAND = 9, 7, 3, 4
STEP = 0.02  # of finite differences of sixth order
_RNG = np.random.default_rng(0)
_SHAPES = {"q": (ROWS, WIDTH), "k": (COLUMNS, WIDTH), "v": (COLUMNS, 2), "score": (1,)}
POINT = {name: _RNG.normal(size=shape) for name, shape in _SHAPES.items()}
DIRECTION = {name: _RNG.normal(size=shape) for name, shape in _SHAPES.items()}
WEIGHTS = _RNG.normal(size=(ROWS, 2)), _RNG.normal(size=(ROWS, COLUMNS))


def spec_of(dustbin="full", gradient="implicit", **changes) -> SinkhornSpec:
    settings = {"base_steps": 150, "cg_steps": 20} if gradient == "implicit" else {"base_steps": 4}
    return SinkhornSpec(**{"band": BAND, "dustbin": dustbin, "gradient": gradient} | settings | changes)


def loss_of(out, log_sums):
    """Combine output and sums of potentials f_i + g_j, which have no gauge."""
    return (WEIGHTS[0] * out**2).sum() + 0.1 * (WEIGHTS[1] * log_sums**2).sum()


def attention_loss(x, spec: SinkhornSpec, implementation):
    q, k, v = (jnp.asarray(x[name])[None, :, None] for name in "qkv")
    score = None if spec.dustbin == "none" else x["score"]
    out, info = sinkhorn_attention(q, k, v, spec, dustbin_score=score, implementation=implementation)
    f, g = info.f[0, 0, :ROWS], info.g[0, 0, :COLUMNS]
    return loss_of(out[0, :, 0], f[:, None] + g)


def iterate(x, dustbin: str, steps: int, g=None):
    """Return f, g and the scores, by plain steps from g."""
    scores = np.zeros((ROWS + 1, COLUMNS + 1)) + (-np.inf if dustbin == "none" else x["score"])
    scores[-1, -1] = 0
    scores[:-1, :-1] = x["q"] @ x["k"].T / np.sqrt(WIDTH)
    i, j = np.arange(ROWS)[:, None], np.arange(COLUMNS)
    scores[:-1, :-1][np.abs(j - ((i + 0.5) * COLUMNS / ROWS - 0.5)) > BAND] = -np.inf
    a, b = np.ones(ROWS + 1), np.ones(COLUMNS + 1)
    a[-1], b[-1] = {"none": (1, 1), "unit": (1, 1 + ROWS - COLUMNS), "full": (COLUMNS, ROWS)}[dustbin]
    if dustbin == "none":
        b[:-1] = ROWS / COLUMNS
    g = np.zeros(COLUMNS + 1) if g is None else g
    for _ in range(steps):
        f = np.log(a) - np.logaddexp.reduce(scores + g, axis=1)
        g = np.log(b) - np.logaddexp.reduce(scores + f[:, None], axis=0)
    return f, g, scores


def curvature(spec: SinkhornSpec) -> float:
    """Compute the second derivative along DIRECTION: of the tail with base potentials that do not move."""
    start = iterate(POINT, spec.dustbin, spec.base_steps)[1] if spec.gradient == "tail" else None
    steps = {"tail": spec.tail_steps, "unrolled": spec.all_steps, "implicit": 1000}[spec.gradient]

    def loss(t: float):
        x = {name: POINT[name] + t * DIRECTION[name] for name in POINT}
        f, g, scores = iterate(x, spec.dustbin, steps, start)
        plan = np.exp(scores + f[:, None] + g)[:-1, :-1]
        return loss_of(plan @ x["v"], f[:-1, None] + g[:-1])

    near = [2 * loss(0.0)] + [loss(n * STEP) + loss(-n * STEP) for n in (1, 2, 3)]
    return float(np.dot(near, [-49 / 36, 3 / 2, -3 / 20, 1 / 90])) / STEP**2


def both_ways(loss, point, direction) -> list[float]:
    """Return the second derivative along a direction by forward over reverse mode, and by reverse over reverse."""

    def inner(x, y):
        return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))

    @jax.jit
    def run(x, u):
        gradient = jax.grad(loss)
        forward = jax.jvp(gradient, (x,), (u,))[1]
        return inner(forward, u), inner(jax.grad(lambda x: inner(gradient(x), u))(x), u)

    return [float(x) for x in run(*jax.tree.map(jnp.asarray, (point, direction)))]


CASES = [
    ("full", "tail", "sinkhorn"),
    ("none", "tail", "sinkhorn"),
    ("none", "implicit", "sinkhorn"),
    ("unit", "implicit", "sinkhorn"),
    ("full", "implicit", "newton"),
]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        *(("xla", case) for case in CASES),
        *(pytest.param("reference", case, marks=pytest.mark.slow) for case in CASES),
        ("reference", ("full", "unrolled", "sinkhorn")),
    ],
    ids=str,
)
def test_second_derivatives_are_those_of_plain_iteration(implementation, case):
    """Compare along a direction in q, k, v and the dustbin score at once, through output and potentials."""
    dustbin, gradient, solver = case
    spec = spec_of(dustbin, gradient, solver=solver, **({"base_steps": 20} if solver == "newton" else {}))
    loss = functools.partial(attention_loss, spec=spec, implementation=implementation)
    np.testing.assert_allclose(both_ways(loss, POINT, DIRECTION), curvature(spec), rtol=2e-6)


def test_the_tail_after_newton_steps_and_blocks_of_a_band_have_second_derivatives_too():
    """Compare "xla" with the dense reference, which needs no rules of its own for a tail."""
    rng = np.random.default_rng(0)
    point, direction = ([rng.normal(size=(1, 200, 1, 2)) for _ in range(3)] for _ in range(2))
    spec = SinkhornSpec(band=4, base_steps=2, tail_steps=1, solver="newton", newton_steps=1, cg_steps=3)

    def loss(x, implementation):
        out, info = sinkhorn_attention(*x, spec, implementation=implementation)
        return (out**3).sum() + (jnp.sin(jnp.arange(200)) * info.g**2).sum()

    found, expected = (
        both_ways(functools.partial(loss, implementation=name), point, direction) for name in ("xla", "reference")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_hessian_of_a_plan_is_that_of_plain_iteration():
    spec = spec_of(cg_steps=40)  # more steps than unknowns

    def loss(q):
        plan = transport_plan(
            q[None, :, None], jnp.asarray(POINT["k"])[None, :, None], spec, dustbin_score=jnp.zeros(1)
        )
        return (WEIGHTS[1] * plan[0, 0, :-1, :-1] ** 2).sum()

    def plain(q):
        f, g, scores = iterate(POINT | {"q": q, "score": np.zeros(1)}, "full", 1000)
        return (WEIGHTS[1] * np.exp(scores + f[:, None] + g)[:-1, :-1] ** 2).sum()

    u, e = DIRECTION["q"], 1e-3
    expected = (plain(POINT["q"] + e * u) - 2 * plain(POINT["q"]) + plain(POINT["q"] - e * u)) / e**2
    hessian = np.asarray(jax.jit(jax.hessian(loss))(jnp.asarray(POINT["q"]))).reshape(u.size, u.size)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)
    assert u.ravel() @ hessian @ u.ravel() == pytest.approx(expected, rel=1e-4)


KERNELS = ["pallas_gpu", "pallas_tpu"]


@pytest.mark.usefixtures("kernels_are_interpreted")
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_refuse_second_derivatives_by_name(implementation):
    spec = spec_of(gradient="tail", base_steps=1, tail_steps=1)
    loss = functools.partial(attention_loss, spec=spec, implementation=implementation)
    x, u = (jax.tree.map(jnp.asarray, y) for y in (POINT, DIRECTION))
    message = f"{implementation}.*first derivatives only; use implementation='xla'"
    ways = [
        lambda: jax.jvp(jax.grad(loss), (x,), (u,)),
        lambda: jax.jvp(jax.jit(jax.grad(loss)), (x,), (u,)),
        lambda: jax.grad(lambda x: jax.grad(loss)(x)["q"].sum())(x),
        # Only what comes back through the output depends on the scale.
        lambda: jax.jvp(lambda scale: jax.grad(lambda x: scale * loss(x))(x)["q"], (1.0,), (1.0,)),
    ]
    for way in ways:
        with pytest.raises(UnsupportedError, match=message):
            jax.eval_shape(way)


@pytest.mark.usefixtures("kernels_are_interpreted")
@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_forward_mode_of_the_attention_itself_is_refused(implementation):
    spec = spec_of(gradient="tail", base_steps=1, tail_steps=1)
    loss = functools.partial(attention_loss, spec=spec, implementation=implementation)
    x, u = (jax.tree.map(jnp.asarray, y) for y in (POINT, DIRECTION))
    ways = [
        lambda: jax.jit(lambda x, u: jax.jvp(loss, (x,), (u,)))(x, u),
        lambda: jax.jacfwd(jax.jit(loss))(x),
        lambda: jax.linearize(jax.jit(loss), x)[1](u),
    ]
    for way in ways if implementation == "xla" else ways[:1]:
        with pytest.raises(UnsupportedError, match=f"{implementation}.*forward mode.*reverse mode"):
            way()


@pytest.mark.parametrize("gradient", ["tail", "implicit"])
def test_forward_mode_of_the_reference_is_that_of_reverse_mode(gradient):
    loss = functools.partial(attention_loss, spec=spec_of(gradient=gradient), implementation="reference")
    x, u = (jax.tree.map(jnp.asarray, y) for y in (POINT, DIRECTION))
    slope = jax.jit(lambda x, u: jax.jvp(loss, (x,), (u,))[1])(x, u)
    gradient = jax.jit(jax.grad(loss))(x)
    assert float(slope) == pytest.approx(sum(float(jnp.vdot(gradient[name], u[name])) for name in x), rel=1e-9)


@pytest.mark.parametrize("gradient", ["tail", pytest.param("implicit", marks=pytest.mark.slow)])
def test_transformations_around_either_derivative_change_nothing(gradient):
    """Gradients under checkpoint, scan and vmap, whose rewriting must meet no refusal, and second ones over them."""
    loss = functools.partial(attention_loss, spec=spec_of(gradient=gradient, cg_steps=5), implementation="xla")
    x, u = (jax.tree.map(jnp.asarray, y) for y in (POINT, DIRECTION))

    def in_loop(x):
        return jax.lax.scan(
            lambda total, scale: (total + scale * jax.checkpoint(loss)(x), None), 0.0, jnp.array([1.0, 2])
        )[0]

    @jax.jit
    def run(x, u):
        plain = jax.jvp(jax.grad(loss), (x,), (u,))
        both = jax.tree.map(lambda x: jnp.stack([x, x]), (x, u))
        mapped = jax.vmap(lambda x, u: jax.jvp(jax.grad(loss), (x,), (u,)))(*both)
        return plain, jax.tree.map(lambda x: x[1], mapped), jax.jvp(jax.grad(in_loop), (x,), (u,))

    plain, mapped, looped = run(x, u)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), mapped, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-8, atol=1e-11), looped, plain)


def test_rules_of_second_derivatives_are_not_traced_into_a_gradient():
    """Count the products of a tail's gradient, those for large potentials included."""
    x = jnp.zeros((1, 9, 1, 3))

    def loss(q):
        spec = spec_of(gradient="tail")
        return sinkhorn_attention(q, x, x, spec, dustbin_score=jnp.zeros(1), implementation="xla")[0].sum()

    forward, both = (str(jax.make_jaxpr(f)(x)).count("dot_general") for f in (loss, jax.grad(loss)))
    # Backward: scores, dV, four for two tail steps, the field, dQ and dK. For large potentials: scaling, output, dV,
    # the field, for each tail step four and a field for each half; dQ and dK.
    assert both - forward <= 9 + 4 + 2 * (4 + 2) + 2


def test_asap_and_sparse_attention_have_second_derivatives():
    rng = np.random.default_rng(0)
    q, k, v, u = (jnp.asarray(rng.normal(size=(1, 12, 1, 3))) for _ in range(4))
    one_sided = asap.Asap.create(jnp.asarray(rng.normal(size=(1, 2, 3))), ("squares", "mass"), two_sided=False)
    layer = asap.Asap(
        one_sided.directions, jnp.asarray(rng.normal(size=one_sided.weights.shape)) / 5, one_sided.features
    )
    blocks = sparse.SparseSpec(block=4, steps=3)

    def with_asap(q):
        out, info = asap.apply(layer, q, k, v, SinkhornSpec(band=5, dustbin="full"), dustbin_score=jnp.zeros(1))
        return (out**2).sum() + (info.f**2).sum() / 10

    def with_blocks(q):
        scores = jnp.einsum("bihd,bjhd->bhij", q[:, ::4], k[:, ::4])
        return (sparse.sparse_sinkhorn_attention(q, k, v, scores, blocks) ** 2).sum()

    for loss in (with_asap, with_blocks):
        gradient, e = jax.jit(jax.grad(loss)), 1e-4
        expected = jnp.vdot(gradient(q + e * u) - gradient(q - e * u), u) / (2 * e)
        np.testing.assert_allclose(both_ways(loss, q, u), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "bound", [contraction, lambda *x: posterior_bias(*x).plan], ids=["contraction", "posterior_bias"]
)
def test_certificates_refuse_derivatives_but_not_to_be_reported(bound):
    q = jnp.asarray(POINT["q"])[None, :, None]
    spec = SinkhornSpec(band=None, base_steps=3)

    def loss(q):
        return (q**2).sum(), bound(q, q, spec)

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(q)
    np.testing.assert_allclose(gradient, 2 * q)
    np.testing.assert_allclose(found, bound(q, q, spec))
    of_bound = lambda q: bound(q, q, spec).sum()  # noqa: E731
    for way in (jax.grad(of_bound), lambda q: jax.jvp(of_bound, (q,), (q,)), jax.jit(jax.grad(of_bound))):
        with pytest.raises(UnsupportedError, match="certificates have no derivatives"):
            way(q)
