"""nnU-Net (nnunetv2 2.6 or newer): private training per patient, and a doctor.

Nothing here imports nnunetv2 at load time but the files in ``trainers/``, which nnU-Net finds by its own means: set
``nnUNet_extTrainer`` to what ``dpfix nnunet trainers`` prints, and train with ``-tr nnUNetTrainerDP``. A trainer of one's
own becomes private by deriving from it and :class:`PrivateTrainer`, this one first.
"""

from dpfix.integrations.nnunet.doctor import diagnose_installation
from dpfix.integrations.nnunet.patients import PatientPatches, mean_over_patients
from dpfix.integrations.nnunet.settings import Settings
from dpfix.integrations.nnunet.trainer import PrivateTrainer

__all__ = ["PatientPatches", "PrivateTrainer", "Settings", "diagnose_installation", "mean_over_patients"]
