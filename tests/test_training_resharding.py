"""A run goes on with another number of processes: the optimizer's state is cut anew, training the same but for rounding."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learning.training.distributed import Ranks
from learning.training.optimizer import LearnedOptimizer
from learning.training.resharding import state_of_part

from .learning_runs import Run, stop_after, together

CASES: dict[str, dict[str, Any]] = {
    "float32": {"model": {"intermediate_size": 49}},  # an odd number of rows: cut along another dimension than others are
    # with two processes some of the parts are too small for 8-bit state, which the whole has, and some are not
    "compact": {"precision": "compact", "model": {"hidden_size": 64, "intermediate_size": 96}},
}
STEPS = 3  # completed when the number of processes changes, of 6


# ---- cutting anew


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3), before=st.integers(1, 6), after=st.integers(1, 6),
    dimensions=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)  # fmt: skip
def test_every_process_gets_its_part_bit_for_bit(shape, before, after, dimensions):
    """Uneven and empty parts included."""
    whole = torch.randn(shape)
    whole.view(-1)[0], whole.view(-1)[-1] = -0.0, torch.nan
    scalar = torch.tensor(7.0)
    states = [{"step": scalar, "mean": whole[extent]} for extent in extents(whole.shape, before, dimensions[0])]
    found = torch.full(shape, 99.0)
    for extent in extents(whole.shape, after, dimensions[1]):
        state = state_of_part(states, whole.shape, extent)
        assert state["step"] == scalar
        found[extent] = state["mean"]
    assert torch.equal(found.view(torch.int32), whole.view(torch.int32))


def test_what_all_processes_have_whole_is_taken_once():
    whole = torch.randn(5)
    (extent,) = extents(whole.shape, 1, 0)
    state = state_of_part([{"mean": whole}, {"mean": whole}], whole.shape, extent)
    assert torch.equal(state["mean"], whole)
    whole.zero_()  # it may be a file's memory, which is closed
    assert bool((state["mean"] != 0).all())


@pytest.mark.parametrize("shapes", [[(4, 6), (3, 6)], [(4, 6), (4, 5)], [(4, 6), (4,)], [(2, 3), (2, 3)]])
def test_parts_that_make_no_whole_are_refused(shapes):
    whole = torch.Size((8, 6))
    (extent,) = extents(whole, 1, 0)
    with pytest.raises(ValueError, match=r"mean in parts of \[\(.*\)\], which make up no \(8, 6\)"):
        state_of_part([{"mean": torch.zeros(shape)} for shape in shapes], whole, extent)


def extents(shape: torch.Size, world: int, dimension: int) -> list[tuple[slice, ...]]:
    """As FSDP cuts: like torch.chunk, with empty parts at the end."""
    size = -(-shape[dimension] // world)
    found = []
    for rank in range(world):
        extent = [slice(0, n) for n in shape]
        extent[dimension] = slice(min(rank * size, shape[dimension]), min((rank + 1) * size, shape[dimension]))
        found.append(tuple(extent))
    return found


# ---- two processes and one


@pytest.fixture(scope="module")
def seed() -> int:
    return torch.initial_seed() % 2**31


def run_through(name: str, seed: int, directory: Path, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """To the end. What an optimizer loads of another number of processes it leaves in files, too."""
    original = LearnedOptimizer.load_parts

    def load_parts(self, parts):
        original(self, parts)
        torch.save(self.state_dict(), directory / f"optimizer-{ranks.rank if ranks else 0}.pt")

    run = Run("joint", seed, **CASES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnedOptimizer, "load_parts", load_parts)
        run.train(directory, ranks=ranks, resume=True)
    return run.learned()


def of_two(ranks: Ranks, directory: Path, name: str, seed: int) -> list[dict[str, Tensor]]:
    """What each of two processes does."""
    with torch.compiler.set_stance("force_eager"):
        stop_after(STEPS, Run("joint", seed, **CASES[name]), directory / "from two", ranks)
        return [run_through(name, seed, directory / run, ranks) for run in ("two", "from one")]


@dataclass
class Results:
    """one, two: learned by that many processes from begin to end. from_one: by two after one, from_two: by one after two."""

    name: str
    directory: Path
    one: dict[str, Tensor]
    two: dict[str, Tensor]
    from_one: dict[str, Tensor]
    from_two: dict[str, Tensor]

    def saved(self, run: str, steps: int) -> list[Any]:
        """The state of each process's optimizer."""
        return states_in(self.directory / run / "checkpoints" / f"step-{steps:08d}")


