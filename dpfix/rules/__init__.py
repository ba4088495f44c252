"""The rules, in the order in which they look and repair.

A rule is one file with

* ``CODE``, ``TITLE`` and a docstring: what, why it is bad, example, use instead, how safe the fix is;
* ``ERROR``: the exception its refusals raise;
* ``find(scan)``: yields findings, changes nothing;
* ``fix(module, scan)``: a replacement for the module at a finding's path, or attributes to set on it;
* ``VALID`` and ``INVALID``: small factories of keyword arguments for the call. Tests and docs are made of them.
"""

from __future__ import annotations

from types import ModuleType

from dpfix.rules import (
    batch_norm,
    compiled,
    data_loader,
    distributed,
    embedding,
    eval_mode,
    inplace,
    instance_norm,
    optimizer,
    parameter_dtype,
    replaceable,
    scripted,
)

RULES: tuple[ModuleType, ...] = (
    scripted,
    compiled,
    distributed,
    eval_mode,
    batch_norm,
    instance_norm,
    inplace,
    replaceable,
    embedding,
    parameter_dtype,
    optimizer,
    data_loader,
)
"""Every rule, in order."""
