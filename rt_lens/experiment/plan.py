"""Estimates what a run needs before it starts, from the experiment's texts and the model's sizes, without weights.

Counts (items, steps, trained parameters, files) are exact. Tokens are exact where the tokenizer is available. Memory
and time follow from them by the rules of `costs`, and are estimates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rt_lens.common.arm_labels import ArmLabel
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.costs import ACTIVATIONS, Work, total
from rt_lens.experiment.shape import Shape, reader_of, shape_of
from rt_lens.experiment.stages import BYTES, Planner, protocols_of

_LIBRARIES = 800_000_000  # bytes of the imported libraries (torch, transformers and others); measured on Linux
_PER_BLOCK = 0.4e-3  # seconds of Python in one block's hooks and modules; measured
_LOADING = 20.0  # seconds of imports


@dataclass(frozen=True)
class Machine:
    """A device that runs the model.

    Attributes:
        name: of the device, and the source of the numbers.
        flops: multiplications and additions per second, in the model's type.
        bandwidth: bytes of weights read per second.
        memory: bytes; 0 where the system does not report it.
        gpu: whether it is a GPU.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    gpu: bool


GPU = Machine(
    "one 80 GB GPU (assumed: 100 TFLOP/s and 1.2 TB/s, a third and 60 % of an A100's in bfloat16)", 100e12, 1.2e12,
    80 * 10**9, True,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run needs. `str(plan)` is the plan as a page of text.

    Attributes:
        experiment: its name.
        model: name or path.
        dtype: of the weights.
        shape: the model's sizes.
        protocols: those that can run; every number is the larger one.
        exact: whether the model's own tokenizer counted the tokens.
        items: set -> number of items.
        steps: of one tuning run without early stopping.
        runs: number of tuning runs.
        trained: parameters that a rep-tuned run changes.
        stages: name -> Work.
        files: name -> bytes of the tensors in it.
        here: this machine, measured on matrices of the model's sizes.

    Example:
        >>> plan = plan_of(load_experiment("mood"))
        >>> plan.runs, plan.steps, plan.items["test, test"]
        (8, 10, 60)
        >>> sorted(plan.files)
        ['rep_tuned_away.safetensors', 'rep_tuned_toward.safetensors', 'vectors.safetensors']
    """

    experiment: str
    model: str
    dtype: str
    shape: Shape
    protocols: tuple[str, ...]
    exact: bool
    items: Mapping[str, int]
    steps: int
    runs: int
    trained: int
    stages: Mapping[str, Work]
    files: Mapping[str, int]
    here: Machine

    @property
    def weights(self) -> int:
        """Bytes of the model's weights."""
        return self.shape.parameters * BYTES[self.dtype]

    def on_gpu(self, stage: str) -> int:
        """Peak bytes of a stage on a GPU, with a tenth added for fragmentation in the allocator."""
        return round(1.1 * (self.weights + total(self.stages[stage].device)))

    def on_cpu(self, stage: str) -> int:
        """Peak bytes of a stage where the CPU runs the model."""
        work = self.stages[stage]
        return _LIBRARIES + self.weights + total(work.device) + total(work.host)

    def beside_gpu(self, stage: str) -> int:
        """Peak bytes of CPU memory where a GPU runs the model."""
        # The model is loaded into CPU memory before it goes to the GPU.
        return _LIBRARIES + total(self.stages[stage].host) + (self.weights if stage == "load" else 0)

    def peak(self, machine: Machine) -> tuple[str, int]:
        """The stage that needs most memory where the model runs, and its bytes."""
        bytes_of = self.on_gpu if machine.gpu else self.on_cpu
        return max(((stage, bytes_of(stage)) for stage in self.stages), key=lambda pair: pair[1])

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Stage -> seconds: arithmetic or reading the weights, whichever takes longer, and the time of Python."""
        shape, seconds = self.shape, {}
        for stage, work in self.stages.items():
            arithmetic = 2 * (work.tokens * shape.in_blocks + work.positions * shape.d_model * shape.d_vocab)
            read = work.passes * shape.in_blocks * BYTES[self.dtype]
            waiting = max(arithmetic / machine.flops, read / machine.bandwidth)
            seconds[stage] = waiting + work.passes * shape.n_layers * _PER_BLOCK
        return {**seconds, "load": _LOADING + self.weights / 1e9}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_of(experiment: Experiment) -> Plan:
    """Estimates what a run of this experiment needs. It loads no weights, and measures this machine's speed.

    Args:
        experiment: from `load_experiment`.

    Raises:
        ValueError: for a model without a known configuration, blocks outside the model, or too few topics.

    Example:
        >>> print(plan_of(load_experiment("mood")))
        Plan of mood on smollm2-135m-instruct. Nothing was run; memory and time are estimates.
        Model: 30 blocks, width 576, 134,515,008 parameters, 538.1 MB in float32.
        Protocol: answers.
        ...
    """
    shape, tokenizer, local = shape_of(experiment.model)
    _check(experiment, shape)
    model = reader_of(tokenizer)
    first, *others = [
        Planner(experiment, shape, model, protocol, local) for protocol in protocols_of(experiment, model)
    ]
    items, stages = first.items(), first.stages()
    for other in others:
        items = {name: max(counts.get(name, 0) for counts in (items, other.items())) for name in items | other.items()}
        stages = {name: stages[name].or_else(work) for name, work in other.stages().items()}
    size = BYTES[experiment.dtype]
    delta = shape.trained(experiment.tune) * size
    return Plan(
        experiment=experiment.name,
        model=experiment.model,
        dtype=experiment.dtype,
        shape=shape,
        protocols=tuple(planner.protocol.name for planner in (first, *others)),
        exact=tokenizer is not None,
        items=items,
        steps=max(planner.steps for planner in (first, *others)),
        runs=len(experiment.tuning_runs),
        trained=shape.trained(experiment.tune),
        stages=stages,
        files={
            "vectors.safetensors": 4 * shape.n_layers * shape.d_model,
            **(
                {f"{ArmLabel('rep_tuned', direction).stem}.safetensors": delta for direction in DIRECTIONS}
                if "rep_tuned" in experiment.arms
                else {}
            ),
        },
        here=measured(shape, experiment.dtype),
    )


def _check(experiment: Experiment, shape: Shape) -> None:
    if experiment.dtype not in BYTES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, BYTES))}, got {experiment.dtype!r}.")
    for name, blocks in experiment.blocks.items():
        if wrong := [block for block in blocks if not 0 <= block < shape.n_layers]:
            raise ValueError(
                f"{name} contains {wrong[0]}, but this model has blocks 0..{shape.n_layers - 1}. "
                "Choose different layers."
            )


def measured(shape: Shape, dtype: str) -> Machine:
    """Measures this machine on one block's matrices: many rows for arithmetic, one row for reading weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    numbers = shape.in_blocks // shape.n_layers
    wide = numbers // (2 * shape.d_model)  # two matrices, in and out, with as many parameters as a block
    weights = [
        torch.full(sides, 1e-3, dtype=kind, device=device) for sides in ((wide, shape.d_model), (shape.d_model, wide))
    ]
    rows = max(1, min(512, int(5e9) // (2 * numbers)))

    def forward(n: int) -> Callable[[], Any]:
        x = torch.ones(n, shape.d_model, dtype=kind, device=device)
        return lambda: F.linear(F.silu(F.linear(x, weights[0])), weights[1])

    read = numbers * BYTES[dtype]
    if device.type == "cuda":
        memory, name = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    else:
        memory, name = _memory(), f"this machine's CPU, {torch.get_num_threads()} threads"
    flops, bandwidth = 2 * rows * numbers / _seconds(forward(rows), device), read / _seconds(forward(1), device)
    return Machine(
        f"{name} (measured on one block's matrices: {flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s)", flops,
        bandwidth, memory, device.type == "cuda",
    )  # fmt: skip


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of three runs, after one run as a warm-up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def _memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not report it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lines(plan: Plan) -> list[str]:
    shape = plan.shape
    counted = (
        "counted by the model's tokenizer" if plan.exact else "estimated: words x 1.4, and 24 for the chat template"
    )
    lines = [
        f"Plan of {plan.experiment} on {plan.model}. Nothing was run; memory and time are estimates.",
        f"Model: {shape.n_layers} blocks, width {shape.d_model:,}, {shape.parameters:,} parameters, "
        f"{gigabytes(plan.weights)} in {plan.dtype}.",
        f"Protocol: {' or '.join(plan.protocols)}{' (the larger number of the two)' if plan.protocols[1:] else ''}.",
        "Items: " + "; ".join(f"{name} {n:,}" for name, n in plan.items.items() if n) + ".",
        f"Tuning: {plan.runs} runs of at most {plan.steps} steps; a rep-tuned run trains {plan.trained:,} parameters "
        f"({plan.trained / shape.parameters:.1%} of the model).",
        "",
        f"{'stage':<10}{'tokens':>14}{'on a GPU':>12}{'its CPU':>12}{'on the CPU':>12}{'GPU time':>12}{'here':>12}",
    ]
    there, here = plan.seconds(GPU), plan.seconds(plan.here)
    for stage, work in plan.stages.items():
        lines.append(
            f"{stage:<10}{work.tokens:>14,.0f}{gigabytes(plan.on_gpu(stage)):>12}{gigabytes(plan.beside_gpu(stage)):>12}"
            f"{gigabytes(plan.on_cpu(stage)):>12}{duration(there[stage]):>12}{duration(here[stage]):>12}"
        )
    lines += [
        f"{'in all':<60}{duration(sum(there.values())):>12}{duration(sum(here.values())):>12}",
        "",
        f"Tokens: {counted}. Half of the blocks count half; a gradient counts as the passes that it costs.",
        f"GPU: {GPU.name}.",
        f"Here: {plan.here.name}.",
        _verdict(plan, GPU, "80 GB GPU"),
        _verdict(plan, plan.here, "Here"),
        "Files: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.files.items())
        + "; results.json, tables, responses and report.html, a few MB.",
        "Next: the same command without --plan runs the experiment.",
    ]  # fmt: skip
    return lines


def _verdict(plan: Plan, machine: Machine, label: str) -> str:
    """Whether the run fits into memory, by the stage that needs most, with the content of that memory."""
    stage, need = plan.peak(machine)
    work = plan.stages[stage]
    parts = {"weights": plan.weights, **work.device}
    if not machine.gpu:
        parts |= {"libraries": _LIBRARIES, **work.host}
    held = ", ".join(
        f"{name} {gigabytes(size)}" for size, name in sorted((size, name) for name, size in parts.items() if size)[::-1]
    )
    if not machine.memory:
        fits = "This system does not report its memory."
    elif need <= machine.memory:
        fits = f"It fits ({need / machine.memory:.0%} of {gigabytes(machine.memory)})."
    else:
        fits = f"IT DOES NOT FIT into {gigabytes(machine.memory)}. {_advice(plan, stage, machine.memory)}"
    return f"{label}: at most {gigabytes(need)}, in {stage}. {fits} Memory holds: {held}."


def _advice(plan: Plan, stage: str, memory: int) -> str:
    """Names the setting that lowers the largest part of a stage."""
    held = plan.stages[stage].device
    if plan.weights > 0.9 * memory or plan.weights > total(held):
        shorter = 'Set model.dtype = "bfloat16", or take' if BYTES[plan.dtype] == 4 else "Take"
        return f"{shorter} a smaller model."
    if stage != "tune":
        return "Lower test.n_prompts, choose.n_prompts or max_new_tokens."
    if max(held, key=lambda name: held[name]) == ACTIVATIONS:
        return "Lower tune.micro_batch_size."
    return "Set tune.lora_rank = 16, or name fewer tune.target_modules or tune.trained_layers."


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:,.0f} s"