@pytest.fixture(scope="module", params=CASES)
def results(request, tmp_path_factory, seed) -> Results:
    name = request.param
    if name == "compact":
        pytest.importorskip("torchao")
    directory = tmp_path_factory.mktemp(name)
    with torch.compiler.set_stance("force_eager"):
        one = run_through(name, seed, directory / "one")
        stop_after(STEPS, Run("joint", seed, **CASES[name]), directory / "from one")
        (two, from_one), _ = together(of_two, 2, directory, name, seed)
        with pytest.warns(UserWarning, match="processes 2, now 1: the run goes on, the same but for rounding"):
            from_two = run_through(name, seed, directory / "from two")
    return Results(name, directory, one, two, from_one, from_two)


@pytest.mark.parametrize("begun", ["from one", "from two"])
def test_the_state_is_what_it_was(results, begun):
    """float32 bit for bit; state in 8 bits within their distance, since blocks and their scales are others."""
    saved, loaded = results.saved(begun, STEPS), states_in(results.directory / begun)
    assert {len(saved), len(loaded)} == {1, 2}
    compared = 0
    for number, optimizer in enumerate(saved[0]):
        for index, state in optimizer["state"].items():
            for name in state:
                before, after = ([each[number]["state"][index][name] for each in side] for side in (saved, loaded))
                shape = min(before, after, key=len)[0].shape  # of one process
                was, now = (joined([plain(part) for part in side], shape) for side in (before, after))
                within = joined([rounding(part) for part in after], shape)
                assert bool(((now - was).abs() <= within).all()), (number, index, name)
                compared += int(now.dim() > 0 and bool((was != 0).any()))
    assert compared == 2 * sum(name.startswith(("tile_logits", "pattern_logits")) for name in results.one)


@pytest.mark.parametrize(("begun", "world"), [("from one", "two"), ("from two", "one")])
def test_the_state_is_kept_as_in_a_run_of_as_many(results, begun, world):
    """In 8 bits where it was, and no process has more than its part."""
    assert forms(results.saved(begun, 6)) == forms(results.saved(world, 6))


def test_nine_of_ten_logits_are_nearer_than_rounding_alone_brings_them(results):
    """Runs of one and of two processes differ by rounding from the first step on; one that changes, only from the fourth.

    So it must be nearer to the run of those that began it than the two are to each other. Not all logits: a step in which a
    gradient is near zero makes rounding large.
    """
    apart = distance(results.one, results.two)
    assert apart > 0
    assert distance(results.from_one, results.one) < apart
    assert distance(results.from_two, results.two) < apart


@pytest.mark.filterwarnings("ignore:.*the same but for rounding")
def test_parts_that_are_damaged_or_of_another_run_are_named(results, seed, tmp_path):
    checkpoint = shutil.copytree(
        results.directory / "from two" / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003"
    )
    (checkpoint / "optimizer-1.pt").write_bytes((checkpoint / "optimizer-1.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"step-00000003: its optimizer-1\.pt cannot be read .* remove that directory"):
        run_through(results.name, seed, tmp_path)
    shutil.copy(results.directory / "one" / "checkpoints" / "step-00000006" / "optimizer-0.pt", checkpoint / "optimizer-1.pt")
    with pytest.raises(ValueError, match=r"its optimizer-\*\.pt cannot be read \(exp_avg in parts of .*, which make up no"):
        run_through(results.name, seed, tmp_path)


def states_in(directory: Path) -> list[Any]:
    return [torch.load(file, weights_only=True) for file in sorted(directory.glob("optimizer-*.pt"))]


def plain(part: Tensor) -> Tensor:
    return torch.empty(part.shape).copy_(part)


def rounding(part: Tensor) -> Tensor:
    """How far a number that is kept in this form may be from what was to be kept."""
    if part.dtype == torch.float32 and type(part) is Tensor:
        return torch.zeros(part.shape)
    if type(part) is Tensor:
        return plain(part).abs() * torch.finfo(part.dtype).eps
    # codes stand for shares of the largest of a block, the lowest of them a little above -1
    gap = max(float(part.qmap.diff().max()) / 2, 1 + float(part.qmap.min()) if part.signed else 0.0)
    return (part.scale * gap * 1.001).repeat_interleave(part.block_size).view(part.shape)


def joined(parts: list[Tensor], whole: torch.Size) -> Tensor:
    cut = [d for d, size in enumerate(whole) if parts[0].shape[d] != size]
    return torch.cat(parts, cut[0]) if cut else parts[0]


def forms(states: list[Any]) -> list[Any]:
    return [
        {(index, name): (type(value).__name__, value.dtype, value.shape) for index, own in optimizer["state"].items()
         for name, value in own.items()}
        for state in states for optimizer in state
    ]  # fmt: skip


def distance(learned: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    apart = torch.cat([(learned[name].float() - tensor.float()).abs().flatten() for name, tensor in other.items()])
    return float(apart.quantile(0.9))
