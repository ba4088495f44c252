"""Patients instead of patches: what is drawn, what is averaged, and what one loss is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from typing_extensions import override

from dpfix.errors import LoaderError
from dpfix.instrument import pytree
from dpfix.sampling.people import People
from dpfix.sampling.unit_names import names_of


def stock_loader(augmenter: Any) -> Any:
    """nnU-Net's own loader inside its augmenter, whose worker processes are ended.

    Args:
        augmenter: what ``nnUNetTrainer.get_dataloaders`` returns for training.

    Returns:
        The ``nnUNetDataLoader``, with all transforms.

    Raises:
        LoaderError: it is something else.
    """
    loader = getattr(augmenter, "data_loader", None) or getattr(augmenter, "generator", None)
    if hasattr(augmenter, "_finish"):
        augmenter._finish()
    if not all(hasattr(loader, name) for name in ("generate_train_batch", "get_indices", "batch_size", "indices")):
        raise LoaderError(
            f"nnU-Net: the training loader is a {type(augmenter).__name__} around {type(loader).__name__}, and not nnU-Net's "
            "nnUNetDataLoader; how it draws cases is not known.",
            help="Derive from a trainer with nnU-Net's own loader.",
            path="data_loader",
        )
    return loader


class PatientPatches(Dataset[dict[str, Any]]):
    """Patients as samples: an item is some patches of one patient, cut and augmented as nnU-Net does it.

    Args:
        loader: an ``nnUNetDataLoader``; it is changed and must not be used elsewhere.
        patches: patches of a patient.
        patient_of: from the name of a case to that of its patient.
    """

    def __init__(self, loader: Any, patches: int, patient_of: Callable[[str], str] = str) -> None:
        self.loader, self.patches = loader, patches
        loader.batch_size = patches
        if patches == 1:  # else the last patch of every patient is one with foreground, as in nnU-Net's batches
            loader.get_do_oversample = loader._probabilistic_oversampling
        cases = list(loader.indices)
        names = names_of(cases, range(len(cases)), [patient_of(case) for case in cases])
        self.people = People(cases, range(len(cases)), names)
        self.patients = self.people.names

    def __len__(self) -> int:
        return len(self.patients)

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        cases = self.people[index]
        drawn = [cases[np.random.randint(len(cases))] for _ in range(self.patches)] if len(cases) > 1 else cases
        one = copy.copy(self.loader)
        one.get_indices = lambda: (drawn * self.patches)[: self.patches]
        batch = one.generate_train_batch()
        return {"data": batch["data"], "target": batch["target"]}


def mean_over_patients(loss: Callable[[Any, Any], torch.Tensor], output: Any, target: Any) -> torch.Tensor:
    """Any loss of nnU-Net, of every patient alone, averaged over the patients.

    Whatever the loss does over its batch (batch Dice, the mean over voxels that are not ignored, the worst k percent of
    the voxels) it does over the patches of one patient.

    Args:
        loss: nnU-Net's loss, with or without deep supervision.
        output: what the network returned: a tensor ``[patients * patches, classes, *spatial]`` or a list of them.
        target: the same of the truth, ``[patients, patches, ...]``.

    Returns:
        A scalar.
    """
    patients = pytree.tensors(target)[0].shape[0]

    def rows(tree: Any, patient: int) -> Any:
        return pytree.map_leaves(lambda _, leaf: leaf[patient], tree)

    output = pytree.map_leaves(lambda _, leaf: leaf.unflatten(0, (patients, -1)), output)
    return torch.stack([loss(rows(output, i), rows(target, i)) for i in range(patients)]).mean()
