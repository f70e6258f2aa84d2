"""Training-time sparsity in the trainers of Hugging Face and Lightning: nothing else of a script changes."""

from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.train.sparsity import Sparsity

STATE = "secateur.pt"
"""File of the sparsity's state in a checkpoint of the Hugging Face Trainer."""


def add_penalty(sparsity: Sparsity, optimizer: Any, scale: float = 1.0) -> None:
    """Add the gradient of `sparsity.loss()` to the parameters of an optimiser, once.

    The gradients are added by hand: a second backward pass would wake the hooks of DistributedDataParallel.

    Args:
        sparsity: whose loss.
        optimizer: about to take its step.
        scale: of a gradient scaler whose optimiser step is still to unscale.

    Raises:
        SecateurError: where there are learned scores and the optimiser has none of them.
    """
    own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    learned = {id(p) for p in sparsity.scores()}
    if learned and own and not learned & {id(p) for p in own} and not sparsity.steps:
        raise SecateurError(
            "the optimiser was made before sparsify and lacks the scores: add_param_group({'params': s.scores()})"
        )
    penalty = sparsity.loss()
    if not penalty.requires_grad or not own:
        return
    for parameter, gradient in zip(own, torch.autograd.grad(penalty * scale, own, allow_unused=True), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def hf_callback(sparsity: Sparsity, *, finalize: bool = False) -> Any:
    """A `transformers.TrainerCallback` that steps, adds the penalty and keeps the state in checkpoints.

    The penalty is added once for each optimiser step, after gradient clipping. Checkpoints get a file ``secateur.pt``
    beside the model's; ``train(resume_from_checkpoint=...)`` reads it.

    Args:
        sparsity: of the Trainer's model.
        finalize: fold the masks when training ends; then `save_model` writes a plain checkpoint.
    """
    from transformers import TrainerCallback

    class SparsityCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        """Calls a Sparsity."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Go on from the state in the checkpoint that the Trainer resumes."""
            del control, kwargs
            if not state.global_step or sparsity.steps == state.global_step:
                return
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            if not path.exists():
                raise SecateurError(
                    f"training resumes at step {state.global_step} and the sparsity is at step {sparsity.steps}: "
                    f"there is no {path}, so load its state before (load_state_dict)"
                )
            sparsity.load_state_dict(torch.load(path, map_location="cpu"))
            while sparsity.epochs < int(state.epoch):  # saved at the last step of an epoch, before the epoch was over
                sparsity.epoch()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The penalty, once."""
            del state, control
            scaler = getattr(kwargs["optimizer"], "scaler", None)
            # Clipping has unscaled the gradients of float16 training; without it the step still will.
            scale = scaler.get_scale() if scaler is not None and not args.max_grad_norm else 1.0
            add_penalty(sparsity, kwargs["optimizer"], scale)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """An optimiser step is over."""
            del args, state, control, kwargs
            sparsity.step()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """An epoch is over."""
            del args, state, control, kwargs
            sparsity.epoch()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The state, beside the Trainer's."""
            del control, kwargs
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                torch.save(sparsity.state_dict(), folder / STATE)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Fold, if asked for."""
            del args, state, control, kwargs
            if finalize:
                sparsity.finalize()

    return SparsityCallback()


def lightning_callback(sparsity: Sparsity, *, finalize: bool = False) -> Any:
    """A `lightning.pytorch.Callback` that steps, adds the penalty and keeps the state in checkpoints.

    The penalty is added once for each optimiser step, before gradient clipping, to the parameters of that optimiser.

    Args:
        sparsity: of the LightningModule or of a part of it.
        finalize: fold the masks when fitting ends.
    """
    from lightning.pytorch import Callback

    class SparsityCallback(Callback):
        """Calls a Sparsity."""

        seen = 0
        resumed = False

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Count optimiser steps from here."""
            del pl_module
            self.seen = trainer.global_step

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            """Catch up: checkpoints of the last batch, or of validation, are written before the epoch is over."""
            del pl_module
            while self.resumed and sparsity.epochs < trainer.current_epoch:
                sparsity.epoch()
            self.resumed = False

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            """The penalty, once."""
            del trainer, pl_module
            add_penalty(sparsity, optimizer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """An optimiser step is over, unless gradients are still being accumulated."""
            del pl_module, outputs, batch, batch_idx
            if trainer.global_step != self.seen:
                self.seen = trainer.global_step
                sparsity.step()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            """An epoch is over."""
            del trainer, pl_module
            sparsity.epoch()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            """Fold, if asked for; checkpoints have been written."""
            del trainer, pl_module
            if finalize:
                sparsity.finalize()

        def state_dict(self) -> dict[str, Any]:
            """The state, for Lightning's checkpoint."""
            return sparsity.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Go on from it."""
            sparsity.load_state_dict(state_dict)
            self.resumed = True

    return SparsityCallback()
