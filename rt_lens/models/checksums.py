"""Checksums that tell whether something is still the same: tensors, a model's weights, its hooks, functions.

The same in every process and on every device. A checksum of a function or an object is of all that it computes with, as
far as Python shows it; what Python does not show is refused rather than taken for the same.
"""

from __future__ import annotations

import copyreg
import dis
import hashlib
import json
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rt_lens.models.protocol import Model

_PLAIN = (str, int, float, complex, bool, bytes, torch.dtype, torch.device, torch.Size, type(None), type(...))
_LIBRARIES = tuple(
    f"{Path(place).resolve()}{os.sep}"
    for place in (
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
        *(*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])),
    )
)
_NOT_COMPUTED_BY = ("__init__", "__new__", "__repr__", "__str__", "__eq__", "__hash__", "_abc_impl")
_TABLES = ("rotary_sin", "rotary_cos")
_SETTLED = 64  # rows of such a table that every model has


class Untellable(ValueError):
    """Something that cannot be told from others by what Python shows of it."""


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Checksum of tensors with their names, shapes and types, in the order given."""
    content = hashlib.sha256()
    for name, tensor in named:
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def parameters_sha256(model: Model | nn.Module) -> str:
    """Checksum of all parameters, whatever the model is called. Every weight is read: 135 million take 0.3 s."""
    return tensors_sha256(model.named_parameters())


def buffers_sha256(model: Model | nn.Module) -> str:
    """Checksum of all buffers; of rotary tables, which TransformerLens lengthens as texts grow, their beginning."""
    return tensors_sha256(
        (name, buffer[:_SETTLED] if name.rsplit(".", 1)[-1] in _TABLES else buffer)
        for name, buffer in model.named_buffers()
    )


def hooks_of(model: Model | nn.Module) -> list[dict[str, str]]:
    """What acts on a model's forward pass beside its weights: point, name and checksum of each hook, in their order.

    Raises:
        Untellable: a hook that holds something of which Python does not show what it is; names the hook point.
    """
    inside, found = _inside(model), []
    for name, module in model.named_modules():
        for hook in _acting_on(module):
            try:
                found.append({"point": name, "hook": _name(hook), "sha256": _sha256(hook, inside)})
            except Untellable as error:
                raise Untellable(f"the hook at {name or 'the model'} holds {error}") from None
    return found


def measure_sha256(measure: Any, model: Model | nn.Module) -> str | None:
    """Checksum of a function that measures, or of such an object: its code, and tensors and functions that it holds.

    Other numbers, lists and the like that it holds are left out: they may be what it counts.

    Args:
        measure: the function.
        model: whose own parts are told by their names, where the function holds some.

    Returns:
        None if it holds something of which Python does not show what it is.
    """
    try:
        return _sha256(measure, _inside(model), whole=False)
    except Untellable:
        return None


def _inside(model: Model | nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _acting_on(module: nn.Module) -> list[Any]:
    # Of a dictionary of hooks only the values: its keys are counted up over all models of a process.
    patched = [vars(module)["forward"]] if "forward" in vars(module) else []
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *patched]


def _name(hook: Any) -> str:
    """The name that a hook is shown by, without the address in memory that Python puts behind some."""
    return getattr(hook, "__name__", type(hook).__name__).partition(" at 0x")[0].lstrip("<")[:80]


def _sha256(value: Any, inside: Mapping[int, str], whole: bool = True) -> str:
    told = json.dumps(_Teller(inside, whole).told(value), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


class _Teller:
    """Takes a value apart into JSON: functions of installed packages by name, others by all that they compute with.

    Modules of the model itself are told by their names, and things met again by number.
    """

    def __init__(self, inside: Mapping[int, str], whole: bool) -> None:
        self.inside, self.whole = inside, whole
        self.met: dict[int, int] = {}
        self.held: list[Any] = []  # so that no address is given twice while it lasts

    def told(self, value: Any) -> Any:
        if isinstance(value, _PLAIN) and type(value).__module__ in ("builtins", "torch"):
            return [type(value).__name__, repr(value)]
        if isinstance(value, ModuleType):
            return ["module", value.__name__]
        if id(value) in self.inside:
            return ["of the model", self.inside[id(value)]]
        if id(value) in self.met:
            return ["again", self.met[id(value)]]
        self.met[id(value)] = len(self.met)
        self.held.append(value)
        return self._taken_apart(value)

    def _taken_apart(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return ["tensor", tensors_sha256([("", value)])]
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return ["array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, type):
            return ["class", self._of_package(value) or [value.__qualname__, self._members(value)]]
        if isinstance(value, FunctionType):
            return ["function", *self._function(value)]
        if isinstance(value, MethodType):
            return ["method", self.told(value.__self__), self.told(value.__func__)]
        if isinstance(value, BuiltinFunctionType):
            return ["builtin", value.__module__ or "", value.__qualname__, self.told(value.__self__)]
        if isinstance(value, partial):
            return ["partial", self._all([value.func, value.args, value.keywords])]
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            return ["mapping", [[self.told(key), self.told(part)] for key, part in value.items()]]
        if isinstance(value, list | tuple) and type(value).__module__ == "builtins":
            return [type(value).__name__, self._all(value)]
        if isinstance(value, Set) and type(value).__module__ == "builtins":
            return ["set", sorted(json.dumps(_Teller(self.inside, self.whole).told(part)) for part in value)]
        return [self._class(type(value)), self._state(value)]

    def _counts(self, value: Any) -> bool:
        """Whether what a function or an object holds is part of what it is."""
        lasting = (Tensor, np.ndarray, FunctionType, MethodType, BuiltinFunctionType, partial, type, nn.Module)
        frozen = is_dataclass(value) and value.__dataclass_params__.frozen  # type: ignore[union-attr]
        return self.whole or isinstance(value, lasting) or frozen

    def _named(self, parts: Mapping[str, Any]) -> list[Any]:
        return [[name, self.told(part)] for name, part in parts.items() if self._counts(part)]

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [self.told(value) for value in values]

    def _class(self, kind: type) -> Any:
        return self._of_package(kind) or self.told(kind)

    def _of_package(self, value: Any) -> str | None:
        """A class's or function's name, if whoever has the same packages has the same one."""
        module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
        file = getattr(sys.modules.get(module), "__file__", None)
        known = module in sys.builtin_module_names or module in ("builtins", "torch")
        if not known and not (file and str(Path(file).resolve()).startswith(_LIBRARIES)):
            return None
        return f"{module}.{name}"

    def _members(self, kind: type) -> Any:
        """A class of the user's own: what it computes by, and what it inherits."""
        own = []
        for name, part in sorted(vars(kind).items()):
            part = part.__func__ if isinstance(part, staticmethod | classmethod) else part
            computed_by = isinstance(part, FunctionType | property) or not name.startswith("__")
            if name in _NOT_COMPUTED_BY or not computed_by or type(part).__name__.endswith("_descriptor"):
                continue
            own.append([name, self._all([part.fget, part.fset]) if isinstance(part, property) else self.told(part)])
        return [[self._class(base) for base in kind.__bases__], own]

    def _function(self, function: FunctionType) -> list[Any]:
        named = self._of_package(function)
        if named and "<locals>" not in named:  # what else it holds are decorations
            return [named]
        cells = [_content(cell) for cell in function.__closure__ or ()]
        held = self._all([function.__defaults__, function.__kwdefaults__, list(filter(self._counts, cells))])
        if named:
            return [named, held]
        read = [name for name in _globals_read(function.__code__) if name in function.__globals__]
        around = self._named({name: function.__globals__[name] for name in read})
        return [function.__qualname__, held, self._code(function.__code__), around]

    def _code(self, code: CodeType) -> list[Any]:
        consts = [self._code(const) if isinstance(const, CodeType) else self.told(const) for const in code.co_consts]
        return [hashlib.sha256(code.co_code).hexdigest(), code.co_names, consts]

    def _state(self, value: Any) -> Any:
        """What an object holds."""
        if hasattr(value, "described"):
            return self.told(value.described())
        if is_dataclass(value):
            compared = [part.name for part in fields(value) if part.compare]
            return [[name, self.told(getattr(value, name))] for name in compared]
        if not self.whole and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            return self._named(vars(value))
        if isinstance(value, nn.Module):
            kept = {name: part for name, part in vars(value).items() if name not in vars(nn.Module())}
            weights = [*value.named_parameters(), *value.named_buffers()]
            return [tensors_sha256(weights), self.told(kept), self._all(value.children())]
        try:
            # As pickle would take it apart, which runs and writes nothing here.
            made, *parts = _reduced(value)
        except Exception:
            raise Untellable(f"a {type(value).__qualname__}, which cannot be told from others") from None
        return self._all([made, *(list(part) if hasattr(part, "__next__") else part for part in parts)])


def _reduced(value: Any) -> tuple[Any, ...]:
    reducer = copyreg.dispatch_table.get(type(value))
    reduced = reducer(value) if reducer else value.__reduce_ex__(4)
    return reduced if isinstance(reduced, tuple) else (reduced,)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that was never given a value
        return None


def _globals_read(code: CodeType) -> list[str]:
    """Names that a function and those inside it look up outside themselves, in order."""
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _globals_read(const)]
    return list(dict.fromkeys([*own, *inner]))
