"""Triton kernels of FAVOR+: interpreted, compiled, tried; run on a GPU."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import favor_triton_check
import pytest
import torch

from trackformer_sb.nnet import favor, favor_trial, favor_triton
from trackformer_sb.nnet import favor_kernels as forward_kernels
from trackformer_sb.nnet import favor_kernels_backward as backward_kernels

HERE = pathlib.Path(__file__).parent

needs_triton = pytest.mark.skipif(
    forward_kernels.triton is None, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(
    forward_kernels.triton is None or not torch.cuda.is_available(),
    reason="no GPU, or no triton for it",
)


# --- in the interpreter ------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes():
    """What went wrong in each check of ``favor_triton_check.py``."""
    run = subprocess.run(
        [sys.executable, HERE / "favor_triton_check.py"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize(
    "check", [x for x in vars(favor_triton_check) if x.startswith("check_")]
)
def test_kernels_equal_the_plain_form(outcomes, check):
    assert not outcomes[check]


# --- compiled for a GPU that need not be here --------------------------------

KERNELS = (
    forward_kernels.accumulate_keys,
    forward_kernels.attend,
    backward_kernels.query_gradient,
    backward_kernels.state_gradient,
    backward_kernels.key_value_gradient,
)
FLOAT32 = {"weight", "bound", "centre", "log_sum", "delta", "grad_weight"}
PARTIAL = {
    "accumulate_keys": {"state"},
    "state_gradient": {"grad_state"},
}


def compiled(kernel, dtype, head_dim, masked, capability=90):
    """A kernel compiled as the launcher would have it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = favor_triton.launch_options(
        torch.empty(256, head_dim, dtype=dtype), head_dim
    )
    name = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    constants = {x: options[x] for x in kernel.arg_names if x in options}
    single = FLOAT32 | PARTIAL.get(kernel.__name__, set())
    signature = {}
    attributes = {}
    for place, argument in enumerate(kernel.arg_names):
        aligned = True
        if argument in constants:
            kind, aligned = "constexpr", False
        elif argument == "hidden":
            kind = "*u8" if masked else "constexpr"
            aligned = masked
            if not masked:
                constants[argument] = None
        elif argument in single:
            kind = "*fp32"
        elif argument.endswith(("_batch", "_head", "_frame")):
            kind = "i32"
        elif argument in ("heads", "frames", "frames_per_split"):
            kind, aligned = "i32", False
        else:
            kind = name
        signature[argument] = kind
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={x: options[x] for x in ("num_warps", "num_stages")},
    )


