"""Long memories in PyTorch equal those that are attended to at once: logits, gradients, states."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsmr_mlx.model import memory_blocks
from dsmr_mlx.model.config import ModelConfig

torch = pytest.importorskip("torch")

from dsmr_mlx.convert import reference  # noqa: E402
from dsmr_mlx.convert.long_memory import Memory, attend_long  # noqa: E402

RECIPE = {"qk_norm": True, "value_residual": True, "embedding_skip": True, "canon": True, "zero_init": False}


def twins(long_from, horizons: list[int], at_once: int, block: int, **options):
    """Two models with the same random weights: memories at once, and in blocks above `at_once` slots."""
    values = {"vocab_size": 19, "d_model": 16, "n_heads": 4, "head_dim": 8, "d_ff": 24, "segment_length": 4}
    c = ModelConfig(**(values | {"n_layers": len(horizons), "horizons": horizons} | options))
    models = []
    for threshold in (10**9, at_once):
        long_from(threshold, block)
        models.append(reference.DSMR(c))
    random = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(w.shape, generator=random) * 0.4 for k, w in models[0].state_dict().items()}
    for model in models:
        model.load_state_dict(weights)
    return models


def compute_in_float64(patch) -> None:
    """Let the model and the operators, which compute in the type of the weights or float32, take float64 for both."""
    patch.setattr(torch, "float32", torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)


def segments_of(model, at_once: int, long_from, tokens, resets, block: int):
    """Logits and gradients of each segment, streamed, where `resets[i]` lanes start new pieces at segment i."""
    long_from(at_once, block)
    S, state, results = model.config.segment_length, model.new_state(len(tokens)), []
    for i in range(tokens.shape[1] // S):
        state.reset(resets[i])
        model.zero_grad()
        logits, state = model(tokens[:, i * S : (i + 1) * S], state)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return results


@pytest.mark.slow
@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_logits_and_gradients_equal_those_at_once(data):
    """Lanes at different positions, more music than memory, resets, grouped heads, Canon layers.

    In float64: where gradients nearly cancel, either model differs in float32 from the exact ones by some 2e-5.
    """
    with pytest.MonkeyPatch.context() as patch:
        compute_in_float64(patch)

        def long_from(at_once, block=3):
            patch.setattr(memory_blocks, "AT_ONCE", at_once)
            patch.setattr(memory_blocks, "BLOCK", block)

        at_once, block = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
        horizons = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
        options = {"n_kv_heads": data.draw(st.sampled_from([1, 2, 4]))} | (RECIPE if data.draw(st.booleans()) else {})
        plain, blocked = (model.double() for model in twins(long_from, horizons, at_once, block, **options))
        tokens = torch.tensor(np.random.default_rng(0).integers(0, 19, (3, 4 * 10)))
        resets = [data.draw(st.lists(st.integers(0, 2), max_size=2, unique=True)) for _ in range(10)]
        expected = segments_of(plain, 10**9, long_from, tokens, resets, block)
        found = segments_of(blocked, at_once, long_from, tokens, resets, block)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours[0] - theirs[0]).abs().max().item() < 1e-12 * theirs[0].abs().max().item(), i
        largest = max(gradient.abs().max().item() for gradient in theirs[1:])
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert a.dtype == torch.float64
            assert (a - b).abs().max().item() < 1e-12 * largest, i


def test_chunks_of_any_length_give_the_same_logits(long_from):
    _, model = twins(long_from, [13, 30, 2], 3, 5, n_kv_heads=2, canon=True)
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 19, (2, 41)))
    with torch.no_grad():
        whole, _ = model(tokens)
        state, found = None, []
        for chunk in tokens.split([1, 2, 7, 4, 4, 3, 13, 7], dim=1):
            logits, state = model(chunk, state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=2e-5, rtol=2e-5)


def test_a_state_can_be_continued_twice(long_from):
    """The second continuation does not change the first."""
    _, model = twins(long_from, [30], 3, 5)
    tokens = torch.tensor(np.random.default_rng(2).integers(0, 19, (1, 32)))
    with torch.no_grad():
        _, state = model(tokens[:, :12])
        first, after = model(tokens[:, 12:20], state)
        model(tokens[:, 20:28], state)
        again, _ = model(tokens[:, 12:20], state)
        rest, _ = model(tokens[:, 20:], after)
        expected, _ = model(tokens)
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(rest, expected[:, 20:], atol=2e-5, rtol=2e-5)


def test_a_memory_is_as_long_as_the_longest_piece_in_a_lane(long_from):
    long_from(3)
    _, model = twins(long_from, [30], 3, 5)
    lengths, state = [], model.new_state(2)
    with torch.no_grad():
        for i in range(12):
            if i in (5, 6):
                state.reset([i - 5])
            _, state = model(torch.zeros(2, 4, dtype=torch.long), state)
            lengths.append(state.arrays[0][0].shape[2])
    assert lengths == [4, 8, 12, 16, 20, 24, 8, 12, 16, 20, 24, 28]


def test_appending_copies_only_when_the_array_is_full():
    memory, slots, arrays = Memory(torch.zeros(1, 1, 4, 1)), torch.arange(400.0).reshape(1, 1, 400, 1), set()
    for i in range(100):
        memory = memory.appended(slots[:, :, 4 * i : 4 * i + 4], keep=200)
        arrays.add(memory.array.data_ptr())
        assert torch.equal(memory.slots[0, 0, -4:, 0], slots[0, 0, 4 * i : 4 * i + 4, 0])
        assert memory.array.shape[2] < 240
    assert torch.equal(memory.slots, slots[:, :, 200:])
    assert len(arrays) < 45


@pytest.mark.parametrize("groups", [1, 3])
def test_bfloat16_is_close_to_float32(long_from, groups):
    long_from(0, 7)
    random = torch.Generator().manual_seed(0)
    shapes = [(2 * groups, 5), (2, 5), (2, 5), (2, 40), (2, 40)]
    inputs = [torch.randn(2, heads, n, 8, generator=random) for heads, n in shapes]
    direction = torch.randn(2, 2 * groups, 5, 8, generator=random)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, keys, values = (a.to(dtype) for a in inputs)
        new = [a.requires_grad_() for a in (q, k, v)]
        y = attend_long(*new, keys, values, torch.tensor([40, 17]))
        results.append([y.detach(), *torch.autograd.grad((y * direction.to(dtype)).sum(), new)])
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded.float(), exact, atol=0.06, rtol=0.05)


def test_operators_are_registered_correctly(long_from):
    """Shapes of the fake versions, no changes to inputs, gradients that autograd can trace."""
    long_from(0, 7)
    shapes = [(2, 10), (2, 5), (2, 5), (2, 20), (2, 20)]
    inputs = [torch.randn(1, heads, n, 8, requires_grad=i < 3) for i, (heads, n) in enumerate(shapes)]
    torch.library.opcheck(torch.ops.dsmr.memory_attention, (*inputs, torch.tensor([13])))
