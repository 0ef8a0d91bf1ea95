"""Checksums of tensors, of a model's weights and hooks, and of functions, to detect changes.

They are the same in every process and on every device. The checksum of a function or an object covers everything that
it computes with, as far as Python shows it. What Python does not show raises an error, and never counts as unchanged.
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

from rt_lens.models.backends.base import users_hooks
from rt_lens.models.protocol import Model

_PLAIN = (str, int, float, complex, bool, bytes, torch.dtype, torch.device, torch.Size, type(None), type(...))
_LIBRARIES = tuple(
    f"{Path(folder).resolve()}{os.sep}"
    for folder in (
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
        *(*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])),
    )
)
_NOT_COMPUTED_BY = ("__init__", "__new__", "__repr__", "__str__", "__eq__", "__hash__", "_abc_impl")
_TABLES = ("rotary_sin", "rotary_cos")
_SETTLED = 64  # rows of such a table that every model has


class Untellable(ValueError):
    """An object that Python does not show in enough detail to distinguish it from others."""


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Checksum of tensors with their names, shapes and types, in the order given."""
    content = hashlib.sha256()
    for name, tensor in named:
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def parameters_sha256(model: Model | nn.Module) -> str:
    """Checksum of all parameters, independent of the model's name. Reads every weight: 135 million take 0.3 s."""
    return tensors_sha256(model.named_parameters())


def buffers_sha256(model: Model | nn.Module) -> str:
    """Checksum of all buffers; rotary tables, which TransformerLens extends, count with their start."""
    return tensors_sha256(
        (name, buffer[:_SETTLED] if name.rsplit(".", 1)[-1] in _TABLES else buffer)
        for name, buffer in model.named_buffers()
    )


def hooks_of(model: Model | nn.Module) -> list[dict[str, str]]:
    """The hooks on a model's forward pass: point, name and checksum of each, in order.

    Raises:
        Untellable: a hook holds an object that Python does not show; the message names the hook point.
    """
    modules, hooks = _module_names(model), []
    for name, module in model.named_modules():
        for hook in _acting_on(module):
            try:
                hooks.append({"point": name, "hook": _name(hook), "sha256": _sha256(hook, modules)})
            except Untellable as error:
                raise Untellable(f"the hook at {name or 'the model'} holds {error}") from None
    return hooks


def measure_sha256(measure: Any, model: Model | nn.Module) -> str | None:
    """Checksum of a function or object that measures: its code, and the tensors and functions that it holds.

    Numbers, lists and other values that it holds are left out, since it may count with them.

    Args:
        measure: the function.
        model: a function that holds parts of this model is identified by their names.

    Returns:
        None if it holds an object that Python does not show.
    """
    try:
        return _sha256(measure, _module_names(model), whole=False)
    except Untellable:
        return None


