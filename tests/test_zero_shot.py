"""Zero-shot scores equal ones computed request by request; local files need no network; bad input is refused early."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from learning.__main__ import main
from learning.commands import evaluate as evaluate_command
from learning.evaluation import zero_shot as module
from learning.evaluation.local_tasks import read_local_task
from learning.evaluation.zero_shot import PAPER_TASKS, Score, TaskResult, ZeroShot, load_tasks, zero_shot
from patch_compiler import HardMask, apply_masks, convert, named_linears
from patch_compiler.linears import weight_of

from .conftest import SEED
from .strategies import random_hard_mask
from .tiny import VOCABULARY, save_tiny, tiny_llama, tiny_tokenizer

pytest.importorskip("lm_eval", reason="zero-shot tasks need lm-eval: pip install '.[eval]'")

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("PATCH_ZERO_SHOT_DATA") or ROOT.parent / "shared" / "data" / "zeroshot")
REAL_FILES = {"arc_easy": 2376, "piqa": 1838, "winogrande": 1267, "lambada_openai": 5153, "boolq": 3270}
QUESTION = {"query": "Question: why", "choices": ["a", "b"], "gold": 0}

chance = random.Random(SEED)


def some_text(low: int, high: int) -> str:
    words = ["the", "tile", "map", "of", "weights", "says", "which", "größe", "tiles", "are", "dense"]
    return " ".join(chance.choices(words, k=chance.randint(low, high)))


def questions(count: int) -> list[dict]:
    return [
        {
            "query": chance.choice(["Question: ", ""]) + some_text(2, 6),
            "choices": [some_text(1, 3) for _ in range(chance.randint(2, 4))],
            "gold": chance.randrange(2),
        }
        for _ in range(count)
    ]


def clozes(count: int) -> list[dict]:
    return [{"context": some_text(3, 8), "continuation": some_text(1, 1)} for _ in range(count)]


def schemas(count: int) -> list[dict]:
    return [
        {"context_options": [some_text(1, 5) for _ in range(2)], "continuation": some_text(1, 3), "gold": chance.randrange(2)}
        for _ in range(count)
    ]


def write(path: Path, examples: list) -> str:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in examples)
    return str(path)


def pairs(example: dict) -> list[tuple[str, str]]:
    """Context and continuation of each request, written out once more."""
    if "query" in example:
        prompt = example["query"].strip() + ("\nAnswer:" if example["query"].startswith("Question:") else "")
        return [(prompt, " " + choice.strip()) for choice in example["choices"]]
    contexts = example.get("context_options") or [example["context"]]
    return [(context.strip(), " " + example["continuation"].strip()) for context in contexts]


@torch.no_grad()
def log_likelihood(model: nn.Module, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """In float64, one request alone: and whether greedy decoding writes the continuation."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0].double()[start - 1 : -1].log_softmax(-1)
    targets = torch.tensor(ids[start:])
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def all_likelihoods(result: ZeroShot) -> list[float]:
    return [value for task in result.tasks for example in task.log_likelihoods for value in example]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def three_files(tmp_path) -> list[str]:
    """One of each kind, one of each compression."""
    return [
        write(tmp_path / "asked.jsonl", questions(7)),
        write(tmp_path / "told.jsonl.xz", clozes(6)),
        write(tmp_path / "chosen.jsonl.gz", schemas(5)),
    ]


# ---- scores


