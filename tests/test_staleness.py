"""Changes of weights and masks after compilation: noticed, followed in place, or said; never silently stale."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patch_compiler
from passes import masked_weight
from patch_compiler import apply_masks, explain

from .strategies import random_hard_mask
from .test_backend import REFERENCE, Block, MaskedLinear, close, compiled

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_right_or_warned(fast, module: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = fast(x)
    close(y, module(x))
    assert [w for w in caught if "no longer has the tile map" in str(w.message)]


def test_a_misfit_found_by_a_second_graph_is_no_secret_to_the_first() -> None:
    module, small, large = MaskedLinear(64, 96).eval(), torch.randn(3, 64), torch.randn(2, 5, 64)
    fast = torch.compile(module, backend="patch", dynamic=False, options=REFERENCE)
    fast(small)
    module.mask.fill_(True)
    close(fast(large), module(large))
    assert_right_or_warned(fast, module, small)


def test_a_refresh_that_raised_leaves_it_stale() -> None:
    module, x = MaskedLinear(64, 96).eval(), torch.randn(3, 64)
    fast = compiled(module)
    fast(x)
    module.mask.fill_(True)
    with pytest.raises(RuntimeError, match="no longer fit"):
        patch_compiler.refresh()
    assert_right_or_warned(fast, module, x)


def test_an_exception_while_repacking_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = MaskedLinear(64, 96).eval(), torch.randn(3, 64)
    fast = compiled(module)
    fast(x)
    module.weight.mul_(2)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("deliberate")

    with monkeypatch.context() as patched:
        patched.setattr(masked_weight, "pack", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            fast(x)
    close(fast(x), module(x))


def test_no_thread_runs_on_a_half_repacked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = MaskedLinear(64, 96).eval(), torch.randn(3, 64)
    fast = compiled(module)
    fast(x)
    module.weight.mul_(3)
    reference, started, results = module(x), threading.Event(), []
    real_pack = masked_weight.pack

    def slow_pack(*args):
        started.set()
        threading.Event().wait(0.3)
        return real_pack(*args)

    monkeypatch.setattr(masked_weight, "pack", slow_pack)

    def run() -> None:
        with torch.no_grad():
            results.append(fast(x))

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    started.wait(10)
    second.start()
    first.join()
    second.join()
    assert len(results) == 2
    for y in results:
        close(y, reference)


def test_refresh_reaches_every_living_graph() -> None:
    module, small, large = MaskedLinear(64, 96).eval(), torch.randn(3, 64), torch.randn(2, 5, 64)
    keep = module.mask.clone()
    fast = torch.compile(module, backend="patch", dynamic=False, options=REFERENCE)
    fast(small)
    module.mask.fill_(True)
    fast(large)  # the first graph's copy does not fit: this one gets its own
    module.mask.copy_(keep)
    module.weight.data.mul_(2)
    patch_compiler.refresh()
    close(fast(small), module(small))
    close(fast(large), module(large))


def test_new_storage_at_an_old_address() -> None:
    module, x = MaskedLinear(1024, 1024, bias=False).eval(), torch.randn(3, 1024)
    fast = compiled(module)
    fast(x)
    for _ in range(4):  # the allocator likes to hand the same block out again
        module.weight.data = module.weight.data.double()
        module.weight.data = (module.weight.data * 2).float()
        torch.testing.assert_close(fast(x), module(x), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("kernel", ["reference", "dense"])
def test_another_dtype(kernel: str) -> None:
    module, x = MaskedLinear(64, 96).eval(), torch.randn(3, 64)
    fast = compiled(module, kernel=kernel)
    close(fast(x), module(x))
    module.double()
    torch.testing.assert_close(fast(x.double()), module(x.double()))
    module.float()
    close(fast(x), module(x))


class Writes(MaskedLinear):
    what = "mask"

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "mask":
            self.mask.logical_not_()
        else:
            self.weight.mul_(0.5)
        return F.linear(x, self.weight * self.mask, self.bias)


@pytest.mark.parametrize("what", ["mask", "weight"])
@pytest.mark.parametrize("kernel", ["reference", "dense"])
def test_weights_that_the_compiled_code_writes_are_left_alone(what: str, kernel: str) -> None:
    module, twin = Writes(64, 96).eval(), Writes(64, 96).eval()
    twin.load_state_dict(module.state_dict())
    module.what = twin.what = what
    fast, x = compiled(module, kernel=kernel), torch.randn(3, 64)
    for _ in range(3):
        close(fast(x), twin(x))
    assert "writes its weight or mask" in explain(module).sites[0].reason


def test_inference_tensors_have_no_counter_and_are_left_alone() -> None:
    with torch.inference_mode():
        module, x = MaskedLinear(64, 96).eval(), torch.randn(3, 64)
        fast = compiled(module)
        close(fast(x), module(x))
        module.weight.mul_(2)
        close(fast(x), module(x))
    assert "inference_mode" in explain(module).sites[0].reason


def test_a_refresh_does_not_write_into_the_users_masks() -> None:
    model, x = Block(nn.Linear).eval(), torch.randn(3, 64)
    first, second = random_hard_mask((128, 64), 32), random_hard_mask((128, 64), 32)
    kinds = first.tile_map.kinds.clone()
    apply_masks(model, {"a": first})
    fast = compiled(model)
    fast(x)
    model.a.weight.copy_(torch.randn(128, 64))
    apply_masks(model, {"a": second})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(fast(x), model(x))
    assert torch.equal(first.tile_map.kinds, kinds)


def test_freezing_needs_check_weights_off() -> None:
    from patch_compiler.backend import parse_options

    with pytest.raises(ValueError, match="check_weights=False"):
        parse_options(None, {"freezing": True})
    assert parse_options(None, {"freezing": True, "check_weights": False})[1] == {"freezing": True}
