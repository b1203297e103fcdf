"""Names of zero-shot tasks and the command: local files need no network, bad input is refused early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learning.__main__ import main
from learning.commands import evaluate as evaluate_command
from learning.evaluation import zero_shot as module
from learning.evaluation.local_tasks import read_local_task
from learning.evaluation.zero_shot import PAPER_TASKS, Score, TaskResult, ZeroShot, load_tasks, zero_shot

from .conftest import SEED
from .tiny import save_tiny, tiny_llama
from .zero_shot_tasks import (
    QUESTION,
    clozes,
    questions,
    three_kinds,
    write,
)

pytest.importorskip("lm_eval", reason="zero-shot tasks need lm-eval: pip install '.[eval]'")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def three_files(tmp_path) -> list[str]:
    return three_kinds(tmp_path)


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


def test_tasks_that_fail_leave_the_perplexity(base, tmp_path, capsys):
    out, text = tmp_path / "results.json", tmp_path / "text.txt"
    text.write_text("the tile map of a weight says which of its tiles are dense " * 20)
    long = write(tmp_path / "long.jsonl", [{"context": "the", "continuation": "tile " * 200}])
    assert (
        main(["evaluate", str(base), "--device", "cpu", "--quiet", "-o", str(out), "--text", str(text), "--tasks", long]) == 2
    )
    shown = capsys.readouterr()
    assert "the model scores 1 to 128" in shown.err
    record = json.loads(out.read_text())
    assert f"perplexity  {record['perplexity']:.4f}" in shown.out
    assert "zero_shot" not in record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "5"], "--limit has no use without --tasks"),
        (["--num-fewshot", "0"], "--num-fewshot has no use without --tasks"),
        (["--tasks", "x.jsonl", "--stride", "5"], "--stride has no use without --text"),
        (["--tasks", "x.jsonl", "--limit", "0"], "not a positive integer"),
        (["--tasks", "x.jsonl", "--num-fewshot", "-1"], "is not a number of examples"),
        (["--tasks", "x.jsonl"], "task file 'x.jsonl' cannot be read"),
        (["--tasks", " ,"], "--tasks names no task"),
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