def test_scores_equal_the_reference_request_by_request(tmp_path, tokenizer):
    model = tiny_llama()
    examples = {"asked": questions(9), "told": clozes(8), "chosen": schemas(7)}
    files = [write(tmp_path / f"{name}.jsonl", e) for name, e in examples.items()]
    result = zero_shot(model, tokenizer, load_tasks(files), batch_size=3, progress=False)
    assert [(t.name, t.source, t.examples, t.shots) for t in result.tasks] == [
        (name, f"{name}.jsonl", len(e), 0) for name, e in examples.items()
    ]
    for task in result.tasks:
        outcomes: dict[str, list[float]] = {"acc": [], "acc_norm": [], "perplexity": []}
        for example, found in zip(examples[task.name], task.log_likelihoods, strict=True):
            answers = [log_likelihood(model, tokenizer, *pair) for pair in pairs(example)]
            values = [value for value, _ in answers]
            assert found == pytest.approx(values, abs=1e-4)
            if task.name == "told":
                outcomes["acc"].append(float(answers[0][1]))
                outcomes["perplexity"] += values
                continue
            outcomes["acc"].append(float(values.index(max(values)) == example["gold"]))
            if task.name == "asked":
                norms = [value / len(choice) for value, choice in zip(values, example["choices"], strict=True)]
                outcomes["acc_norm"].append(float(norms.index(max(norms)) == example["gold"]))
        assert set(task.scores) == {name for name, values in outcomes.items() if values}
        for metric, score in task.scores.items():
            values = outcomes[metric]
            value, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
            if metric == "perplexity":
                value = math.exp(-value)
                error *= value
            assert score.value == pytest.approx(value, rel=1e-3)
            assert score.stderr == pytest.approx(error, rel=1e-3, abs=1e-9)
    mean = [task.scores["acc"] for task in result.tasks]
    assert result.mean_accuracy is not None
    assert result.mean_accuracy.value == pytest.approx(sum(s.value for s in mean) / 3)
    assert result.mean_accuracy.stderr == pytest.approx(math.sqrt(sum(s.stderr**2 for s in mean)) / 3)


@pytest.fixture
def masked() -> tuple[nn.Module, dict[str, HardMask]]:
    model = tiny_llama(num_hidden_layers=1, max_position_embeddings=256)
    masks = {name: random_hard_mask(tuple(weight_of(m).shape), 16) for name, m in named_linears(model).items()}
    apply_masks(model, masks)
    return model, masks


def test_compressed_and_compiled_models_score_as_the_masked_one(masked, tokenizer, three_files, fresh_compiler):
    model, _ = masked
    tasks = load_tasks(three_files)
    eager = zero_shot(model, tokenizer, tasks, progress=False)
    convert(model)
    packed = zero_shot(model, tokenizer, tasks, progress=False)
    fast = torch.compile(model, backend="patch", options={"kernel": "reference"})
    compiled = zero_shot(fast, tokenizer, tasks, progress=False)
    for other in (packed, compiled):
        assert all_likelihoods(other) == pytest.approx(all_likelihoods(eager), abs=1e-4)
        for ours, theirs in zip(other.tasks, eager.tasks, strict=True):
            for metric, score in theirs.scores.items():
                assert ours.scores[metric].value == pytest.approx(score.value, abs=0 if "acc" in metric else 1e-2 * score.value)


def test_one_graph_serves_batches_of_all_sizes(tokenizer, three_files, fresh_compiler):
    model, shapes, graphs = tiny_llama(num_hidden_layers=1), set(), []
    model.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    zero_shot(model, tokenizer, load_tasks(three_files), batch_size=5, progress=False)
    model._forward_pre_hooks.clear()

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    zero_shot(torch.compile(model, backend=counting), tokenizer, load_tasks(three_files), batch_size=5, progress=False)
    assert len(shapes) > 3
    assert len(graphs) == 1 + any(1 in shape for shape in shapes)  # torch has a graph of its own for sizes of 1


def test_the_same_tasks_can_be_scored_again_with_the_same_examples_in_the_prompt(tokenizer, three_files):
    model, tasks = tiny_llama(max_position_embeddings=512), load_tasks(three_files, 3)
    first, second = (zero_shot(model, tokenizer, tasks, progress=False) for _ in range(2))
    assert first == second
    assert all(task.shots == 3 for task in first.tasks)
    assert all_likelihoods(first) != pytest.approx(all_likelihoods(zero_shot(model, tokenizer, load_tasks(three_files))))


def test_prompt_examples_are_others_than_the_one_that_is_asked(tmp_path):
    examples = [{"context": f"question {i}", "continuation": f"answer{i}"} for i in range(4)]
    tasks = load_tasks([write(tmp_path / "t.jsonl", examples)], 3)
    seen: list[str] = []

    class Spy:
        def __init__(self, model, tokenizer, batch_size):
            self.rank, self.world_size, self.truncated = 0, 1, 0

        def loglikelihood(self, requests):
            seen.extend(request.args[0] + request.args[1] for request in requests)
            return [(-1.0, True)] * len(requests)

    import learning.evaluation.harness_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning.evaluation.harness_model, "HarnessModel", Spy)
        result = zero_shot(tiny_llama(), None, tasks)
    for i, prompt in enumerate(seen):
        *shots, asked = prompt.split("\n\n")
        assert asked == f"question {i} answer{i}"
        assert sorted([*shots, asked]) == [f"question {j} answer{j}" for j in range(4)]
    assert result.tasks[0].scores["perplexity"] == Score(pytest.approx(math.e), pytest.approx(0))


