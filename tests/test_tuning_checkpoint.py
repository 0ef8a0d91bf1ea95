"""Checkpoints: a run that dies goes on to the same bits, and what is not its own is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_tuning import CONFIG, NEUTRAL, TARGETS

from rt_lens.models.backends import parameters_of
from rt_lens.tuning.checkpoint import Checkpoint, State
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.direction_targets import DirectionTarget, KLThenSteer
from rt_lens.tuning.loop import tune
from rt_lens.tuning.targets import Choice, Target
from rt_lens.tuning.tuning_data import prepare_data
from rt_lens.tuning.weights import FullRank
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.steering_vectors import SteeringVectors


class Stop(Exception):
    """What the tests' own hooks raise."""


class Counting:
    """A user's own hook that counts training passes, and stops the run at one of them."""

    def __init__(self, model: Any, at: int | None = None, error: type[BaseException] = Stop) -> None:
        self.passes, self.at, self.error = 0, at, error
        model.add_hook("blocks.1.hook_resid_post", self, is_permanent=True)

    def __call__(self, residual: torch.Tensor, hook: Any) -> None:
        if torch.is_grad_enabled() and residual.requires_grad:
            self.passes += 1
            if self.passes == self.at:
                raise self.error


@pytest.fixture
def run(tiny, tiny_vectors, tmp_path) -> Callable[..., WeightDelta]:
    """Tunes with a checkpoint every 3 steps; keywords change what is handed to `tune`."""

    def tuned(config: TuneConfig = CONFIG, *, vectors: Any = tiny_vectors, train: Any = TARGETS, **more: Any):
        settings = {"neutral": NEUTRAL, "checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 3}
        return tune(tiny, vectors, train, config, progress=False, **{**settings, **more})

    return tuned


def same(one: WeightDelta, other: WeightDelta) -> bool:
    """To the bit, with the same history."""
    return (
        one.changes.keys() == other.changes.keys()
        and all(torch.equal(one.changes[name], other.changes[name]) for name in one.changes)
        and one.history == other.history
    )


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint's state; every tensor of the file is read."""
    with safe_open(path, framework="pt") as stored:
        assert all(stored.get_tensor(name).isfinite().all() for name in stored.keys())  # noqa: SIM118
        return json.loads(stored.metadata()["rt_lens"])["state"]


def steps_after(resumed: Callable[[], WeightDelta], model: Any, each: int = 2) -> tuple[WeightDelta, int]:
    """The delta, and the steps that it took: `each` training passes are one."""
    counting = Counting(model)
    delta = resumed()
    model.reset_hooks(including_permanent=True)
    return delta, counting.passes // each


# One process for the whole file, since importing takes seconds: each job is a fork of it, which dies alone.
RUNNER = """
import json, os, sys, time, warnings
sys.path[:0] = sys.argv[1:]
warnings.simplefilter("ignore")
import torch
import tempfile
from pathlib import Path
from transformers import AutoTokenizer
from tiny_models import tiny_model
from rt_lens.models import DEFAULT_MODEL, BUNDLED_MODELS
from rt_lens.models.sources import bundled_folder
from rt_lens.tuning import Target, TuneConfig, tune
from rt_lens.vectors import Provenance, SteeringVectors

torch.set_num_threads(1)  # a fork of a process with several does not have them
tokenizer = AutoTokenizer.from_pretrained(str(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])))

def job(settings, targets, neutral, checkpoint, every, log, pause, out, d_mlp=64):
    model = tiny_model(tokenizer, Path(tempfile.mkdtemp()), d_mlp=d_mlp, n_ctx=64)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    told = Provenance("tiny", "mood", "mean_diff", "last", "none", 12, "0" * 64, 0, "0.1.0")
    vectors = SteeringVectors({"blocks.1.hook_resid_post": vector}, told)
    log = open(log, "a", buffering=1)
    def slow(residual, hook):
        if residual.requires_grad:
            log.write("pass\\n")
            time.sleep(pause)
    model.add_hook("blocks.1.hook_resid_post", slow)
    delta = tune(model, vectors, [Target(*t) for t in targets], TuneConfig(**settings),
                 neutral=[Target(*t) for t in neutral], checkpoint=checkpoint, checkpoint_every=every, progress=False)
    delta.save(out)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            job(**json.loads(line))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runner:
    """Runs that can be killed."""

    def __init__(self, folder: Path) -> None:
        (folder / "runner.py").write_text(RUNNER)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "runner.py"), str(Path(__file__).parents[1]), str(Path(__file__).parent)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.job: int | None = None
        self.heard()

    def heard(self) -> str:
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, config: dict[str, Any], name: str = "run", **more: Any) -> int:
        job = {
            "settings": config, "targets": [(t.prompt, t.answer) for t in TARGETS], "every": 3, "pause": 0.0,
            "neutral": [(t.prompt, t.answer) for t in NEUTRAL], "checkpoint": str(folder / f"{name}.safetensors"),
            "log": str(folder / f"{name}.log"), "out": str(folder / f"{name}-delta.safetensors"), **more,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.job = int(self.heard())
        return self.job

    def ended(self) -> int:
        """Waits for the job; its exit code."""
        self.job, code = None, int(self.heard())
        return code

    def killed(self, pid: int) -> bool:
        """Kills a job; False if it had ended by itself."""
        os.kill(pid, signal.SIGKILL)  # until the runner has waited for it, the number is still its own
        return self.ended() == -signal.SIGKILL


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked")
    made = Runner(tmp_path_factory.mktemp("runner"))
    yield made
    if made.job is not None:  # of a test that failed
        made.killed(made.job)
    made.process.stdin.close()
    made.process.wait(timeout=60)


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def steps_in(log: Path) -> float:
    """Steps begun in all: each has a pass for the targets and one for the neutral texts."""
    return len(log.read_text().splitlines()) / 2 if log.exists() else 0


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(runner, tmp_path, rank):
    config = {"layers": [1], "trained_layers": [1], "max_steps": 20, "epochs": 20, "batch_size": 2, "lora_rank": rank,
              "validate_every": 2, "patience": 99, "learning_rate": 3e-3}  # fmt: skip
    runner.start(tmp_path, config, "unbroken")
    assert runner.ended() == 0
    assert steps_in(tmp_path / "unbroken.log") == 20
    log, checkpoint = tmp_path / "run.log", tmp_path / "run.safetensors"
    reached, chance = 0, random.Random(rank)
    for _ in range(3):
        begun_before = steps_in(log)
        pid = runner.start(tmp_path, config, pause=0.03)
        wanted = begun_before + 3.5 + chance.uniform(0, 3)  # three steps more, which end in a write, and some
        until(lambda wanted=wanted: steps_in(log) >= wanted)
        assert runner.killed(pid)
        taken = reached + int(steps_in(log) - begun_before - 0.25)  # whole steps, but for the one it was killed in
        now = state_of(checkpoint)["step"]
        assert now % 3 == 0
        assert reached < now
        assert taken - now <= 2  # at most checkpoint_every - 1 are lost
        reached = now
    assert not (tmp_path / "run-delta.safetensors").exists()
    begun_before = steps_in(log)
    runner.start(tmp_path, config)
    assert runner.ended() == 0
    assert steps_in(log) - begun_before == 20 - reached  # it did go on from there
    unbroken, resumed = (WeightDelta.load(tmp_path / f"{name}-delta.safetensors") for name in ("unbroken", "run"))
    assert same(unbroken, resumed)
    assert any(change.abs().max() > 0 for change in resumed.changes.values())
    assert {row["split"] for row in resumed.history} == {"train", "validation"}
    assert all(row["kl"] is not None for row in resumed.history)


def half_written(folder):
    """Files of a write that is going on; its folder may be gone while one looks."""
    try:
        return [*folder.glob(".run.safetensors-*/.*"), *folder.glob(".run.safetensors-*/*")]
    except FileNotFoundError:
        return []


def test_a_kill_in_the_middle_of_writing_leaves_the_file_before_whole(runner, tmp_path):
    """With 31 MB of state after each step, most of the time is writing; the half-written folder is looked for."""
    config = {"layers": [1], "trained_layers": [1], "max_steps": 1000, "epochs": 1000, "batch_size": 2,
              "validate_every": 1000, "kl_weight": 0.0}  # fmt: skip
    checkpoint, chance, left, steps = tmp_path / "run.safetensors", random.Random(0), 0, [0]
    for _ in range(8):
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        pid = runner.start(tmp_path, config, every=1, d_mlp=20_000)
        until(lambda written=written: checkpoint.exists() and checkpoint.stat().st_mtime_ns != written)
        assert len(list(tmp_path.glob(".run.safetensors-*"))) <= 1  # what an earlier kill left is gone
        time.sleep(chance.uniform(0, 0.1))
        until(lambda: half_written(tmp_path))
        assert runner.killed(pid)
        left += bool(list(tmp_path.glob(".run.safetensors-*")))
        steps.append(state_of(checkpoint)["step"])
    assert left > 0
    assert all(after > before for before, after in pairwise(steps))
    assert checkpoint.stat().st_size > 30_000_000


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("by_loss", [False, True])
def test_stopped_at_any_step_it_goes_on_to_the_same_bits(run, tiny, tmp_path, rank, by_loss):
    both = {"cosine": [0, 1], "token": [1]} if by_loss else [1]
    config = replace(CONFIG, lora_rank=rank, trained_layers=both, token_learning_rate=1e-3)
    unbroken = run(config, checkpoint=None)
    each = 2
    for stopped_at in (2, 4, 7):
        place = tmp_path / f"{stopped_at}.safetensors"
        Counting(tiny, at=stopped_at * each)
        with pytest.raises(Stop):
            run(config, checkpoint=place)
        tiny.reset_hooks(including_permanent=True)
        assert place.exists() is (stopped_at > 3)
        delta, steps = steps_after(lambda place=place: run(config, checkpoint=place), tiny)
        assert steps == 8 - (stopped_at - 1) // 3 * 3
        assert same(delta, unbroken)


def test_early_stopping_and_best_weights_survive_a_break(run, tiny, tiny_vectors, tmp_path):
    """Validations are spoilt from the fourth on; the break comes in the last step before patience is at its end."""
    config = replace(
        CONFIG, cosine_weight=1.0, token_weight=0.0, kl_weight=0.0, centred=False, validate_every=1, patience=3,
        max_steps=20,
    )  # fmt: skip

    def spoilt(first: int, **more: Any) -> WeightDelta:
        seen: list[int] = []

        def spoil(residual: torch.Tensor, hook: Any) -> torch.Tensor | None:
            if residual.requires_grad:
                return None
            seen.append(1)  # where tuning is to lead away from
            return residual + 1e4 * tiny_vectors.vectors["blocks.1.hook_resid_post"] if len(seen) >= first else None

        with tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_post", spoil)]):
            return run(config, checkpoint_every=1, **more)

    unbroken = spoilt(4, checkpoint=None)
    ended = max(row["step"] for row in unbroken.history)
    losses = [row["total"] for row in unbroken.history if row["split"] == "validation"]
    assert 4 <= ended <= 6
    Counting(tiny, at=ended)
    with pytest.raises(Stop):
        spoilt(4)
    tiny.reset_hooks(including_permanent=True)
    stored = state_of(tmp_path / "run.safetensors")
    assert stored["worse"] == 2
    assert stored["best_loss"] == min(losses)
    delta, steps = steps_after(lambda: spoilt(4 - (ended - 1)), tiny, 1)
    assert steps == 1
    assert same(delta, unbroken)


def test_steering_drawn_at_each_step_is_drawn_again(run, tiny, tiny_vectors, tmp_path):
    config = replace(CONFIG, cosine_weight=0.0, kl_weight=5.0)
    more = {"steer": KLThenSteer([tiny_vectors], layers=[0, 1], strength=2.0, share=0.6)}
    unbroken = run(config, checkpoint=None, **more)
    Counting(tiny, at=9)
    with pytest.raises(Stop):
        run(config, **more)
    tiny.reset_hooks(including_permanent=True)
    assert state_of(tmp_path / "run.safetensors")["step"] == 3
    assert same(run(config, **more), unbroken)


def test_a_finished_run_gives_its_delta_at_once(run, tiny, tmp_path):
    first = run()
    assert state_of(tmp_path / "run.safetensors")["done"] is True
    before = (tmp_path / "run.safetensors").read_bytes()
    delta, steps = steps_after(run, tiny)
    assert steps == 0
    assert same(delta, first)
    assert (tmp_path / "run.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "run.safetensors"]


def test_a_weight_that_no_loss_reaches_is_kept_too(run, tiny, tmp_path):
    """The cosine is read at block 0, so block 1 gets no gradient and the optimiser has nothing of it."""
    config = replace(CONFIG, layers=[0], trained_layers=[0, 1], token_weight=0.0, kl_weight=0.0)
    unbroken = run(config, checkpoint=None)
    calls: list[bool] = []

    def stop(residual: torch.Tensor, hook: Any) -> None:
        calls.append(residual.requires_grad)
        if sum(calls) == 5:
            raise Stop

    tiny.add_hook("blocks.0.hook_resid_post", stop)
    with pytest.raises(Stop):
        run(config)
    tiny.reset_hooks()
    assert state_of(tmp_path / "run.safetensors")["step"] == 3
    assert same(run(config), unbroken)
    assert not unbroken.changes["blocks.1.attn.W_Q"].any()
    assert unbroken.changes["blocks.0.attn.W_Q"].any()


def test_memory_settings_may_differ_when_a_run_goes_on(run, tiny, tmp_path):
    Counting(tiny, at=9)
    with pytest.raises(Stop):
        run()
    tiny.reset_hooks(including_permanent=True)
    shutil.copy(tmp_path / "run.safetensors", tmp_path / "kept.safetensors")
    plain = run()
    for changes in ({"micro_batch_size": 1}, {"prefix_cache": "disk"}, {"prefix_cache": "off"}):
        shutil.copy(tmp_path / "kept.safetensors", tmp_path / "run.safetensors")
        each = 2 if "prefix_cache" in changes else 4  # one by one, two targets and two neutral texts
        delta, steps = steps_after(lambda changes=changes: run(replace(CONFIG, **changes)), tiny, each)
        assert steps == 5
        for name, change in plain.changes.items():
            assert torch.allclose(delta.changes[name], change, atol=1e-4)


def test_prepared_material_and_several_aims_go_on_too(run, tiny, tiny_vectors, tmp_path):
    aims = [
        DirectionTarget(tiny_vectors, layers=range(1, 2)),
        DirectionTarget(-1.0 * tiny_vectors, 0.5, "toward", layers=[1]),
    ]
    material = prepare_data(tiny, aims, TARGETS, CONFIG, neutral=NEUTRAL)
    unbroken = run(vectors=aims, train=material, neutral=(), checkpoint=None)
    Counting(tiny, at=9)
    with pytest.raises(Stop):
        run(vectors=aims, train=material, neutral=())
    tiny.reset_hooks(including_permanent=True)
    assert same(run(vectors=aims), unbroken)  # from the texts themselves, which make the same material
    assert WeightDelta.load(unbroken.save(tmp_path / "delta.safetensors")).config == json.loads(
        json.dumps(unbroken.config)
    )


OTHERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "seed": lambda v: {"config": replace(CONFIG, seed=1)},
    "learning_rate": lambda v: {"config": replace(CONFIG, learning_rate=1e-3)},
    "direction": lambda v: {"config": replace(CONFIG, direction="toward")},
    "max_steps": lambda v: {"config": replace(CONFIG, max_steps=9)},
    "lora_rank": lambda v: {"config": replace(CONFIG, lora_rank=2)},
    "target_modules": lambda v: {"config": replace(CONFIG, target_modules=["q"])},
    "vectors": lambda v: {"vectors": SteeringVectors({n: 1.01 * x for n, x in v.vectors.items()}, v.provenance)},
    "steer": lambda v: {"steer": KLThenSteer([v], layers=[1])},
    "train": lambda v: {"train": [Target("Question 0: what was it?", TARGETS[0].answer), *TARGETS[1:]]},
    "neutral": lambda v: {"neutral": NEUTRAL[1:]},
}  # fmt: skip


@pytest.fixture
def broken_off(run, tiny) -> None:
    """A checkpoint after 3 of 8 steps."""
    Counting(tiny, at=8)
    with pytest.raises(Stop):
        run()
    tiny.reset_hooks(including_permanent=True)


@pytest.mark.usefixtures("broken_off")
def test_another_runs_checkpoint_is_refused_by_name_and_kept(run, tiny, tiny_vectors, tmp_path):
    before = (tmp_path / "run.safetensors").read_bytes()
    for name, other in OTHERS.items():
        with pytest.raises(
            ValueError, match=f"checkpoint must be of this run, .*belongs to a run with other {name}[.,] "
        ):
            run(**other(tiny_vectors))
    assert (tmp_path / "run.safetensors").read_bytes() == before
    assert run().changes  # and its own is not


def test_a_checkpoint_with_the_names_of_before_resumes_to_the_same_bits(run, tiny, tmp_path):
    """Checkpoints were written with `kinds`, `token_rest` and the direction `out`."""
    config, path = replace(CONFIG, direction="suppress", free_nats=0.1), tmp_path / "run.safetensors"
    unbroken = run(config, checkpoint=None)
    Counting(tiny, at=8)
    with pytest.raises(Stop):
        run(config)
    tiny.reset_hooks(including_permanent=True)
    with safe_open(path, framework="pt") as stored:
        content = json.loads(stored.metadata()["rt_lens"])
    settings = content["run"]
    settings["direction"] = "out"
    settings["kinds"], settings["token_rest"] = settings.pop("target_modules"), settings.pop("free_nats")
    save_file(load_file(path), path, metadata={"rt_lens": json.dumps(content)})
    with pytest.warns(UserWarning, match="'token_rest' is now 'free_nats'; the old name still works"):
        resumed = run(config)
    assert same(resumed, unbroken)


@pytest.mark.usefixtures("broken_off")
def test_another_answer_to_a_held_out_prompt_is_refused(run, tiny, tiny_vectors):
    held = prepare_data(tiny, tiny_vectors, TARGETS, CONFIG, neutral=NEUTRAL).held_out[0].prompt
    other = [replace(target, answer=" Yes.") if target.prompt == held else target for target in TARGETS]
    with pytest.raises(ValueError, match="belongs to a run with other validation[.,] "):
        run(train=other)


@pytest.mark.usefixtures("broken_off")
@pytest.mark.parametrize("name", ["blocks.1.mlp.W_in", "blocks.0.attn.W_Q", "unembed.W_U"])
def test_a_model_with_other_weights_is_refused_trained_or_not(run, tiny, name):
    parameter = parameters_of(tiny)[name]
    kept = parameter.detach().clone()
    parameter.data.view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="belongs to a run with other model"):
        run()
    parameter.data.copy_(kept)
    assert run().changes


@pytest.mark.usefixtures("broken_off")
def test_shares_of_a_choice_count_as_the_runs_texts(run, tmp_path):
    choices = [Choice(f"Is {i} even?", (" yes", " no"), (1.0, 0.0)) for i in range(7)]
    path = tmp_path / "choices.safetensors"
    run(train=choices, checkpoint=path)
    other = [Choice(choice.prompt, choice.options, (0.5, 0.5)) for choice in choices]
    with pytest.raises(ValueError, match="other train, validation"):
        run(train=other, checkpoint=path)


@pytest.mark.usefixtures("broken_off")
def test_damaged_and_foreign_files_are_refused_and_kept(run, tiny, tmp_path):
    path = tmp_path / "run.safetensors"
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as stored:
        header = stored.metadata()
    tensors = load_file(path)
    first = next(name for name in tensors if name.startswith("now/"))

    def foreign(about: dict[str, str] | None, tensors: dict[str, torch.Tensor] = tensors) -> bytes:
        save_file(tensors, tmp_path / "made", metadata=about)
        return (tmp_path / "made").read_bytes()

    content = json.loads(header["rt_lens"])
    fewer = {name: tensor for name, tensor in tensors.items() if name != first}
    cases = {
        "must be a complete safetensors file": [b"", b"text", whole[:100], whole[:-4], whole + b"x"],
        "must be a checkpoint of schema 1": [
            foreign(None), foreign({"rt_lens": "{"}), foreign({"rt_lens": "[]"}), foreign({"rt_lens": "3"}),
            foreign({"rt_lens": json.dumps({**content, "kind": "weight_delta"})}),
            foreign({"rt_lens": json.dumps({**content, "schema": 2})}),
            foreign({"rt_lens": json.dumps({"kind": "tuning_checkpoint", "schema": 1})}),
        ],
        f"without a whole {first}": [foreign(header, fewer), foreign(header, fewer | {first: torch.ones(3)})],
    }  # fmt: skip
    counting = Counting(tiny)
    for says, contents in cases.items():
        for damaged in contents:
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"checkpoint.*{says}"):
                run()
            assert path.read_bytes() == damaged
    assert counting.passes == 0
    path.write_bytes(whole)
    assert run().changes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "must be the name of a file, got the folder"),
        ("file/run.safetensors", "must be a path that can be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(run, tiny, tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    calls: list[int] = []
    tiny.add_hook("hook_embed", lambda embedded, hook: calls.append(1), is_permanent=True)
    with pytest.raises((ValueError, OSError), match=f"checkpoint {says}"):
        run(checkpoint=tmp_path / name)
    assert not calls
    run(checkpoint=str(tmp_path / "new" / "folder" / "run.safetensors"))  # a folder that is not there yet is made
    assert calls
    assert (tmp_path / "new" / "folder" / "run.safetensors").exists()


@pytest.mark.usefixtures("broken_off")
def test_a_checkpoint_with_other_settings_is_refused_before_any_work(run, tiny):
    calls: list[int] = []
    tiny.add_hook("hook_embed", lambda embedded, hook: calls.append(1), is_permanent=True)
    with pytest.raises(ValueError, match="other seed"):
        run(replace(CONFIG, seed=1))
    assert not calls


def test_a_finished_run_in_a_folder_that_is_locked_still_gives_its_delta(run, tmp_path):
    first = run(checkpoint=tmp_path / "shared" / "run.safetensors")
    with full_disk(0):  # nothing can be written at all
        assert same(run(checkpoint=tmp_path / "shared" / "run.safetensors"), first)


def test_a_full_disk_warns_once_for_each_write_and_the_run_ends_well(run, tmp_path):
    unbroken = run(checkpoint=None)
    path = tmp_path / "run.safetensors"
    with full_disk(50_000), pytest.warns(UserWarning, match="could not be written at step") as warned:
        delta = run()
    said = [str(warning.message) for warning in warned]
    assert len(said) == 3
    for step, message in zip((3, 6, 8), said, strict=True):
        assert f"{path} could not be written at step {step}" in message
        assert "File too large" in message
        assert "there is none before it" in message
    assert same(delta, unbroken)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("broken_off")
def test_a_disk_that_fills_up_later_leaves_the_older_checkpoint_whole(run, tiny, tmp_path):
    unbroken = run(checkpoint=None)
    path = tmp_path / "run.safetensors"
    older = path.read_bytes()
    with full_disk(50_000), pytest.warns(UserWarning, match="the one before it is still there") as warned:
        assert same(run(), unbroken)
    assert len(warned) == 2
    assert path.read_bytes() == older
    assert list(tmp_path.iterdir()) == [path]
    delta, steps = steps_after(run, tiny)  # with room again it goes on from the older one
    assert steps == 5
    assert same(delta, unbroken)
    assert state_of(path)["done"] is True


def test_resuming_lets_go_of_the_file_it_read(run, tiny, tmp_path):
    """Else the room of a file that has been replaced stays taken for as long as the run lasts."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are read as Linux tells them")
    Counting(tiny, at=8)
    with pytest.raises(Stop):
        run()
    tiny.reset_hooks(including_permanent=True)
    mapped: list[bool] = []

    def look(residual: torch.Tensor, hook: Any) -> None:
        if residual.requires_grad:
            mapped.append(str(tmp_path / "run.safetensors") in Path("/proc/self/maps").read_text())

    tiny.add_hook("blocks.1.hook_resid_post", look)
    run()
    tiny.reset_hooks()
    assert mapped
    assert not any(mapped)
    stored = load_file(tmp_path / "run.safetensors")
    assert str(tmp_path / "run.safetensors") in Path("/proc/self/maps").read_text()  # and it would have been seen
    assert stored


