"""Found by nnU-Net when ``nnUNet_extTrainer`` names this folder; nnU-Net imports every file in it."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]

from dpfix.integrations.nnunet.trainer import PrivateTrainer


class nnUNetTrainerDP(PrivateTrainer, nnUNetTrainer):
    """nnU-Net's trainer under differential privacy per patient; nnU-Net reads the arguments back by these very names."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)  # pyright: ignore[reportCallIssue]