def test_limit_takes_the_first_examples(tokenizer, three_files):
    model = tiny_llama()
    whole, part = (zero_shot(model, tokenizer, load_tasks(three_files), limit=n, progress=False) for n in (None, 2))
    for all_examples, first in zip(whole.tasks, part.tasks, strict=True):
        assert first.examples == 2
        flat = [value for example in first.log_likelihoods for value in example]
        assert flat == pytest.approx([v for example in all_examples.log_likelihoods[:2] for v in example], abs=1e-4)
    single = zero_shot(model, tokenizer, load_tasks(three_files), limit=1, progress=False)
    assert all(score.stderr is None for task in single.tasks for score in task.scores.values())
    assert single.mean_accuracy is not None
    assert single.mean_accuracy.stderr is None


def test_nothing_about_model_tokenizer_or_logging_is_changed(tokenizer, three_files):
    model = tiny_llama().train()
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))  # although the config says it is tied
    before, levels = model.lm_head.weight.clone(), logging.getLogger("lm_eval").level
    zero_shot(model, tokenizer, load_tasks(three_files), progress=False)
    assert torch.equal(model.lm_head.weight, before)
    assert model.training
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == levels


def test_progress_is_one_bar_or_none(tokenizer, three_files, capfd):
    tasks = load_tasks(three_files)
    zero_shot(tiny_llama(), tokenizer, tasks, progress=False)
    assert capfd.readouterr() == ("", "")
    zero_shot(tiny_llama(), tokenizer, tasks)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "loglikelihood" in shown.err


def test_what_the_model_cannot_read(tmp_path, tokenizer):
    long = write(tmp_path / "long.jsonl", [{"context": "x y " * 100, "continuation": "z"}, *clozes(2)])
    assert zero_shot(tiny_llama(), tokenizer, load_tasks([long]), progress=False).truncated == 1
    endless = write(tmp_path / "endless.jsonl", [{"context": "x", "continuation": "z y " * 100}])
    with pytest.raises(ValueError, match=r"the text ' z y .* tokens; the model scores 1 to 128"):
        zero_shot(tiny_llama(), tokenizer, load_tasks([endless]), progress=False)
    with pytest.raises(ValueError, match="is it the right tokenizer"):
        zero_shot(tiny_llama(vocab_size=VOCABULARY // 10), tokenizer, load_tasks([long]), progress=False)
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        zero_shot(broken, tokenizer, load_tasks([long]), progress=False)


# ---- local files


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no example"),
        (["{"], r"line 1: not JSON"),
        ([QUESTION, "", "[]"], r"line 3: not a JSON object"),
        (["{}"], r"line 1: the fields are none; a task has query \+ choices \+ gold or context \+ continuation or"),
        ([{"question": "a", "answer": 1}], r"line 1: the fields are 'question', 'answer'; a task has"),
        ([QUESTION, {"query": "a", "choices": ["b", "c"]}], r"line 2, field 'gold': missing"),
        ([QUESTION, {"context": "a", "continuation": "b"}], r"line 2, field 'query': missing"),
        ([QUESTION | {"gold": 2}], r"line 1, field 'gold': 2 is none of the 2 options, 0 to 1"),
        ([QUESTION | {"gold": -1}], r"line 1, field 'gold': -1 is none"),
        ([QUESTION | {"gold": "0"}], r"line 1, field 'gold': must be an integer, not '0'"),
        ([QUESTION | {"gold": True}], r"line 1, field 'gold': must be an integer, not True"),
        ([QUESTION | {"choices": "ab"}], r"line 1, field 'choices': must be a list of at least two texts, not 'ab'"),
        ([QUESTION | {"choices": ["a"]}], r"line 1, field 'choices': must be a list of at least two"),
        ([QUESTION | {"choices": ["a", " "]}], r"line 1, field 'choices': must be a text that is not empty, not ' '"),
        ([QUESTION | {"query": None}], r"line 1, field 'query': must be a text that is not empty, not None"),
        ([{"context": "a", "continuation": 5}], r"line 1, field 'continuation': must be a text"),
        ([{"context_options": ["a", 5], "continuation": "b", "gold": 0}], r"line 1, field 'context_options': must be a text"),
    ],
)
def test_bad_local_file(tmp_path, lines, message):
    path = write(tmp_path / "my.jsonl", lines)
    with pytest.raises(ValueError, match=f"^task file '.*my.jsonl'.*{message}"):
        load_tasks([path])


