"""Vicinity attention: linear in the number of tokens and local in two dimensions.

The functions are pure and take `query`, `key` and `value` of shape
`[batch, height, width, heads, dim]`. With φ = ReLU, the weight of token j for token i is

    S_ij = ⟨φ(q_i), φ(k_j)⟩ · w_ij,        out_i = Σ_j S_ij v_j / (Σ_j S_ij + 1e-4)

where w_ij, the locality, decreases with the distance between the two tokens on the grid. Each
locality is a sum of products of a position feature of i and one of j (cos(a−b) = cos a cos b +
sin a sin b), so Σ_j φ(k_j) p_m(j) v_jᵀ is computed once for all i, and the cost is O(N·dim²)
instead of O(N²·dim).

Source: Sun et al., "Vicinity Vision Transformer", arXiv 2206.10552.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vvt_jax.models import forms

LOCALITIES = ("sum", "product", "1d", "none")
_EPSILON = 1e-4  # added to the denominator, which is 0 for a query that matches no key
_SMALLEST, _LARGEST = 1e-4, 1e4  # the range of magnitudes that the published clamp leaves unchanged


@jax.custom_vjp
def clamp_magnitude(x: jax.Array) -> jax.Array:
    """Clamp |x| to [1e-4, 1e4], keeping the sign, as published; zero stays zero.

    Works on arrays of any shape. The gradient is zero wherever the clamp changes the value.
    """
    return jnp.sign(x) * jnp.clip(jnp.abs(x), _SMALLEST, _LARGEST)


def _clamp_forward(x):
    return clamp_magnitude(x), x


def _clamp_backward(x, cotangent):
    inside = (jnp.abs(x) >= _SMALLEST) & (jnp.abs(x) <= _LARGEST)
    return (jnp.where(inside, cotangent, 0),)


clamp_magnitude.defvjp(_clamp_forward, _clamp_backward)  # saves only x


def check_locality(locality: str) -> None:
    """Raise ValueError unless `locality` is one of `LOCALITIES`."""
    if locality not in LOCALITIES:
        raise ValueError(f"Unknown locality '{locality}': it is one of {', '.join(LOCALITIES)}.")


def vicinity_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    locality: str = "sum",
    clamp: bool = True,
    form: str | None = None,
) -> jax.Array:
    """Compute linear attention with 2D locality.

    ReLU is applied to query and key inside this function. With a = π/2 · row/height and
    b = π/2 · column/width, the locality w_ij is

    - `"sum"`: cos(a_i − a_j) + cos(b_i − b_j), as published;
    - `"product"`: the product of the two cosines;
    - `"1d"`: cos(π/2 · (n_i − n_j)/N), where n is the flattened index;
    - `"none"`: 1.

    Sums over tokens, the numerator and the denominator are float32, whatever the dtype of the
    inputs.

    Args:
        query: the queries, `[batch, height, width, heads, dim]`.
        key: the keys, of the same shape as `query`.
        value: the values, `[batch, height, width, heads, value_dim]`.
        locality: one of `LOCALITIES`.
        clamp: whether to apply the published clamps (see `clamp_magnitude`), which the published
            weights need.
        form: `"concatenated"` or `"separable"`, which agree up to rounding. By default,
            `vvt_jax.models.forms` chooses.

    Returns:
        `[batch, height, width, heads, value_dim]` in the dtype of `value`.

    Raises:
        ValueError: if the shapes do not match, or the locality or form is unknown.
    """
    _check_shapes(query, key, value)
    check_locality(locality)
    form = form or forms.current().attention
    if form not in forms.ATTENTION:
        raise ValueError(f"Unknown form '{form}': it is one of {', '.join(forms.ATTENTION)}.")
    attend = _attend_concatenated if form == "concatenated" else _attend_separable
    query, key = jax.nn.relu(query), jax.nn.relu(key)
    keep = clamp_magnitude if clamp else lambda x: x
    numerator, denominator = attend(query, key, value, locality, keep)
    scale = keep(1.0 / (denominator + _EPSILON))
    return keep(keep(numerator) * scale[..., None]).astype(value.dtype).reshape(value.shape)


def vicinity_attention_quadratic(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    locality: str = "sum",
    return_weights: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute vicinity attention from its definition, for tests and figures.

    Every weight is computed explicitly, in O(N²) and in float32. The arguments and errors are those
    of `vicinity_attention`, which returns the same result with `clamp=False`.

    Returns:
        `[batch, height, width, heads, value_dim]` in the dtype of `value`. With `return_weights`,
        also the weights `[batch, heads, n, n]` in float32, where n = height·width and row i holds
        the weights of query i.
    """
    _check_shapes(query, key, value)
    check_locality(locality)
    batch, height, width, heads, _ = query.shape
    q, k, v = (
        x.astype(jnp.float32).reshape(batch, height * width, heads, x.shape[-1])
        for x in (jax.nn.relu(query), jax.nn.relu(key), value)
    )
    similarity = jnp.einsum("binc,bjnc->bnij", q, k) * locality_weights(locality, height, width)
    weights = similarity / (similarity.sum(-1, keepdims=True) + _EPSILON)
    out = jnp.einsum("bnij,bjnc->binc", weights, v).reshape(value.shape).astype(value.dtype)
    return (out, weights) if return_weights else out


