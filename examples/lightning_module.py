"""A `LightningModule` on a subnetwork: the optimizer in `configure_optimizers`, and clipping that it does itself."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from _shared import batches, copy_weights, random_mask, report

from subnet_ft import MaskedAdamW, SubnetMask
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer

try:
    import lightning
except ModuleNotFoundError as error:
    raise SystemExit("This example needs lightning: pip install 'subnet-ft[examples]'") from error


class Policy(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, mask: SubnetMask) -> None:
        super().__init__()
        mask.check(model)  # here, where the model is still the base; the optimizer of a resumed run is built later
        self.model = model
        self.mask = mask

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Of `self.model`: names of `self` start with `model.`, and the mask does not know those.
        named_parameters = self.model.named_parameters()
        return MaskedAdamW(named_parameters, self.mask, lr=1e-2, max_grad_norm=None, check_base=False)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        if gradient_clip_val is not None:
            self.log("grad_norm", optimizer.clip_grad_norm_(gradient_clip_val))


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # advice about worker processes
    model = tiny_model("llama").train()
    mask = random_mask(model)  # yours: SubnetMask.load("run.subnet.safetensors", base="my/base")
    before = copy_weights(model)
    rows = [row for batch in batches(tiny_tokenizer()) for row in batch]

    trainer = lightning.Trainer(
        max_steps=4,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Policy(model, mask), torch.utils.data.DataLoader(rows, batch_size=2))

    report(f"lightning, last gradient norm {trainer.callback_metrics['grad_norm']:.3g}", model, before, mask)


if __name__ == "__main__":
    main()