def test_unreadable_local_files(tmp_path):
    with pytest.raises(ValueError, match=r"task file '.*none\.jsonl' cannot be read: .*No such file"):
        load_tasks([str(tmp_path / "none.jsonl")])
    (tmp_path / "bad.jsonl.xz").write_bytes(b"not xz")
    with pytest.raises(ValueError, match=r"bad\.jsonl\.xz' cannot be read"):
        load_tasks([str(tmp_path / "bad.jsonl.xz")])
    (tmp_path / "latin.jsonl").write_bytes('{"context": "größe"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl' is not UTF-8 \(byte \d+\)"):
        load_tasks([str(tmp_path / "latin.jsonl")])
    with pytest.raises(ValueError, match=r"must end in one of \.jsonl"):
        load_tasks([write(tmp_path / "piqa.json", [QUESTION])])


def test_white_space_at_the_ends_does_not_count(tmp_path):
    examples = [
        {"query": " Passage: a\nQuestion: b?\n", "choices": ["\tx ", "y"], "gold": 1, "comment": "ignored"},
        {"query": "Question: a\nHe went ", "choices": ["x", "y"], "gold": 0},
    ]
    task = read_local_task(Path(write(tmp_path / "a.b.jsonl.gz", examples)))
    assert (task.name, task.file) == ("a.b", "a.b.jsonl.gz")
    assert task.documents == [
        {"query": "Passage: a\nQuestion: b?\nAnswer:", "choices": ["x", "y"], "gold": 1},
        {"query": "Question: a\nHe went", "choices": ["x", "y"], "gold": 0},
    ]


@pytest.mark.parametrize(("name", "count"), REAL_FILES.items())
def test_real_files(name, count, tokenizer):
    path = REAL / f"{name}.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {REAL}; PATCH_ZERO_SHOT_DATA names another directory")
    task = read_local_task(path)
    assert len(task.documents) == count
    if name in ("arc_easy", "piqa", "boolq"):
        assert all(d["query"].endswith("\nAnswer:") for d in task.documents)
    result = zero_shot(tiny_llama(max_position_embeddings=8192), tokenizer, load_tasks([str(path)]), limit=2, progress=False)
    assert (result.tasks[0].name, result.tasks[0].examples, result.truncated) == (name, 2, 0)


# ---- names


class Hub:
    """lm-eval's TaskManager over tasks of ours; "broken" has data that cannot be had, "pair" is a group."""

    tasks: dict[str, list[dict]] = {}  # noqa: RUF012  filled by the fixture

    def __init__(self) -> None:
        self.all_tasks = [*self.tasks, "broken", "pair", "several"]

    def load(self, names: list[str]) -> dict:
        from lm_eval.api.group import Group

        (name,) = names
        if name == "broken":
            raise ConnectionError("Couldn't reach 'owner/broken' on the Hub\nmore")
        if name in self.tasks:
            return {"tasks": {name: self.task(name)}, "groups": {}, "group_map": {}}
        tasks = {child: self.task(child) for child in self.tasks}
        if name == "several":
            return {"tasks": tasks, "groups": {}, "group_map": {}}
        metrics = [{"metric": "acc", "weight_by_size": True}]
        group = Group.from_config({"group": "pair", "task": list(tasks), "aggregate_metric_list": metrics})
        for task in tasks.values():
            group.add(task)
        return {"tasks": tasks, "groups": {"pair": group}, "group_map": {"pair": list(tasks)}}

    def task(self, name: str):
        from learning.evaluation.local_tasks import LocalTask, _document, _kind

        documents = [_document(e, _kind(e, ""), "") for e in self.tasks[name]]
        return module._harness_task(LocalTask(name, name, documents))


@pytest.fixture
def hub(monkeypatch):
    import lm_eval.tasks

    monkeypatch.setattr(Hub, "tasks", {"first_questions": questions(5), "second_questions": questions(9)})
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Hub)


