"""Walking through batches, arguments and outputs: nested mappings, sequences and dataclasses.

``torch.utils._pytree`` treats an unregistered ``dict`` subclass (``transformers.BatchEncoding``) as one
opaque leaf; data loaders and models hand such objects around, so mappings of any type are opened here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

Path = tuple[object, ...]


def children(tree: Any) -> list[tuple[object, Any]] | None:
    """The direct parts of a container.

    Returns:
        ``(key, part)`` pairs, or ``None`` if the object is a leaf.
    """
    if isinstance(tree, PackedSequence) or torch.is_tensor(tree):
        return None
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, (list, tuple)):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return None


def leaves(tree: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """All leaves with the keys that lead to them.

    Returns:
        ``(path, leaf)`` pairs in a stable order.

    >>> leaves({"a": [1, (2, 3)]})
    [(('a', 0), 1), (('a', 1, 0), 2), (('a', 1, 1), 3)]
    """
    found = children(tree)
    if found is None:
        return [(path, tree)]
    return [leaf for key, part in found for leaf in leaves(part, (*path, key))]


def opened(tree: Any) -> list[tuple[object, Any]]:
    """The direct parts of a container, or the attributes of an object of a class of the script's own (a batch with ``b.x``)."""
    found = children(tree)
    if found is None and not isinstance(tree, (torch.Tensor, torch.nn.Module, PackedSequence, type)):
        found = list(getattr(tree, "__dict__", {}).items())
    return found or []


def parts(tree: Any, path: Path = (), around: tuple[int, ...] = ()) -> list[tuple[Path, Any]]:
    """A tree, its leaves and all that is in between, attributes of objects too, with the keys that lead to them.

    Args:
        path: keys that led here.
        around: ids of what it is in; an object that holds itself is not opened again.

    Returns:
        ``(path, part)`` pairs; a container comes before what it holds.

    >>> parts({"a": [1]})
    [((), {'a': [1]}), (('a',), [1]), (('a', 0), 1)]
    """
    below = () if id(tree) in around else opened(tree)
    inside = (*around, id(tree))
    return [(path, tree), *(part for key, child in below for part in parts(child, (*path, key), inside))]


def at(tree: Any, path: Path) -> Any:
    """The part of a tree that some keys of :func:`parts` lead to.

    Returns:
        The leaf or container.

    >>> at({"a": [1, (2, 3)]}, ("a", 1, 0))
    2
    """
    for key in path:
        tree = dict(opened(tree))[key]
    return tree


def alike(a: Any, b: Any) -> bool:
    """Whether two trees hold the same.

    Returns:
        Equality of all leaves, with equal types of tensors.

    >>> alike([torch.ones(2), 1], [torch.ones(2), 1])
    True
    """
    pairs = leaves(a), leaves(b)
    if [path for path, _ in pairs[0]] != [path for path, _ in pairs[1]]:
        return False
    return all(_equal(x, y) for (_, x), (_, y) in zip(*pairs, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
        return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    try:
        return x is y or bool(x == y)
    except (ValueError, RuntimeError):
        return False


def map_leaves(fn: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The same containers with every leaf replaced by ``fn(path, leaf)``.

    Args:
        fn: called with the path and the leaf.
        tree: any object; it is not changed.
        path: keys that led here.

    Returns:
        A new tree with containers of the same types.

    >>> map_leaves(lambda path, x: x + 1, {"a": [1, (2,)]})
    {'a': [2, (3,)]}
    """
    found = children(tree)
    if found is None:
        return fn(path, tree)
    new = {key: map_leaves(fn, part, (*path, key)) for key, part in found}
    return rebuilt(tree, new)


def map_at(fn: Callable[[Any], Any], tree: Any, paths: Collection[Path], path: Path = ()) -> Any:
    """The same containers with the parts at some paths replaced.

    Args:
        fn: called with the part.
        tree: any object; it is not changed.
        paths: keys that lead to the parts.
        path: keys that led here.

    Returns:
        A new tree.

    >>> map_at(len, {"a": [1, 2], "b": (3,)}, [("a",)])
    {'a': 2, 'b': (3,)}
    """
    if path in paths:
        return fn(tree)
    found = children(tree)
    if found is None:
        return tree
    return rebuilt(tree, {key: map_at(fn, part, paths, (*path, key)) for key, part in found})


def map_children(fn: Callable[[object, Any], Any], tree: Any) -> Any:
    """The same container with every direct part replaced by ``fn(key, part)``; a leaf stays.

    Returns:
        A new container.
    """
    found = children(tree)
    return tree if found is None else rebuilt(tree, {key: fn(key, part) for key, part in found})


def rebuilt(tree: Any, parts: Mapping[object, Any]) -> Any:
    """A container like another, with other parts.

    Args:
        parts: the parts by key, in the order of :func:`children`.

    Returns:
        The new container.
    """
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*parts.values())
    if isinstance(tree, (list, tuple)):
        return type(tree)(parts.values())
    if isinstance(tree, MutableMapping):
        out = copy.copy(tree)
        for key, part in parts.items():
            out[key] = part
        return out
    if isinstance(tree, Mapping):
        return type(tree)(parts)  # type: ignore[call-arg]
    return dataclasses.replace(tree, **{str(k): v for k, v in parts.items()})


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors of a tree.

    Returns:
        The tensor leaves in order.
    """
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for _, leaf in leaves(tree) if torch.is_tensor(leaf)]


def gradient_tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree through which a backward pass can come.

    Returns:
        Tensor leaves that require gradient.
    """
    return [t for t in tensors(tree) if t.requires_grad]


def plain(tree: Any) -> Any:
    """The same tree with tensor subclasses (MONAI's ``MetaTensor``) turned into plain tensors.

    Per-sample transforms work on data, not on the meta information a subclass carries along.

    Returns:
        A tree without tensor subclasses; parameters stay as they are.
    """

    def strip(_: Path, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and type(leaf) not in (torch.Tensor, torch.nn.Parameter):
            return leaf.as_subclass(torch.Tensor)
        return leaf

    return map_leaves(strip, tree)
