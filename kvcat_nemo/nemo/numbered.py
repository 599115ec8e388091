"""Windows that carry their numbers, and what tells Megatron's schedule how many of them travel together."""

import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import Dataset

from kvcat_nemo.nemo.compat import send_windows


class PairedDataSampler(MegatronDataSampler):
    """Tells the schedule how many windows travel between pipeline stages: of a paired batch, twice a micro-batch's."""

    def on_megatron_step_start(self, step):
        step = super().on_megatron_step_start(step)
        windows = self.micro_batch_size * (2 if step.pl_module.config.kvcat.paired else 1)
        return send_windows(step, windows)


class NumberedDataset(Dataset):
    """A dataset whose items carry their number (`sample_id`), so that a run can say which windows it has seen.

    Those of packed documents say so (`packed`): of the models of interleaved stages only the first knows its trainer.
    """

    def __init__(self, dataset: Dataset, packed: bool = False):
        self.dataset, self.packed = dataset, packed
        if hasattr(dataset, "collate_fn"):
            self.collate_fn = dataset.collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {**self.dataset[index], "sample_id": torch.tensor(index)}
        return item | {"packed": torch.tensor(True)} if self.packed else item
