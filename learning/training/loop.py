"""The loop that learns masks: soft masks over frozen weights, AdamW on their logits, hardened at the end.

    masks = LearnedMasks(model, config, start)
    result = train(model, masks, tokens, config, validation=windows)
    hardened = masks.harden()

A step's gradient is the mean over config.batch windows. It is the same, up to rounding, for any number of processes; and, if
config.shared_noise, for any micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from patch_compiler.atomic import locked

from ..blocks import check_windows, resolve_device
from ..models import check_context
from ..soft_masks.learn_config import LearnConfig
from ..soft_masks.learned_masks import LearnedMasks
from ..token_file import TokenFile
from . import state as training_state
from .distributed import Ranks, share_out_trained
from .log import TrainingLog, check_loggers
from .next_token_loss import first_not_finite, mean_loss, next_token_loss
from .optimizer import LearnedOptimizer, check_optimizer
from .stop_request import STOP_FILE, Stopped, StopRequest
from .training_blocks import training_blocks


@dataclass(frozen=True)
class Validation:
    """Perplexities after `step` steps. soft: with one sample of the masks. hard: with the masks exactly on budget.

    sign_rule: with each tile by the sign of its logit, as it comes; None but at the end.
    """

    step: int
    soft: float
    hard: float
    sign_rule: float | None = None


@dataclass
class TrainResult:
    """tokens: seen in this call, by all processes. seconds: of this call. loss: of the last step, None if there was none."""

    steps: int
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validations: list[Validation] = field(default_factory=list)


def train(
    model: nn.Module,
    masks: LearnedMasks,
    tokens: TokenFile,
    config: LearnConfig,
    *,
    run: Path | None = None,
    resume: bool = False,
    validation: Tensor | None = None,
    validate_every: int = 100,
    save_every: int = 100,
    ranks: Ranks | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    wandb: str | None = None,
    recompute: bool = True,
    compiled: bool | None = None,
) -> TrainResult:
    """Learn masks for config.steps steps. model: a causal LM on one device, masked by `masks` there.

    run: directory for metrics and checkpoints, None: neither. resume: go on from its newest checkpoint, if it has one: bit for
    bit where the device computes the same twice, or the same but for rounding on another number of processes.
    validation: windows int64 [count, context] to measure perplexity on.
    ranks: of `distributed.processes`, every process makes the same call with its model on ranks.device; None: one process,
    which computes where the model is. Where pattern logits are learned by several processes, each keeps a part of them: the
    model is then good for nothing but `masks.harden()`.

    recompute: a decoder block keeps only its input for the backward pass; False is faster and takes much more memory.
    compiled: decoder blocks and the loss go through torch.compile; the same numbers but for rounding. None: on a GPU, unless
    pattern logits are shared among processes, which compiled blocks cannot gather.

    Dropout is off.
    Raises ValueError for settings or devices that do not fit, naming the layer if a number is not finite; Stopped (a
    KeyboardInterrupt) after SIGTERM, SIGINT or SIGUSR1, or if a file `stop` appears in `run`.
    """
    ranks = ranks or Ranks(next(model.parameters()).device)
    loop = _Loop(model, masks, tokens, config, run, validation, ranks, recompute, compiled)
    with ExitStack() as alone:
        if run is not None:
            ranks.first_does(lambda: _enter_alone(alone, run))
        found = ranks.gather(training_state.latest(run) if run is not None and ranks.first else None)[0]
        if found is not None and not resume:
            raise ValueError(f"run {run}: has a checkpoint of step {found.step}; resume it, or name another directory")
        if run is not None and (found is None or found.step < config.steps):
            ranks.first_does(lambda: training_state.check_space(run, masks, found))
        first = loop.prepare(found)
        log = TrainingLog(
            run if ranks.first else None, first, config.steps, progress=progress and ranks.first,
            tensorboard=tensorboard and ranks.first, wandb=wandb if ranks.first else None, settings=config.as_json(),
        )  # fmt: skip
        blocks = training_blocks(model, recompute=loop.recompute, compiled=loop.compiled)
        with log, StopRequest(run if ranks.first else None) as request, blocks:
            return loop.run(first, log, request, validate_every, save_every)


def _enter_alone(stack: ExitStack, run: Path) -> None:
    """The directory is this run's until the stack is left, or the process has gone: a job that was queued again may find the
    first one alive. Raises ValueError if it is another process's."""
    try:
        stack.enter_context(locked(run, wait=False))
    except BlockingIOError:
        raise ValueError(
            f"run {run}: another process is learning in it; wait for its end, or make a file {STOP_FILE!r} there"
        ) from None


