"""The Triton kernels on CPU tensors, run by ``test_favor_triton.py``.

Needs TRITON_INTERPRET=1 before triton is imported, hence its own process.
"""

import json
import traceback

import numpy as np
import torch

from trackformer_sb.nnet import favor, favor_triton
from trackformer_sb.nnet.favor_trial import _largest_error
from trackformer_sb.nnet.favor_triton import favor_attention_triton


def interpret_as_a_gpu_multiplies():
    """Corrects triton's interpreter: indices, and products of matrices."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch_tensor(tensor, scope)
        # scalars are arrays of one element, which int() refuses in numpy 2.4
        scope.set_attr(tensor, "__index__", lambda x: x.handle.data.item())

    def as_multiplied(handle, precision):
        data = handle.data
        if handle.dtype.scalar == tl.bfloat16:
            # kept as 16 bit integers, which numpy would multiply as such
            return (data.astype(np.uint32) << 16).view(np.float32)
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        if precision == interpreter._ir.INPUT_PRECISION.TF32:
            # ten bits of mantissa, cut off as on Hopper
            bits = bits & np.uint32(0xFFFFE000)
        return bits.view(np.float32)

    def dot(self, a, b, start, precision, max_num_imprecise_acc):
        product = as_multiplied(a, precision) @ as_multiplied(b, precision)
        return interpreter.TensorHandle(
            product + start.data, start.dtype.scalar
        )

    interpreter._patch_lang_tensor = patch_index_too
    interpreter.InterpreterBuilder.create_dot = dot


def gradients(attention, inputs, projection, hidden, weights):
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs, projection, hidden)
    return output.detach(), *torch.autograd.grad(output, inputs, weights)


def make(shape, n_features=32, value_dim=None, key_frames=None, norm=2**0.5):
    """Queries, keys and values as SelfAttention makes them; directions."""
    batch, heads, frames, head_dim = shape
    value_dim = value_dim or head_dim
    key_frames = key_frames or frames
    query = torch.randn(batch, heads, frames, head_dim)
    key = torch.randn(batch, heads, key_frames, head_dim)
    query, key = (
        norm * torch.nn.functional.normalize(x, dim=-1) for x in (query, key)
    )
    value = torch.randn(batch, heads, key_frames, value_dim)
    return [query, key, value], favor.draw_projection(n_features, head_dim)


def compare(inputs, projection, hidden=None, tolerance=2e-3):
    """Output and gradients within a relative error of the plain form."""
    query, _, value = inputs
    weights = torch.randn(*query.shape[:3], value.shape[-1])
    found = gradients(
        favor_attention_triton,
        inputs,
        projection,
        hidden,
        weights.to(value.dtype),
    )
    exact = gradients(
        favor.favor_attention,
        [x.double() for x in inputs],
        projection.double(),
        hidden,
        weights.to(value.dtype).double(),
    )
    for result, x in zip(found, (value, *inputs)):
        assert result.dtype == x.dtype
    errors = [
        float((x - y).norm() / y.norm().clamp(min=0.1))
        for x, y in zip(found, exact)
    ]
    print("output, query, key, value:", *(f"{e:.1e}" for e in errors))
    assert max(errors) < tolerance, errors
    return found


def check_shapes():
    for shape, options in (
        ((1, 2, 37, 16), {}),
        ((2, 1, 64, 32), {"n_features": 48}),
        ((1, 1, 150, 16), {"value_dim": 32, "key_frames": 70}),
        ((1, 1, 1, 16), {"n_features": 256}),
    ):
        compare(*make(shape, **options))


def check_large_norms():
    # exponents up to 100 and below -100
    inputs, projection = make((1, 1, 80, 16), norm=20.0)
    output, *_ = compare(inputs, projection, tolerance=0.05)
    assert output.isfinite().all()


def check_constant_values():
    # weights sum to one whatever they are, in any precision
    for dtype in (torch.float32, torch.bfloat16):
        inputs, projection = make((1, 2, 100, 16))
        inputs[2] = torch.full_like(inputs[2], 3.0)
        output, grad_query, *_ = gradients(
            favor_attention_triton,
            [x.to(dtype) for x in inputs],
            projection,
            None,
            torch.randn(1, 2, 100, 16).to(dtype),
        )
        # the interpreter rounds to bfloat16 towards zero
        allowed = 1e-5 if dtype == torch.float32 else 2**-6
        assert (output - 3).abs().max() <= allowed
        assert grad_query.abs().max() < 1e-5


def check_padding():
    inputs, projection = make((2, 2, 70, 16))
    hidden = torch.arange(70) >= torch.tensor([41, 64])[:, None]
    where = hidden[:, None].expand(2, 2, 70)
    # keys that nobody sees may lie far above all others
    inputs[1][where] *= 50
    found = compare(inputs, projection, hidden)
    assert not found[2][where].any() and not found[3][where].any()
    changed = [x.clone() for x in inputs]
    changed[1][where] = 7.0
    changed[2][where] = -9.0
    output = favor_attention_triton(*changed, projection, hidden)
    assert torch.equal(output, found[0])


def check_all_hidden():
    inputs, projection = make((2, 1, 70, 16))
    hidden = torch.tensor([[True], [False]]).expand(2, 70)
    found = compare(inputs, projection, hidden)
    for result in found:
        assert result.isfinite().all() and not result[0].any()


def check_masks():
    # one mask serves all items, what is no mask is refused
    inputs, projection = make((3, 1, 20, 16))
    hidden = torch.arange(20)[None] > 11
    output = favor_attention_triton(*inputs, projection, hidden)
    every = favor_attention_triton(*inputs, projection, hidden.repeat(3, 1))
    assert torch.equal(output, every)
    try:
        favor_attention_triton(*inputs, projection, hidden.long())
    except ValueError as error:
        assert "expected torch.bool, got torch.int64" in str(error)
    else:
        raise AssertionError("a mask of numbers was taken")


def check_not_a_number():
    # a query with NaN has no output; the others do not notice
    (query, key, value), projection = make((1, 1, 40, 16))
    query[0, 0, 7, 3] = torch.nan
    output = favor_attention_triton(query, key, value, projection)
    lost = output.isnan()
    assert lost[0, 0, 7].all() and lost.sum() == 16
    key[0, 0, 7, 3] = torch.nan
    output = favor_attention_triton(query, key, value, projection)
    assert output.isnan().all()


def check_strides():
    mixed = torch.randn(2, 45, 3 * 2 * 16)
    mixed[..., : 2 * 2 * 16] /= 4
    inputs = mixed.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
    assert not inputs[0].is_contiguous()
    _, projection = make((1, 1, 1, 16))
    found = compare(inputs, projection)
    # heads merge without a copy
    merged = found[0].transpose(1, 2).flatten(2)
    assert merged.data_ptr() == found[0].data_ptr()
    plain = favor_attention_triton(
        *(x.contiguous() for x in inputs), projection
    )
    assert torch.equal(found[0], plain)
    # the gradient of a sum has strides of zero, and last strides may differ
    query, key, value = (
        x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
        for x in inputs
    )
    output = favor_attention_triton(query, key, value, projection)
    assert torch.equal(output, plain)
    output.sum().backward()
    expected = gradients(
        favor.favor_attention,
        inputs,
        projection,
        None,
        torch.ones(2, 2, 45, 16),
    )
    torch.testing.assert_close(value.grad, expected[3], rtol=1e-2, atol=1e-3)


def check_splits():
    # sums over frames in several parts, as on a card with room for them
    inputs, projection = make((1, 1, 300, 16))
    hidden = (torch.arange(300) < 130).expand(1, 300)
    compare(inputs, projection, hidden)


def check_several_tiles_a_program():
    # as in training, where there are more sequences than programs are wanted
    favor_triton.WANTED_PROGRAMS = 1
    inputs, projection = make((1, 1, 260, 16))
    # the largest exponent grows on the way, in the other order it falls
    inputs[1] *= torch.linspace(0.3, 2.0, 260)[:, None]
    compare(inputs, projection)
    inputs = [x.flip(2) for x in inputs]
    hidden = (torch.arange(260) % 200 > 170).expand(1, 260)
    compare(inputs, projection, hidden)
    reduced = [x.bfloat16() for x in inputs]
    compare(reduced, projection, tolerance=2e-2)


def check_types():
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        inputs, projection = make((1, 1, 70, 16))
        inputs[2] += 3.0
        inputs = [x.to(dtype) for x in inputs]
        compare(inputs, projection, tolerance=tolerance)
    inputs[2] = inputs[2].float()
    compare(inputs, projection)


def check_partial_gradients():
    (query, key, value), projection = make((1, 1, 40, 16))
    query.requires_grad_()
    favor_attention_triton(query, key, value, projection).sum().backward()
    assert query.grad is not None and key.grad is None
    with torch.no_grad():
        output = favor_attention_triton(query, key, value, projection)
    assert not output.requires_grad


def check_guard():
    favor_triton.WANTED_PROGRAMS = 4
    error = _largest_error(torch.device("cpu"), torch.bfloat16, 16, 16, 32)
    print("trial", error)
    assert error < 2e-2


def main():
    """Prints what went wrong in each check, nothing if nothing did."""
    interpret_as_a_gpu_multiplies()
    torch.set_num_threads(1)
    outcomes = {}
    wanted = favor_triton.WANTED_PROGRAMS
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            favor_triton.WANTED_PROGRAMS = wanted
            outcomes[name] = ""
            try:
                check()
            except Exception:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