def test_hub_tasks_groups_and_tags(hub, tokenizer, three_files):
    model = tiny_llama()
    names = ["first_questions", "second_questions"]
    single = zero_shot(model, tokenizer, load_tasks([*names, three_files[1]]), progress=False)
    assert [task.name for task in single.tasks] == [*names, "told"]
    several = zero_shot(model, tokenizer, load_tasks(["several"]), progress=False)
    assert [task.record() for task in several.tasks] == [task.record() for task in single.tasks[:2]]
    (group,) = zero_shot(model, tokenizer, load_tasks(["pair"]), progress=False).tasks
    assert (group.name, group.examples) == ("pair", 14)
    assert group.record()["subtasks"] == [task.record() for task in single.tasks[:2]]
    weighted = sum(task.scores["acc"].value * task.examples for task in group.subtasks) / 14
    assert group.scores["acc"].value == pytest.approx(weighted)
    assert group.scores["acc"].stderr is not None


def test_names_nobody_knows_and_data_that_cannot_be_had(hub, tmp_path):
    with pytest.raises(
        ValueError, match=r"task 'first_question' is neither a task of lm-eval nor a file; near are first_questions"
    ):
        load_tasks(["first_question"])
    with pytest.raises(ValueError, match=r"task 'xyz' is neither .*; `lm_eval ls tasks` lists the names"):
        load_tasks(["first_questions", "xyz"])
    with pytest.raises(
        ValueError, match=r"task 'broken': its data cannot be had from the hub \(Couldn't reach 'owner/broken' on the Hub\)"
    ):
        load_tasks(["broken"])
    with pytest.raises(ValueError, match="two tasks are called 'first_questions': name it once, or rename the file"):
        load_tasks(["first_questions", write(tmp_path / "first_questions.jsonl", questions(2))])
    with pytest.raises(ValueError, match="two tasks are called 'first_questions', a local file and one of the hub's"):
        load_tasks(["pair", write(tmp_path / "first_questions.jsonl", questions(2))])
    with pytest.raises(ValueError, match="no task named"):
        load_tasks([])


def test_too_many_examples_for_the_prompt(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match=r"task 't': 4 few-shot examples asked for; it has 3 besides the one to score"):
        load_tasks([write(tmp_path / "t.jsonl", clozes(4))], 4)

    class WithSplit:  # like MMLU, which has five examples for the prompt and is asked with five
        documents = read_local_task(tmp_path / "t.jsonl").documents

        @staticmethod
        def harness_config():
            config = read_local_task(tmp_path / "t.jsonl").harness_config()
            return config | {"fewshot_split": "test", "test_split": None, "validation_split": "test"}

    monkeypatch.setattr(Hub, "task", lambda self, name: module._harness_task(WithSplit()))
    assert load_tasks(["first_questions"], 4).rows == ("first_questions",)
    with pytest.raises(ValueError, match=r"5 few-shot examples asked for; it has 4$"):
        load_tasks(["first_questions"], 5)


def test_paper_stands_for_eight_tasks_that_lm_eval_has(hub):
    import lm_eval

    assert len(PAPER_TASKS) == 8
    folders = {"arc_easy": "arc", "arc_challenge": "arc"}
    for name in PAPER_TASKS:
        assert (Path(lm_eval.__file__).parent / "tasks" / folders.get(name, name)).is_dir()
    with pytest.raises(ValueError, match="task 'piqa' is neither"):
        load_tasks(["paper"])


def test_without_lm_eval_one_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(ValueError, match=r"zero-shot tasks need lm-eval; pip install 'patch-compiler\[eval\]'"):
        load_tasks([write(tmp_path / "t.jsonl", [QUESTION])])


def test_a_task_that_generates_runs_only_uncompiled(tmp_path, tokenizer):
    tasks = load_tasks([write(tmp_path / "t.jsonl", clozes(2))])
    config = {"output_type": "generate_until", "generation_kwargs": {"until": ["."], "max_gen_toks": 3}}
    local = read_local_task(tmp_path / "t.jsonl")

    class Writing:
        documents = local.documents

        @staticmethod
        def harness_config():
            return local.harness_config() | config | {"metric_list": [{"metric": "exact_match"}]}

    tasks.harness["tasks"]["t"] = module._harness_task(Writing())
    tasks.harness["tasks"]["t"].set_config(key="num_fewshot", value=0)
    (task,) = zero_shot(tiny_llama(), tokenizer, tasks, progress=False).tasks
    assert set(task.scores) == {"exact_match"}
    assert task.log_likelihoods == ()
    with pytest.raises(ValueError, match="task 't' generates text"):
        zero_shot(torch.compile(tiny_llama(), backend="eager"), tokenizer, tasks, progress=False)