def softmax_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute scaled dot-product attention over all tokens of the grid, the published ablation.

    The cost is O(N²). Shapes and errors are those of `vicinity_attention`; the softmax is computed
    in float32.
    """
    _check_shapes(query, key, value)
    flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key, value))
    return jax.nn.dot_product_attention(*flat).reshape(value.shape)


def locality_weights(locality: str, height: int, width: int) -> np.ndarray:
    """Return the locality w_ij of every pair of tokens by its definition: `[n, n]`, float32."""
    rows, columns = np.divmod(np.arange(height * width), width)

    def cosine_of_distance(position, extent):
        return np.cos(np.pi / 2 * (position[:, None] - position[None, :]) / extent)

    by_row, by_column = cosine_of_distance(rows, height), cosine_of_distance(columns, width)
    weights = {
        "sum": by_row + by_column,
        "product": by_row * by_column,
        "1d": cosine_of_distance(np.arange(height * width), height * width),
        "none": np.ones((height * width, height * width)),
    }
    return weights[locality].astype(np.float32)


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    fits = query.ndim == 5 and query.shape == key.shape and value.shape[:-1] == query.shape[:-1]
    if not fits:
        raise ValueError(
            "query, key and value must be [batch, height, width, heads, dim] with the same grid "
            f"and heads, but are {query.shape}, {key.shape} and {value.shape}."
        )


# A position feature p_m of a token factorises over its row and column. A factor describes a group
# of features as p_m(row, column) = Σ_j mix[m, outer, j] · along[inner, j], where the outer axis is
# the rows, or the columns if `by_column` is set. `along=None` stands for a single 1.
@dataclasses.dataclass(frozen=True)
class _Factor:
    mix: Any  # [features, outer, j], a NumPy or JAX array
    along: Any | None  # [inner, j]
    by_column: bool = False


def _of_grid(make: Callable) -> Callable:
    """Decorate `make(xp, locality, height, width)` to pass the NumPy that suits the grid as `xp`.

    If the size of the grid is known, NumPy makes the arrays, and they are cached. In an export with
    symbolic sizes it is known only when the program runs, so jax.numpy makes the arrays within the
    program.
    """
    once = functools.cache(functools.partial(make, np))

    @functools.wraps(make)
    def of_grid(locality: str, height: Any, width: Any):
        if isinstance(height, int) and isinstance(width, int):
            return once(locality, height, width)
        return make(jnp, locality, height, width)

    return of_grid


@_of_grid
def _factors(xp, locality, height, width) -> tuple[_Factor, ...]:
    """Return a grid's position features p, where Σ_m p_m(i) p_m(j) = w_ij, as factors."""
    a, b = np.pi / 2 * xp.arange(height) / height, np.pi / 2 * xp.arange(width) / width
    by_row = xp.stack([xp.cos(a), xp.sin(a)])  # [2, height]
    by_column = xp.stack([xp.cos(b), xp.sin(b)])  # [2, width]
    if locality == "sum":
        return (
            _Factor(by_row[..., None], None),
            _Factor(by_column[..., None], None, by_column=True),
        )
    if locality == "product":  # features (cos a, sin a) × (cos b, sin b)
        mix = xp.einsum("ih,jk->ijhk", by_row, np.eye(2)).reshape(4, height, 2)
        return (_Factor(mix, by_column.T),)
    if locality == "1d":  # the angle of n = row·width + column is a + b/height
        b = b / height
        mix = xp.stack(
            [xp.stack([xp.cos(a), -xp.sin(a)], -1), xp.stack([xp.sin(a), xp.cos(a)], -1)]
        )
        return (_Factor(mix, xp.stack([xp.cos(b), xp.sin(b)], -1)),)
    return (_Factor(xp.ones((1, height, 1)), None),)


