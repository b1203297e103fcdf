"""Zero-shot tasks through EleutherAI's lm-evaluation-harness (lm-eval), from the hub by name or from local files.

    tasks = load_tasks(["piqa", "arc_easy", "my_tasks/boolq.jsonl.xz"])   # reads and checks all data, needs no model
    result = zero_shot(model, tokenizer, tasks)                           # compressed or dense, compiled or not
    print(result.table())

Names are lm-eval's tasks, groups and tags; "paper" stands for the eight tasks of PATCH's tables. Local files: see
learning.local_tasks. lm-eval is the extra patch-compiler[eval].
"""

from __future__ import annotations

import difflib
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from patch_compiler.text_table import table

from .local_tasks import LocalTask, is_local, read_local_task
from .perplexity import perplexity_of

PAPER_TASKS = ("piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "race", "hellaswag", "mmlu")

_FEWSHOT_SEED = 1234  # lm-eval's own default
_WITH_LIKELIHOODS = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class Score:
    """stderr: standard error of the mean over the examples; None where there is no estimate (one example, other metrics)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """One task or group. source: hub data set ("owner/name:config"), or the local file's own name.

    scores: by metric. examples: how many were scored. shots: examples in the prompt. log_likelihoods [examples][options]:
    of each option's text given its context, in nats; empty for groups and for tasks that generate.
    """

    name: str
    source: str | None
    version: str | None
    examples: int
    shots: int | None
    scores: dict[str, Score]
    subtasks: tuple[TaskResult, ...] = ()
    log_likelihoods: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        metrics = {name: {"value": score.value, "stderr": score.stderr} for name, score in self.scores.items()}
        record: dict[str, Any] = {"task": self.name, "source": self.source, "version": self.version, "examples": self.examples}
        record |= {"shots": self.shots, "metrics": metrics}
        return record | ({"subtasks": [task.record() for task in self.subtasks]} if self.subtasks else {})


@dataclass(frozen=True)
class ZeroShot:
    """tasks: in the order they were asked for. truncated: requests cut from the left, being longer than the model reads."""

    tasks: tuple[TaskResult, ...]
    truncated: int

    @property
    def mean_accuracy(self) -> Score | None:
        """Mean of "acc" over the tasks that have one, each counting the same, as the papers' tables do."""
        scores = [task.scores["acc"] for task in self.tasks if "acc" in task.scores]
        if not scores:
            return None
        errors = [score.stderr for score in scores if score.stderr is not None]
        stderr = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
        return Score(statistics.fmean(score.value for score in scores), stderr)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        mean, counted = self.mean_accuracy, [task.name for task in self.tasks if "acc" in task.scores]
        average = {"value": mean.value, "stderr": mean.stderr, "tasks": counted} if mean is not None else None
        return {"tasks": [task.record() for task in self.tasks], "mean_accuracy": average, "truncated": self.truncated}

    def table(self) -> str:
        """A line for each metric, and the mean accuracy."""
        rows: list[tuple[object, ...]] = [
            (task.name, metric, *_shown(score), task.examples, task.shots)
            for task in self.tasks
            for metric, score in task.scores.items()
        ]
        counted = sum("acc" in task.scores for task in self.tasks)
        if counted > 1 and (mean := self.mean_accuracy) is not None:
            rows.append((f"mean of {counted} tasks", "acc", *_shown(mean), None, None))
        return table(rows, ("task", "metric", "score", "std. error", "examples", "shots"))


def _shown(score: Score) -> list[str | None]:
    """Four decimals, of perplexities beyond reason four digits."""
    return [x if x is None else f"{x:.4f}" if x < 1e4 else f"{x:.4g}" for x in (score.value, score.stderr)]


@dataclass(frozen=True)
class LoadedTasks:
    """rows: the tasks and groups to report. harness: lm-eval's objects, as its TaskManager gives them."""

    rows: tuple[str, ...]
    harness: dict[str, dict[str, Any]]
    sources: dict[str, str]


# ---- tasks


def load_tasks(names: Sequence[str], num_fewshot: int | None = None) -> LoadedTasks:
    """Find the tasks and read their data: local files whole, hub data sets into the Hugging Face cache.

    num_fewshot: examples in the prompt; default: each task's own choice, which is none for the tasks of the paper and for
    local files. A task that is defined without examples keeps none, as in lm-eval.

    Raises ValueError: lm-eval is not installed, a name nobody knows (with near ones), a file with something wrong in it,
    a data set that cannot be had, one name for two tasks, more few-shot examples than there are.
    """
    _require_harness()
    names = [task for name in names for task in (PAPER_TASKS if name == "paper" else (name,))]
    if not names:
        raise ValueError("no task named")
    local = [read_local_task(Path(name).expanduser()) for name in names if is_local(name)]
    hub = [name for name in names if not is_local(name)]
    listed = [*hub, *(task.name for task in local)]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks are called {twice[0]!r}: name it once, or rename the file")
    with _quiet_libraries():
        loaded = _load_hub(hub)
        ready = {task.name: _harness_task(task) for task in local}
        clash = sorted(ready.keys() & loaded["tasks"].keys())
        if clash:
            raise ValueError(f"two tasks are called {clash[0]!r}, a local file and one of the hub's: rename the file")
        loaded["tasks"] |= ready
        for name, task in loaded["tasks"].items():
            _set_shots(name, task, num_fewshot)
            _keep_from_bootstrap(task)
    rows: list[str] = []
    files = iter(local)
    for name in names:
        rows += [next(files).name] if is_local(name) else loaded["rows"][name]
    sources = {task.name: task.file for task in local}
    return LoadedTasks(tuple(dict.fromkeys(rows)), {key: loaded[key] for key in ("tasks", "groups", "group_map")}, sources)


def _require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise ValueError("zero-shot tasks need lm-eval; pip install 'patch-compiler[eval]'")


def _load_hub(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks, groups and group_map, and under "rows" what to report for each name."""
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}, "rows": {}}
    if not names:
        return found  # the index of all tasks, which takes seconds, is not needed
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 5, 0.7)
            hint = f"; near are {', '.join(near)}" if near else "; `lm_eval ls tasks` lists the names"
            raise ValueError(f"task {name!r} is neither a task of lm-eval nor a file{hint}")
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # datasets lets the errors of several HTTP and file libraries through
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"task {name!r}: its data cannot be had from the hub ({reason[0]}); local .jsonl files need no network"
            ) from error
        for key in ("tasks", "groups", "group_map"):
            found[key].update(loaded.get(key, {}))
        summed_up = name in loaded["groups"] and loaded["groups"][name].has_aggregation
        found["rows"][name] = [name] if summed_up else list(loaded["tasks"])
    return found


def _harness_task(task: LocalTask) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def in_memory(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list(task.documents)}

    return ConfigurableTask(config={**task.harness_config(), "custom_dataset": in_memory})


def _set_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    """The rule is that of lm-eval's simple_evaluate."""
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and num_fewshot is not None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    shared = task.config.fewshot_config.split == task.config.test_split  # then the sampler leaves out the example it is for
    if shots > len(sampler.df) - shared:
        others = " besides the one to score" if shared else ""
        raise ValueError(f"task {name!r}: {shots} few-shot examples asked for; it has {len(sampler.df) - shared}{others}")


def _keep_from_bootstrap(task: Any) -> None:
    """lm-eval estimates a perplexity's standard error from 100 000 resamples in forked processes; `_task_result` has it in
    closed form. Under a function that is not lm-eval's own it leaves the estimate out."""
    from lm_eval.api import metrics

    aggregation = task.aggregation()
    for name, function in aggregation.items():
        if function is metrics.perplexity:
            aggregation[name] = _perplexity


def _perplexity(log_likelihoods: Sequence[float]) -> float:
    return perplexity_of(-statistics.fmean(log_likelihoods))


# ---- evaluation


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> ZeroShot:
    """Score a causal language model of transformers on tasks.

    model: dense, masked or compressed, as it is or through torch.compile; it runs where its parameters are, in eval mode;
    its mode is restored afterwards. limit: the first so many examples of each task. batch_size: requests run together.
    tasks: from `load_tasks`, any number of times.

    Raises ValueError: a compiled model and a task that generates text, tokens outside the model's vocabulary, an answer
    longer than the model reads, log-likelihoods that are not finite.
    """
    from lm_eval.evaluator import evaluate

    from .harness_model import HarnessModel

    writing = [name for name, task in tasks.harness["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
    if writing and isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(f"task {writing[0]!r} generates text, which would run the model uncompiled; leave the compiler out")
    was_training = model.training
    model.eval()
    try:
        with _quiet_libraries(progress):
            for task in tasks.harness["tasks"].values():
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            harness_model = HarnessModel(model, tokenizer, batch_size)
            results = evaluate(lm=harness_model, task_dict=tasks.harness, limit=limit, log_samples=True)
    finally:
        model.train(was_training)
    rows = tuple(_task_result(name, results, tasks) for name in tasks.rows)
    return ZeroShot(rows, harness_model.truncated)


def _task_result(name: str, results: dict[str, Any], tasks: LoadedTasks) -> TaskResult:
    found, samples = results["results"][name], results["samples"].get(name, [])
    task = tasks.harness["tasks"].get(name)
    scores = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = found.get(f"{metric}_stderr,{filtered}")
        if task is not None and task.aggregation().get(metric) is _perplexity and len(samples) > 1:
            # first order in the mean log-likelihood (delta method): d exp(-m) = exp(-m) dm
            stderr = value * statistics.stdev(sample[metric] for sample in samples) / math.sqrt(len(samples))
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        scores[label] = Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    likelihoods = task is not None and task.OUTPUT_TYPE in _WITH_LIKELIHOODS
    version = results["versions"].get(name)
    subtasks = tuple(_task_result(child, results, tasks) for child in tasks.harness["group_map"].get(name, ()))
    return TaskResult(
        name=name,
        source=tasks.sources.get(name) or _data_set(task),
        version=None if name in tasks.sources or version is None else str(version),
        examples=found.get("sample_len") or sum(task.examples for task in subtasks),
        shots=results["n-shot"].get(name),
        scores=dict(sorted(scores.items())),
        subtasks=subtasks,
        log_likelihoods=tuple(tuple(float(answer[0]) for answer in sample["filtered_resps"]) for sample in samples)
        if likelihoods
        else (),
    )


def _data_set(task: Any) -> str | None:
    parts = (getattr(task, "DATASET_PATH", None), getattr(task, "DATASET_NAME", None))
    return ":".join(part for part in parts if part) or None


@contextmanager
def _quiet_libraries(progress: bool = False) -> Iterator[None]:
    """Without the harness' and the hub's advice on standard error, and with one progress bar or none: lm-eval has no switch
    for those of each task's prompts."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task]
    if not progress:
        modules.append(lm_eval.models.huggingface)

    def silent(*arguments: Any, **options: Any) -> Any:
        return tqdm(*arguments, **(options | {"disable": True}))

    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for module in modules:
            module.tqdm = silent
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