def test_table_has_a_line_for_each_metric_and_a_mean():
    tasks = tuple(
        TaskResult(name, "x", None, 50, 0, {"acc": Score(value, 0.03), "f1": Score(2.5e6, None)})
        for name, value in (("one", 0.5), ("two", 0.25))
    )
    lines = ZeroShot(tasks, 0).table().splitlines()
    assert lines[2].split() == ["one", "acc", "0.5000", "0.0300", "50", "0"]
    assert lines[3].split() == ["one", "f1", "2.5e+06", "–", "50", "0"]
    assert lines[6].split() == ["mean", "of", "2", "tasks", "acc", "0.3750", "0.0212", "–", "–"]
    assert "mean" not in ZeroShot(tasks[:1], 0).table()


# ---- the command


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(SEED)
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


def test_command(base, three_files, tmp_path, capsys):
    out = tmp_path / "results.json"
    common = ["evaluate", str(base), "--device", "cpu", "--quiet", "-o", str(out)]
    options = ["--limit", "3", "--batch-size", "2", "--num-fewshot", "0"]
    assert main([*common, "--tasks", ",".join(three_files), *options]) == 0
    shown = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert "perplexity" not in record  # of a text
    assert record["model"] == "base"
    assert record["versions"].keys() >= {"lm-eval", "torch", "transformers"}
    assert (record["zero_shot"]["limit"], record["zero_shot"]["batch_size"]) == (3, 2)
    for task, metrics in zip(record["zero_shot"]["tasks"], ({"acc", "acc_norm"}, {"acc", "perplexity"}, {"acc"}), strict=True):
        assert task["examples"] == 3
        assert task["metrics"].keys() == metrics
        for metric in task["metrics"].values():
            if metric["value"] < 1e4:
                assert f"{metric['value']:.4f}" in shown
    assert record["zero_shot"]["mean_accuracy"]["tasks"] == ["asked", "told", "chosen"]
    assert "mean of 3 tasks" in shown
    assert "only the first 3 examples" in shown
    text = tmp_path / "text.txt"
    text.write_text("the tile map of a weight says which of its tiles are dense " * 20)
    assert main([*common, "--tasks", three_files[0], "--text", str(text)]) == 0
    record = json.loads(out.read_text())
    assert record["perplexity"] > 1
    assert record["context"] == 128  # all that the model reads, being less than 4096
    assert len(record["zero_shot"]["tasks"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "5"], "--limit has no use without --tasks"),
        (["--num-fewshot", "0"], "--num-fewshot has no use without --tasks"),
        (["--tasks", "x.jsonl", "--stride", "5"], "--stride has no use without --text"),
        (["--tasks", "x.jsonl", "--limit", "0"], "not a positive integer"),
        (["--tasks", "x.jsonl", "--num-fewshot", "-1"], "is not a number of examples"),
        (["--tasks", "x.jsonl"], "task file 'x.jsonl' cannot be read"),
        (["--tasks", ""], "task '' is neither"),
    ],
)
def test_command_refuses_before_the_model_is_loaded(options, message, capsys, monkeypatch, hub, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_command, "load_model", None)
    try:
        code = main(["evaluate", "model", *options])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    assert code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_local_files_need_no_network_and_leave_nothing_behind(base, three_files, tmp_path):
    places = {name: tmp_path / name for name in ("home", "work", "temp")}
    for place in places.values():
        place.mkdir()
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = unset | {
        "HOME": str(places["home"]), "TMPDIR": str(places["temp"]), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
    }  # fmt: skip
    command = [sys.executable, "-m", "learning", "evaluate", str(base), "--tasks", ",".join(three_files), "--limit", "2"]
    done = subprocess.run(
        [*command, "-o", "results.json"], cwd=places["work"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    left = {path.relative_to(tmp_path).as_posix() for place in places.values() for path in place.rglob("*") if path.is_file()}
    assert left == {"work/results.json"}