def test_writing_needs_no_second_copy_of_the_state(tmp_path):
    """256 MB of state, written with less than 50 MB more."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is read as Linux tells it")

    def peak() -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1024

    leaf = FullRank(torch.nn.Parameter(torch.randn(4096, 4096).T))
    optimiser = torch.optim.AdamW([leaf.leaf], fused=True)
    leaf.leaf.grad = torch.ones_like(leaf.leaf)
    optimiser.step()
    leaf.leaf.grad = None
    state = State(best={"w/whole": leaf.leaf.detach().clone()}, step=1)
    kept = Checkpoint(tmp_path / "run.safetensors", {})
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = peak()
    kept.save(state, {"w": leaf}, optimiser)
    assert (tmp_path / "run.safetensors").stat().st_size > 4 * 64 * 1024**2
    assert peak() - before < 50
    copies = [tensor.clone() for tensor in state.best.values()]
    assert peak() - before > 50  # and one copy would have been seen
    assert copies


def test_the_embedded_model_goes_on_to_the_same_bits(model, pairs, tmp_path):
    vectors = extract_vectors(model, pairs.sample(4), layers=[29])
    config = replace(CONFIG, layers=[29], trained_layers=[29], target_modules=["o", "down"], max_steps=4, kl_weight=0.0)

    def run(checkpoint: Path | None) -> WeightDelta:
        more = {"checkpoint": checkpoint, "checkpoint_every": 2}
        return tune(model, vectors, TARGETS[:4], config, progress=False, **more)

    unbroken = run(None)
    calls: list[bool] = []

    def stop(residual: torch.Tensor, hook: Any) -> None:
        calls.append(residual.requires_grad)
        if sum(calls) == 4:
            raise Stop

    with pytest.raises(Stop), model.hooks(fwd_hooks=[("blocks.29.hook_resid_post", stop)]):
        run(tmp_path / "run.safetensors")
    assert state_of(tmp_path / "run.safetensors")["step"] == 2
    assert same(run(tmp_path / "run.safetensors"), unbroken)
    assert all(change.any() for change in unbroken.changes.values())