def resources(kernel, folder):
    """Bytes on the stack (spilt registers) and in shared memory."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    stack = int(re.search(r"STACK:(\d+)", listing)[1])
    return stack, kernel.metadata.shared


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda x: x.__name__)
def test_kernels_compile_for_hopper(
    kernel, dtype, head_dim, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    binary = compiled(kernel, dtype, head_dim, masked=True)
    stack, shared = resources(binary, tmp_path)
    print(kernel.__name__, dtype, head_dim, "stack", stack, "shared", shared)
    assert stack <= (0 if dtype == torch.bfloat16 else 64)
    assert shared <= 99 * 1024
    # tensor cores, of Hopper's own kind where tiles have 64 rows
    wide = dtype == torch.float32 and head_dim == 128
    assert ("mma.sync" if wide else "wgmma.mma_async") in binary.asm["ptx"]
    compiled(kernel, dtype, head_dim, masked=False)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda x: x.__name__)
def test_kernels_compile(kernel, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    binary = compiled(kernel, torch.bfloat16, 32, True, capability)
    assert resources(binary, tmp_path)[0] == 0


# --- where the kernels are used ----------------------------------------------


def stub(shape, dtype=torch.float32, device="cuda:0"):
    """What is asked of a tensor on a GPU."""
    device = torch.device(device)
    return types.SimpleNamespace(
        shape=torch.Size(shape),
        dtype=dtype,
        device=device,
        is_cuda=device.type == "cuda",
        numel=torch.Size(shape).numel,
    )


@needs_triton
@pytest.mark.parametrize(
    "expected, query, value, features, capability",
    [
        (True, {}, {}, 256, (9, 0)),
        (True, {}, {}, 48, (8, 0)),
        (False, {}, {}, 256, (7, 5)),
        (False, {}, {}, 250, (9, 0)),
        (False, {"device": "cpu"}, {}, 256, (9, 0)),
        (False, {}, {"device": "cuda:1"}, 256, (9, 0)),
        (False, {"dtype": torch.float64}, {}, 256, (9, 0)),
        (False, {"dtype": torch.bfloat16}, {}, 256, (9, 0)),
        (False, {}, {"shape": (2, 4, 100, 48)}, 256, (9, 0)),
        (False, {"shape": (2, 4, 100, 8)}, {}, 256, (9, 0)),
        (False, {"shape": (2, 4, 0, 64)}, {}, 256, (9, 0)),
        (False, {"shape": (70000, 4, 100, 64)}, {}, 256, (9, 0)),
    ],
)
def test_inputs_that_the_kernels_are_made_for(
    monkeypatch, expected, query, value, features, capability
):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability
    )
    shape = (2, 4, 100, 64)
    query = stub(**{"shape": shape} | query)
    key = stub(query.shape, query.dtype)
    value = stub(**{"shape": shape} | value)
    projection = stub((features, query.shape[-1]))
    found = favor_triton.can_use_triton(query, key, value, projection)
    assert found is expected


def test_without_triton_nothing_uses_it(monkeypatch):
    monkeypatch.setattr(forward_kernels, "triton", None)
    one = stub((1, 1, 16, 16))
    assert not favor_triton.can_use_triton(one, one, one, stub((16, 16)))


def test_tracing_takes_the_plain_form():
    def attend(query, projection):
        if favor_trial.should_use_triton(query, query, query, projection):
            return query
        return query * 2

    traced = torch.compile(attend, fullgraph=True, backend="eager")
    query = torch.ones(1, 1, 16, 16)
    assert (traced(query, torch.ones(16, 16)) == 2).all()


@needs_triton
@pytest.mark.parametrize("switch", [None, "1", "0"])
def test_kernels_can_be_switched_off(monkeypatch, switch):
    monkeypatch.delenv("TRACKFORMER_TRITON", raising=False)
    if switch is not None:
        monkeypatch.setenv("TRACKFORMER_TRITON", switch)
    tried = []
    monkeypatch.setattr(favor_trial, "can_use_triton", lambda *inputs: True)
    monkeypatch.setattr(
        favor_trial, "triton_agrees", lambda *sizes: tried.append(sizes) or True
    )
    one = stub((1, 1, 16, 16))
    used = favor_trial.should_use_triton(one, one, one, stub((16, 16)))
    assert used == bool(tried) == (switch != "0")


# --- the trial at first use --------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def warnings_of(monkeypatch):
    """Warnings of the trial; what it knew is forgotten before and after."""
    said = []
    monkeypatch.setattr(
        favor_trial.logger,
        "warning",
        lambda message, *args: said.append(message % args),
    )
    favor_trial.triton_agrees.cache_clear()
    yield said
    favor_trial.triton_agrees.cache_clear()


def wrong_key_gradient(query, key, value, projection, hidden=None):
    half = (key + key.detach()) / 2
    return favor.favor_attention(query, half, value, projection, hidden)


def fails_to_compile(*args):
    raise RuntimeError("ptxas fatal")


def value_gradient_is_nan(query, key, value, projection, hidden=None):
    # the root has an infinite slope at zero
    nan_slope = (value - value.detach()).sqrt() * 0
    return favor.favor_attention(
        query, key, value + nan_slope, projection, hidden
    )


@pytest.mark.parametrize("n_features, value_dim", [(256, 64), (16, 128)])
def test_trial_has_several_turns_in_each_program(n_features, value_dim):
    frames = favor_trial._frames_of_several_turns(value_dim, n_features)
    for dtype in favor_triton.DTYPES:
        reduced = dtype == torch.bfloat16
        product = torch.bfloat16 if reduced else torch.float32
        projection = torch.empty(n_features, 64, dtype=product)
        options = favor_triton.launch_options(projection, value_dim)
        keys = torch.empty(2, 2, frames, 64)
        _, per_split, *_ = favor_triton._partial(
            keys, frames, value_dim, options
        )
        assert per_split >= 3 * options["ROWS"]


@pytest.mark.parametrize("padded", [True, False])
def test_trial_tries_with_and_without_padding(monkeypatch, warnings_of, padded):
    def attention(query, key, value, projection, hidden=None):
        if (hidden is not None) == padded:
            raise RuntimeError("ptxas fatal")
        return favor.favor_attention(query, key, value, projection, hidden)

    monkeypatch.setattr(favor_trial, "favor_attention_triton", attention)
    assert not favor_trial.triton_agrees(CPU, torch.float32, 16, 16, 32)
    assert "ptxas fatal" in warnings_of[0]


@pytest.mark.parametrize(
    "attention, reason",
    [
        (wrong_key_gradient, "relative error 0.5"),
        (fails_to_compile, "ptxas fatal"),
        (value_gradient_is_nan, "relative error nan"),
    ],
)
def test_broken_kernels_are_not_used(
    monkeypatch, warnings_of, attention, reason
):
    monkeypatch.setattr(favor_trial, "favor_attention_triton", attention)
    for _ in range(2):
        assert not favor_trial.triton_agrees(CPU, torch.float32, 16, 16, 32)
    assert len(warnings_of) == 1
    assert reason in warnings_of[0]


def test_a_full_gpu_says_nothing_of_the_kernels(monkeypatch, warnings_of):
    full = [True]

    def attention(*args):
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return favor.favor_attention(*args)

    monkeypatch.setattr(favor_trial, "favor_attention_triton", attention)
    monkeypatch.setattr(favor_trial, "can_use_triton", lambda *args: True)
    inputs = [torch.randn(1, 1, 8, 16) for _ in range(3)]
    projection = torch.randn(32, 16)
    assert not favor_trial.should_use_triton(*inputs, projection)
    full.clear()
    assert favor_trial.should_use_triton(*inputs, projection)
    assert not warnings_of


@pytest.mark.parametrize("dtype", favor_triton.DTYPES)
def test_trial_sees_nothing_of_its_caller_and_leaves_nothing(
    monkeypatch, warnings_of, dtype
):
    monkeypatch.setattr(
        favor_trial, "favor_attention_triton", favor.favor_attention
    )
    saved = []
    state = torch.get_rng_state()
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
    ):
        assert favor_trial.triton_agrees(CPU, dtype, 16, 32, 32)
        assert torch.is_inference_mode_enabled()
    assert not saved
    assert torch.equal(state, torch.get_rng_state())
    assert not warnings_of


# --- on a GPU ----------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("head_dim", favor_triton.HEAD_DIMS)
@pytest.mark.parametrize("dtype", favor_triton.DTYPES)
def test_kernels_agree_on_the_gpu(dtype, head_dim):
    error = favor_trial._largest_error(
        torch.device("cuda"), dtype, head_dim, head_dim, 256
    )
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-3)


@needs_gpu
def test_same_bits_and_no_features_in_memory_on_the_gpu():
    mixed = torch.randn(1, 20000, 3 * 4 * 64, device="cuda") / 8
    inputs = mixed.unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4).unbind()
    projection = favor.draw_projection(256, 64).cuda()

    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = favor_triton.favor_attention_triton(*leaves, projection)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    first = run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = run()
    features = 4 * 20000 * 256 * 4
    # the plain form keeps the features of queries and of keys, and their
    # gradients and exponents on the way
    assert torch.cuda.max_memory_allocated() - before < 3 * features
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    output = favor.favor_attention(*leaves, projection.double())
    exact = output, *torch.autograd.grad(output.square().sum(), leaves)
    for found, expected in zip(first, exact):
        assert (found - expected).norm() < 5e-3 * expected.norm()
