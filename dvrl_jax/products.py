"""Matrix products in the form in which XLA's CPU back end is fast at them and at their gradients."""

import jax
import jax.numpy as jnp

from dvrl_jax import choices

Array = jax.Array


def matmul(x: Array, kernel: Array) -> Array:
    """Product of x [..., in] with kernel [in, out]: [..., out].

    All rows are put on one axis first: where the kernel's gradient sums over several axes, XLA's CPU back end copies
    and transposes operands. Not where environments are divided over devices: XLA would gather them for it.
    """
    if choices.current().mesh is not None:
        return jnp.tensordot(x, kernel, 1)
    rows = x.reshape(-1, x.shape[-1])
    product = _product_with_transposed_gradient(rows, kernel) if transposed_pays(kernel) else rows @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def transposed_pays(kernel: Array) -> bool:
    """Whether gradients of a product's rows should be taken with a transposed copy of its kernel.

    XLA's CPU back end is up to 2.7 times slower where it has to transpose an operand on the way. All gradients of an
    update share one copy, which XLA makes before its loops.
    """
    return choices.current().transposed_kernels and kernel.size >= 2**18


@jax.custom_vjp
def _product_with_transposed_gradient(rows: Array, kernel: Array) -> Array:
    return rows @ kernel


_product_with_transposed_gradient.defvjp(
    lambda rows, kernel: (rows @ kernel, (rows, kernel)),
    lambda residuals, grad: (grad @ materialised(residuals[1].T), residuals[0].T @ grad),
)


def materialised(x: Array) -> Array:
    """x, computed once and kept: its first number is overwritten with itself.

    Otherwise XLA's CPU back end computes what is cheap again in every operation that reads it (16 sums, for tiles),
    and `optimization_barrier` is gone by the time that it decides so.
    """
    return jax.lax.dynamic_update_slice(x, x[(slice(1),) * x.ndim], (0,) * x.ndim)
