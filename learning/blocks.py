"""Run a causal LM one decoder block at a time, so that only one block needs to be on the compute device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patch_compiler.linears import decoder_blocks

TOKENS_PER_STEP = 2048  # of a micro-batch: enough to fill a device, little beside the weights of a block


@contextmanager
def on_device(tensors: list[Tensor], device: torch.device, write_back: bool) -> Iterator[None]:
    """Parameters and buffers lie on `device` inside; outside they have their own memory again.

    write_back: copy what was changed into that memory, else it is as before.
    """
    moved = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, original in moved:
            tensor.data = original.to(device)
        yield
    finally:
        for tensor, original in moved:
            changed, tensor.data = tensor.data, original
            if write_back and changed.device == device:
                with torch.no_grad():
                    tensor.copy_(changed)


def resolve_device(device: torch.device | str | None, home: torch.device) -> torch.device:
    """The device asked for, with its index ("cuda" means the current one); `home` if None was asked for."""
    device = torch.device(device) if device is not None else home
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module answers with `forward` inside; it keeps its attributes, which models read off their blocks."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Calibration windows are token ids, int64 [count, context], all inside the model's vocabulary. ValueError otherwise."""
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.numel() == 0 or windows.shape[1] < 2:
        raise ValueError(
            f"calibration windows must be int64 [count, context >= 2], at least one, not {windows.dtype} {tuple(windows.shape)}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"calibration windows hold token ids {low} to {high}; the model's vocabulary has {vocabulary}")


class BlockRunner:
    """Carries the hidden states of calibration windows through the decoder blocks, one block after another.

    windows: int64 [count, context], full windows without padding. device: where blocks compute, None: where they lie.
    On entry one forward of the model, its blocks replaced by recorders, captures what every block is called with
    (masks, position embeddings); so a block sees what its family gives it (a mask of its own for sliding attention,
    no mask at all, ...). The model is in eval mode until exit.

    hidden: one tensor [micro-batch, context, hidden] per micro-batch, in the model's dtype and always on the CPU:
    the windows' states can be larger than a block.
    """

    def __init__(self, model: nn.Module, windows: Tensor, device: torch.device | str | None = None) -> None:
        check_windows(model, windows)
        self.model = model
        self.path, blocks = decoder_blocks(model)
        self.blocks = list(blocks)
        self._device = device
        self.batches = list(windows.split(max(1, TOKENS_PER_STEP // windows.shape[1])))
        self.hidden: list[Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # [micro-batch][block]
        self._returns_tuple = False
        self._stack = ExitStack()

    def name(self, index: int) -> str:
        return f"{self.path}.{index}"

    def members(self, index: int, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of the linears (by path) that lie in the block."""
        return {name: module for name, module in linears.items() if name.startswith(self.name(index) + ".")}

    def __enter__(self) -> BlockRunner:
        training = {module: module.training for module in self.model.modules()}
        for module, mode in training.items():
            self._stack.callback(setattr, module, "training", mode)
        self.model.eval()
        try:
            self._capture()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.clear()
        self.hidden.clear()
        self._stack.close()

    # ---- one block

    @contextmanager
    def block_on_device(self, index: int, write_back: bool = False) -> Iterator[nn.Module]:
        """The block's weights lie on the compute device inside."""
        block = self.blocks[index]
        with on_device(tensors_of(block), self.device_of(block), write_back):
            yield block

    def device_of(self, module: nn.Module) -> torch.device:
        """Where the module computes: the device asked for, else where its weights lie."""
        return resolve_device(self._device, next(module.parameters()).device)

    def call(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The block's output for one micro-batch; `hidden` must be on the compute device."""
        arguments, named = _map_tensors(self._calls[batch][index], lambda tensor: tensor.to(hidden.device))
        output = self.blocks[index](hidden, *arguments, **named)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run(self, index: int, advance: bool) -> None:
        """Run the block over all windows. advance: the outputs become `hidden`; else only hooks see them.

        Raises ValueError naming the block if its outputs are infinite or NaN.
        """
        device = self.device_of(self.blocks[index])
        finite = []
        for batch, hidden in enumerate(self.hidden):
            output = self.call(index, batch, hidden.to(device))
            finite.append(output.isfinite().all())
            if advance:
                self.hidden[batch] = output.to("cpu")
        if not bool(torch.stack(finite).all()):
            raise ValueError(
                f"block {self.name(index)}: its output is infinite or NaN in {sum(not bool(f) for f in finite)} of "
                f"{len(finite)} micro-batches ({self.hidden[0].dtype}); load the model in bfloat16 or float32"
            )

    # ---- what surrounds the blocks

    def logits(self, batch: int, last_hidden: Tensor) -> Tensor:
        """Logits [micro-batch, context, vocabulary] of the model when its last block returns `last_hidden`; differentiable."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(replaced_forward(block, lambda *_, **__: self._answer(last_hidden)))
            return self.model(input_ids=self.batches[batch].to(last_hidden.device), use_cache=False).logits

    @contextmanager
    def surroundings_on_device(self) -> Iterator[torch.device]:
        """Embeddings, final norm and head (all but the blocks) lie on the compute device inside, which is the value."""
        inside = {id(tensor) for block in self.blocks for tensor in tensors_of(block)}
        outside = [tensor for tensor in tensors_of(self.model) if id(tensor) not in inside]
        device = self.device_of(self.model.get_input_embeddings())  # type: ignore[operator]
        with on_device(outside, device, write_back=False):
            yield device

    def _answer(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    @torch.no_grad()
    def _capture(self) -> None:
        home = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        body = getattr(self.model, "base_model", self.model)  # without the head: its logits are not needed here
        for number, batch in enumerate(self.batches):
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            with ExitStack() as stack:
                for block in self.blocks:
                    first = number == 0 and block is self.blocks[0]
                    stack.enter_context(replaced_forward(block, self._recorder(calls, block.forward if first else None)))
                body(input_ids=batch.to(home), use_cache=False)
            if len(calls) != len(self.blocks):
                raise ValueError(f"{self.path}: {len(calls)} of {len(self.blocks)} blocks ran; every block must run once")
            # Windows without padding have equal masks and positions: one copy serves all micro-batches.
            known: dict[int, Any] = {}
            self._calls.append([_share(c, self._calls[0][i], known) for i, c in enumerate(calls)] if number else calls)

    def _recorder(self, calls: list[Any], real: Callable[..., Any] | None) -> Callable[..., Any]:
        def record(*arguments: Any, **named: Any) -> Any:
            if real is not None:  # once, to see in which form this family's blocks answer
                self._returns_tuple = isinstance(real(*arguments, **named), tuple)
            hidden = arguments[0] if arguments else named.pop("hidden_states")
            if not calls:
                self.hidden.append(hidden.to("cpu"))
            calls.append((arguments[1:], named))
            return self._answer(hidden)

        return record


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor inside tuples, lists and dicts replaced by function(tensor)."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(v, function) for v in value)
    if type(value) is dict:
        return {k: _map_tensors(v, function) for k, v in value.items()}
    return value


def _share(value: Any, like: Any, known: dict[int, Any]) -> Any:
    """`value` with every tensor that equals its counterpart in `like` replaced by it. known: answers by id(tensor)."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            comparable = isinstance(like, Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)
            known[id(value)] = like if comparable and torch.equal(value, like) else value
        return known[id(value)]
    if type(value) in (tuple, list) and type(like) is type(value) and len(like) == len(value):
        return type(value)(_share(v, u, known) for v, u in zip(value, like, strict=True))
    if type(value) is dict and type(like) is dict:
        return {k: _share(v, like.get(k), known) for k, v in value.items()}
    return value