def _module_names(model: Model | nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _acting_on(module: nn.Module) -> list[Any]:
    # Only the values of a dictionary of hooks: its keys count over all models of a process.
    patched = [vars(module)["forward"]] if "forward" in vars(module) else []
    return [*users_hooks(module, ("_forward_pre_hooks", "_forward_hooks")), *patched]


def _name(hook: Any) -> str:
    """A hook's name for display, without the memory address that Python adds to some."""
    return getattr(hook, "__name__", type(hook).__name__).partition(" at 0x")[0].lstrip("<")[:80]


def _sha256(value: Any, modules: Mapping[int, str], whole: bool = True) -> str:
    content = json.dumps(_Describer(modules, whole).description(value), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class _Describer:
    """Describes a value in JSON: functions of installed packages by name, others by everything that they compute with.

    Modules of the model itself are described by their names, and repeated objects by number.
    """

    def __init__(self, modules: Mapping[int, str], whole: bool) -> None:
        self.modules, self.whole = modules, whole
        self.numbers: dict[int, int] = {}
        self.held: list[Any] = []  # keeps objects alive, so that no address occurs twice

    def description(self, value: Any) -> Any:
        if isinstance(value, _PLAIN) and type(value).__module__ in ("builtins", "torch"):
            return [type(value).__name__, repr(value)]
        if isinstance(value, ModuleType):
            return ["module", value.__name__]
        if id(value) in self.modules:
            return ["of the model", self.modules[id(value)]]
        if id(value) in self.numbers:
            return ["again", self.numbers[id(value)]]
        self.numbers[id(value)] = len(self.numbers)
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
            return ["method", self.description(value.__self__), self.description(value.__func__)]
        if isinstance(value, BuiltinFunctionType):
            return ["builtin", value.__module__ or "", value.__qualname__, self.description(value.__self__)]
        if isinstance(value, partial):
            return ["partial", self._all([value.func, value.args, value.keywords])]
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            return ["mapping", [[self.description(key), self.description(part)] for key, part in value.items()]]
        if isinstance(value, list | tuple) and type(value).__module__ == "builtins":
            return [type(value).__name__, self._all(value)]
        if isinstance(value, Set) and type(value).__module__ == "builtins":
            return ["set", sorted(json.dumps(_Describer(self.modules, self.whole).description(part)) for part in value)]
        return [self._class(type(value)), self._state(value)]

    def _counts(self, value: Any) -> bool:
        """Whether a value that a function or an object holds is part of its identity."""
        lasting = (Tensor, np.ndarray, FunctionType, MethodType, BuiltinFunctionType, partial, type, nn.Module)
        frozen = is_dataclass(value) and value.__dataclass_params__.frozen  # type: ignore[union-attr]
        return self.whole or isinstance(value, lasting) or frozen

    def _named(self, parts: Mapping[str, Any]) -> list[Any]:
        return [[name, self.description(part)] for name, part in parts.items() if self._counts(part)]

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [self.description(value) for value in values]

    def _class(self, kind: type) -> Any:
        return self._of_package(kind) or self.description(kind)

    def _of_package(self, value: Any) -> str | None:
        """The name of a class or function of an installed package; None for the user's own."""
        module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
        file = getattr(sys.modules.get(module), "__file__", None)
        known = module in sys.builtin_module_names or module in ("builtins", "torch")
        if not known and not (file and str(Path(file).resolve()).startswith(_LIBRARIES)):
            return None
        return f"{module}.{name}"

    def _members(self, kind: type) -> Any:
        """The bases and the methods and attributes of a user's class."""
        members = []
        for name, part in sorted(vars(kind).items()):
            part = part.__func__ if isinstance(part, staticmethod | classmethod) else part
            computed_by = isinstance(part, FunctionType | property) or not name.startswith("__")
            if name in _NOT_COMPUTED_BY or not computed_by or type(part).__name__.endswith("_descriptor"):
                continue
            members.append(
                [name, self._all([part.fget, part.fset]) if isinstance(part, property) else self.description(part)]
            )
        return [[self._class(base) for base in kind.__bases__], members]

    def _function(self, function: FunctionType) -> list[Any]:
        named = self._of_package(function)
        if named and "<locals>" not in named:  # anything else that it holds is decoration
            return [named]
        cells = [_content(cell) for cell in function.__closure__ or ()]
        held = self._all([function.__defaults__, function.__kwdefaults__, list(filter(self._counts, cells))])
        if named:
            return [named, held]
        read = [name for name in _globals_read(function.__code__) if name in function.__globals__]
        around = self._named({name: function.__globals__[name] for name in read})
        return [function.__qualname__, held, self._code(function.__code__), around]

    def _code(self, code: CodeType) -> list[Any]:
        consts = [
            self._code(const) if isinstance(const, CodeType) else self.description(const) for const in code.co_consts
        ]
        return [hashlib.sha256(code.co_code).hexdigest(), code.co_names, consts]

    def _state(self, value: Any) -> Any:
        """The values that an object holds."""
        if hasattr(value, "described"):
            return self.description(value.described())
        if is_dataclass(value):
            compared = [part.name for part in fields(value) if part.compare]
            return [[name, self.description(getattr(value, name))] for name in compared]
        if not self.whole and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            return self._named(vars(value))
        if isinstance(value, nn.Module):
            kept = {name: part for name, part in vars(value).items() if name not in vars(nn.Module())}
            weights = [*value.named_parameters(), *value.named_buffers()]
            return [tensors_sha256(weights), self.description(kept), self._all(value.children())]
        try:
            # As pickle would take it apart; this runs and writes nothing.
            constructor, *parts = _reduced(value)
        except Exception:
            raise Untellable(f"a {type(value).__qualname__}, which cannot be told from others") from None
        return self._all([constructor, *(list(part) if hasattr(part, "__next__") else part for part in parts)])


def _reduced(value: Any) -> tuple[Any, ...]:
    reducer = copyreg.dispatch_table.get(type(value))
    reduced = reducer(value) if reducer else value.__reduce_ex__(4)
    return reduced if isinstance(reduced, tuple) else (reduced,)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name without a value
        return None


def _globals_read(code: CodeType) -> list[str]:
    """Global names that a function and its inner functions look up, in order."""
    direct = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _globals_read(const)]
    return list(dict.fromkeys([*direct, *inner]))