def feature_count(locality: str) -> int:
    """Return how many position features a locality has.

    The concatenated form makes query and key wider by this factor.
    """
    return sum(len(factor.mix) for factor in _factors(locality, 1, 1))


@_of_grid
def _position_features(xp, locality, height, width):
    """Return the position features in full: `[height, width, features]`, float32."""
    features = []
    for factor in _factors(locality, height, width):
        inner = height if factor.by_column else width
        along = xp.ones((inner, 1)) if factor.along is None else factor.along
        p = xp.einsum("moj,ij->oim", factor.mix, along)
        features.append(p.swapaxes(0, 1) if factor.by_column else p)
    return xp.concatenate(features, -1).astype(np.float32)


def _attend_concatenated(query, key, value, locality, keep):
    """Compute the numerator and denominator from `features · dim` channels, as published.

    The tokens are flattened, also in the results.
    """
    batch, height, width, heads, _ = query.shape
    positions = _position_features(locality, height, width)
    positions = positions.reshape(height * width, 1, -1, 1)

    def flat(x):
        return x.reshape(batch, height * width, heads, -1)

    def with_positions(x):
        # Concatenate rather than broadcast and reshape, which a TPU would copy three times: 4 GB
        # of its 16 GB for a forward pass of vvt_tiny at batch size 64.
        return jnp.concatenate(
            [flat(x) * positions[:, :, m].astype(x.dtype) for m in range(positions.shape[2])], -1
        )

    query, key, value = with_positions(query), with_positions(key), flat(value)
    kv = jnp.einsum("btnf,btne->bnfe", key, value, preferred_element_type=jnp.float32)
    key_sum = key.sum(1, dtype=jnp.float32)
    query = query.astype(jnp.float32)
    numerator = jnp.einsum("btnf,bnfe->btne", query, keep(kv))
    return numerator, jnp.einsum("btnf,bnf->btn", query, key_sum)


def _attend_separable(query, key, value, locality, keep):
    """Compute the numerator and denominator from sums along rows and columns.

    No tensor is wider than query, key and value, except that `"product"` and `"1d"`, which are not
    the sum of a function of the row and a function of the column, need two copies of query and key.
    The small matrices of each row or column are mixed into exactly the blocks of the concatenated
    KV, so the clamp acts on the same values.
    """
    _, height, width, _, _ = query.shape
    numerator, denominator = 0.0, 0.0
    for factor in _factors(locality, height, width):
        mix = factor.mix.astype(np.float32)

        def oriented(x, factor=factor):
            return x.swapaxes(1, 2) if factor.by_column else x

        def spread(x, factor=factor):
            x = oriented(x)[..., None, :]  # [batch, outer, inner, heads, j, dim]
            if factor.along is None:
                return x
            return x * factor.along.astype(x.dtype)[None, None, :, None, :, None]

        q, k, v = spread(query), spread(key), oriented(value)
        lines = jnp.einsum("boinjd,boine->bonjde", k, v, preferred_element_type=jnp.float32)
        kv = keep(jnp.einsum("moj,bonjde->bnmde", mix, lines))
        key_sum = jnp.einsum("moj,bonjd->bnmd", mix, k.sum(2, dtype=jnp.float32))
        q = q.astype(jnp.float32)
        out = jnp.einsum("boinjd,bonjde->boine", q, jnp.einsum("moj,bnmde->bonjde", mix, kv))
        total = jnp.einsum("boinjd,bonjd->boin", q, jnp.einsum("moj,bnmd->bonjd", mix, key_sum))
        numerator, denominator = numerator + oriented(out), denominator + oriented(total)
    return numerator, denominator