def check_run(config: LearnConfig, ranks: Ranks, tensorboard: bool = False, wandb: bool = False) -> None:
    """What `train` would refuse without a look at model or text. Raises ValueError."""
    together = config.micro_batch * ranks.world
    if config.batch % together:
        raise ValueError(
            f"batch {config.batch}: not a multiple of {together}: micro-batches of {config.micro_batch} on {ranks.world} "
            f"process{'es' if ranks.world > 1 else ''}"
        )
    check_optimizer(config)
    check_loggers(tensorboard, wandb)


def check_precision(model: nn.Module) -> None:
    """Raises ValueError for a model in which a token's gradient is zero."""
    half = next((name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16), None)
    if half is not None:
        raise ValueError(f"{half} is float16, too coarse for a token's gradient: load the model in bfloat16 or float32")


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        masks: LearnedMasks,
        tokens: TokenFile,
        config: LearnConfig,
        run: Path | None,
        validation: Tensor | None,
        ranks: Ranks,
        recompute: bool,
        compiled: bool | None,
    ) -> None:
        self.model, self.masks, self.tokens, self.config = model, masks, tokens, config
        self.directory, self.validation, self.ranks = run, validation, ranks
        check_run(config, self.ranks)
        _check_device(model, masks, resolve_device(ranks.device, next(model.parameters()).device))
        check_precision(model)
        if tokens.context != config.context:
            raise ValueError(f"windows of {tokens.context} tokens and a context of {config.context}")
        check_context(model, config.context)
        check_windows(model, torch.tensor([[0, tokens.largest]]))
        if validation is not None:
            check_windows(model, validation)
        self.sharded = config.mode != "tile" and ranks.world > 1
        if compiled and self.sharded:
            raise ValueError("compiled: not with pattern logits that several processes share")
        self.recompute = recompute
        self.compiled = ranks.device.type == "cuda" and not self.sharded if compiled is None else compiled
        self.circumstances = training_state.circumstances(ranks, recompute, self.compiled)

    def prepare(self, found: training_state.Checkpoint | None) -> int:
        """Completed steps."""
        if found is not None:
            training_state.check(found, self.config, self.tokens)
            if self.ranks.first:
                training_state.warn_of_other_bits(found, self.circumstances, self.ranks)
            training_state.load_masks_state(found, self.masks)
        if self.sharded:
            share_out_trained(self.model, self.ranks)
        self.optimizer = LearnedOptimizer(self.masks.parameters_to_train(), self.config, self.ranks)
        if found is None:
            return 0
        if found.step < self.config.steps or training_state.optimizer_fits(found, self.ranks, self.sharded):
            # else the run has ended, and what several processes held may be too much for one
            training_state.load_optimizer_state(found, self.optimizer, self.ranks, self.sharded)
        return found.step

    def run(self, first: int, log: TrainingLog, request: StopRequest, validate_every: int, save_every: int) -> TrainResult:
        config, begun = self.config, time.perf_counter()
        result = TrainResult(first)
        for step in range(first, config.steps):
            start = time.perf_counter()
            loss, norm, stop = self._gradients(step, request)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._explain(step, loss)
            self.optimizer.step(step, norm)
            done, seconds = step + 1, time.perf_counter() - start
            result.steps, result.loss = done, loss
            result.tokens += config.batch * config.context
            log.step(done, self._values(step, loss, norm, seconds))
            if done % validate_every == 0 or done == config.steps:
                self._validate(result, log, last=done == config.steps)
            stop = stop and done < config.steps
            if self.directory is not None and (done % save_every == 0 or done == config.steps or stop):
                training_state.save(
                    self.directory, done, self.masks, self.optimizer, config, self.tokens, self.ranks, self.sharded,
                    self.circumstances,
                )  # fmt: skip
            if stop:
                raise Stopped(done, self.directory is not None)
        if first == config.steps:  # resumed a run that had ended, with this on record
            self._validate(result, None, last=True)
        self.masks.sample(config.steps, 0)  # hardening counts from the last scale
        result.seconds = time.perf_counter() - begun
        return result

    # ---- one step

    def _micro_batches(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """This process's (number in the whole batch, token ids)."""
        config, ranks = self.config, self.ranks
        order = self.tokens.order(step, config.batch, config.seed).split(config.micro_batch)
        for number in range(ranks.rank, len(order), ranks.world):
            yield number, self.tokens.windows(order[number]).to(ranks.device)

    def _gradients(self, step: int, request: StopRequest) -> tuple[float, float, bool]:
        """(loss, norm of the gradient, whether to stop), of all processes together; gradients lie in the optimizer."""
        share = self.config.micro_batch / self.config.batch
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number, ids in self._micro_batches(step):
            self.masks.sample(step, number)
            loss = next_token_loss(self.model, ids, self.compiled)
            (loss * share).backward()
            total += loss.detach() * share
        penalty = self.masks.penalty(step)
        if penalty is not None and self.ranks.first:
            penalty.backward()
        square = self.optimizer.collect()
        asked = torch.tensor(float(request.asked), dtype=torch.float64, device=self.ranks.device)
        found = self.ranks.sum_(torch.stack([total, square, asked])).tolist()
        return found[0], math.sqrt(found[1]) if found[1] >= 0 else math.nan, found[2] > 0

    def _values(self, step: int, loss: float, norm: float, seconds: float) -> dict[str, float]:
        config = self.config
        return {
            "loss": loss, "gradient_norm": norm, "learning_rate": config.lr_at(step),
            "soft_density": self.masks.soft_density(), "hard_density": self.masks.hard_density(),
            "seconds": round(seconds, 4), "tokens_per_second": round(config.batch * config.context / seconds, 1),
        }  # fmt: skip

    def _explain(self, step: int, loss: float) -> None:
        """Run the step's micro-batches again, forward and back, watching every layer. Always raises."""
        self.optimizer.forget()
        outputs, gradients = None, set[int]()
        for number, ids in self._micro_batches(step):
            self.masks.sample(step, number)
            here = first_not_finite(self.model, ids)
            if here is not None and outputs is None:
                outputs = f"{here} is the first layer with an output that is not, in micro-batch {number}"
            self.masks.sample(step, number)
            self.masks.watch_gradients(gradients)
            (next_token_loss(self.model, ids) * (self.config.micro_batch / self.config.batch)).backward()
        backward = (
            f"going back, {self.masks.layer_names[max(gradients)]} is the first layer whose is not" if gradients else None
        )
        told = [x for each in zip(*self.ranks.gather((outputs, backward)), strict=True) for x in each if x is not None]
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        reason = told[0] if told else "every layer's output is: the learning rate or a reward may be too large"
        raise ValueError(f"step {step}: {what}; all must be finite, and {reason}")

    # ---- validation

    def _validate(self, result: TrainResult, log: TrainingLog | None, last: bool) -> None:
        if self.validation is None:
            return
        step = result.steps
        self.masks.sample(step, 0)
        soft = self._perplexity()
        with self.masks.hard():
            hard = self._perplexity()
        sign_rule = None
        if last:
            with self.masks.hard(self.masks.harden(sign_rule=True)):
                sign_rule = self._perplexity()
        result.validations.append(Validation(step, soft, hard, sign_rule))
        values = {"validation_soft": soft, "validation_hard": hard}
        if log is not None:
            log.validation(step, values | ({"validation_sign_rule": sign_rule} if sign_rule is not None else {}))

    def _perplexity(self) -> float:
        assert self.validation is not None
        return math.exp(min(mean_loss(self.model, self.validation, self.ranks), 700.0))


def _check_device(model: nn.Module, masks: LearnedMasks, device: torch.device) -> None:
    """Raises ValueError unless all parameters and masks are there."""
    tensors = {**dict(model.named_parameters()), **{f"masks, {name}": t for name, t in masks.state_dict().items()}}
    elsewhere = next((name for name, tensor in tensors.items() if tensor.device != device), None)
    if elsewhere is not None:
        raise ValueError(
            f"{elsewhere} is on {tensors[elsewhere].device}, this process computes on {device}: move the whole model there "
            "before its LearnedMasks are made"
        )
