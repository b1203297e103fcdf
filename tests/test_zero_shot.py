"""Zero-shot scores equal ones computed request by request; what is wrong with a local file is said."""

from __future__ import annotations

import logging
import math
import os
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from learning.evaluation.local_tasks import read_local_task
from learning.evaluation.zero_shot import Score, load_tasks, zero_shot
from patch_compiler import HardMask, apply_masks, convert, named_linears
from patch_compiler.linears import weight_of

from .strategies import random_hard_mask
from .tiny import VOCABULARY, tiny_llama
from .zero_shot_tasks import (
    QUESTION,
    all_likelihoods,
    clozes,
    log_likelihood,
    pairs,
    questions,
    schemas,
    three_kinds,
    write,
)

pytest.importorskip("lm_eval", reason="zero-shot tasks need lm-eval: pip install '.[eval]'")

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("PATCH_ZERO_SHOT_DATA") or ROOT.parent / "shared" / "data" / "zeroshot")
REAL_FILES = {"arc_easy": 2376, "piqa": 1838, "winogrande": 1267, "lambada_openai": 5153, "boolq": 3270}


@pytest.fixture
def three_files(tmp_path) -> list[str]:
    return three_kinds(tmp_path)


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
