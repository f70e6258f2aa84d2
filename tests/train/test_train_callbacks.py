"""The trainers of Hugging Face and Lightning, run for real on tiny models."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import slow_sparsity as slow
import torch
from tiny import tiny
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

from secateur.errors import SecateurError
from secateur.train import Constant, Cubic, Linear, Sparsity, sparsify
from secateur.train.callbacks import STATE, add_penalty, hf_callback, lightning_callback


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Token rows with labels: a class each, or the tokens themselves."""

    def __init__(self, classes: bool) -> None:
        self.ids = torch.randint(3, 90, (24, 9), generator=torch.Generator().manual_seed(0))
        self.classes = classes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i, 0] % 2 if self.classes else self.ids[i]}


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=90, max_position_embeddings=16, **sizes)
    )


def trainer_of(model: Any, s: Sparsity, folder: Path, *, finalize: bool = True, **options: Any) -> Trainer:
    given = {"save_strategy": "no", "num_train_epochs": 2, "per_device_train_batch_size": 4, **options}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", learning_rate=1e-2, **given
    )
    rows = Rows(hasattr(model, "classifier"))
    return Trainer(model, arguments, train_dataset=rows, callbacks=[hf_callback(s, finalize=finalize)])


def test_trainer_prunes_bert_and_leaves_a_stock_checkpoint(tmp_path: Path) -> None:
    model = bert()
    s = sparsify(model, "sparsity=80%", schedule=Cubic(begin=2, end=10), only=["bert.encoder"])
    trainer = trainer_of(model, s, tmp_path / "out")
    trainer.train()
    assert s.statistics() == {**s.statistics(), "step": 12, "epoch": 2, "sparsity": pytest.approx(0.8, abs=1e-3)}
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    for name, mask in s.masks().items():
        weight = dict(again.named_parameters())[name]
        assert not weight[~mask].any()
        assert weight[mask].all()


def test_trainer_trains_a_llama_with_recomputed_activations(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32).train()
    s = sparsify(model, "n:m=2:4", method="sr_ste")
    trainer_of(model, s, tmp_path, activation_checkpointing=True, bf16=True).train()
    assert s.statistics()["sparsity"] == 0.5
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize(("run", "saves"), [("movement", "epoch"), ("rb", "steps"), ("magnitude-block", "steps")])
def test_a_resumed_trainer_ends_like_an_undisturbed_one(run: str, saves: str, tmp_path: Path) -> None:
    ends = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        for part in range(2 if stop else 1):
            model = bert()
            s = slow.start(run, model, only=["bert.encoder"])
            # saved at step 6: the last of the first epoch
            trainer = trainer_of(model, s, folder, finalize=False, save_strategy=saves, save_steps=6)
            if stop and not part:
                trainer.train()
                assert (folder / "checkpoint-6" / STATE).exists()
            else:
                trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if stop else None)
        ends.append((s.masks(), s.statistics()))
    (masks, numbers), (others, other_numbers) = ends
    assert numbers == other_numbers
    assert all(torch.equal(masks[n], others[n]) for n in masks)
    (tmp_path / "True" / "checkpoint-6" / STATE).unlink()
    model = bert()
    s = slow.start(run, model, only=["bert.encoder"])
    with pytest.raises(SecateurError, match="load its state before"):
        trainer_of(model, s, tmp_path / "True").train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-6"))


class Watched(torch.optim.SGD):
    """Notes the gradients that it is given."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.0)
        self.seen: list[list[torch.Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen.append([g.detach().clone() for g in grads if g is not None])
        return result


def without_gradient(parameter: torch.Tensor) -> None:
    """Forget what came by a backward pass."""
    parameter.grad = None


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_does_not_multiply_the_penalty(accumulate: int, tmp_path: Path) -> None:
    model = bert()
    for p in model.parameters():
        p.requires_grad_(False)  # what reaches the scores through the model is taken away below
    s = sparsify(model, method="movement", mode="soft", penalty=6.0, schedule=Constant(), only=["bert.encoder"])
    optimizer = Watched(s.scores())
    expected = torch.autograd.grad(s.loss(), s.scores())
    scores: Any
    for scores in s.scores():
        scores.register_post_accumulate_grad_hook(without_gradient)
    arguments = {"gradient_accumulation_steps": accumulate, "max_steps": 2, "max_grad_norm": 0.0}
    trainer = trainer_of(model, s, tmp_path, finalize=False, **arguments)
    trainer.optimizer = optimizer
    trainer.train()
    assert s.steps == 2
    for seen in optimizer.seen:
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


class Lit(pl.LightningModule):
    """The small classifier."""

    sparsity: Sparsity

    def __init__(self) -> None:
        super().__init__()
        self.net = slow.net()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        result: torch.Tensor = (self.net(batch[0]) - batch[1]).square().mean()
        return result

    def configure_optimizers(self) -> Any:
        return slow.adam(self.sparsity)


def loader() -> DataLoader[Any]:
    pairs: Any = [(x, y) for i in range(3) for x, y in zip(*slow.batch(i), strict=True)]
    return DataLoader(pairs, batch_size=16)


def fit(model: Lit, callback: Any, folder: Path, epochs: int, **options: Any) -> pl.Trainer:
    path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[callback],
        **options,
    )
    trainer.fit(model, loader(), ckpt_path=path, weights_only=False if path else None)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", ["magnitude", "movement-soft", "rb", "sr_ste"])
def test_lightning_is_the_loop_of_the_documentation(run: str, tmp_path: Path) -> None:
    model = Lit()
    s = model.sparsity = slow.start(run, model.net)
    fit(model, lightning_callback(s, finalize=True), tmp_path, 4)
    assert (s.steps, s.epochs) == (12, 4)
    own = slow.net()
    other = slow.start(run, own)
    optimizer = slow.adam(other)
    for epoch in range(4):
        for i in range(3):
            x, y = slow.batch(i)
            optimizer.zero_grad()
            ((own(x) - y).square().mean() + other.loss()).backward()
            optimizer.step()
            other.step()
        other.epoch()
        assert other.epochs == epoch + 1
    assert all(torch.equal(s.masks()[n], m) for n, m in other.masks().items())
    other.finalize()
    for a, b in zip(model.net.parameters(), own.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert type(model.net[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_and_accumulates(tmp_path: Path) -> None:
    ends = []
    for stop in (False, True):
        for epochs in (2, 4) if stop else (4,):
            model = Lit()
            s = model.sparsity = slow.start("magnitude-block", model.net)
            resume = {"ckpt_path": tmp_path / "half.ckpt"} if stop and epochs == 4 else {}
            trainer = fit(model, lightning_callback(s), tmp_path, epochs, accumulate_grad_batches=3, **resume)
            if epochs == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
        assert (s.steps, s.epochs) == (4, 4)
        ends.append(s.masks())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_an_optimizer_without_the_scores_is_told() -> None:
    model = slow.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s = slow.start("rb", model)
    with pytest.raises(SecateurError, match="lacks the scores"):
        add_penalty(s, optimizer)
    optimizer.add_param_group({"params": s.scores()})
    add_penalty(s, optimizer)


def test_the_penalty_is_scaled_where_the_optimizer_will_unscale() -> None:
    model = slow.net()
    s = slow.start("movement-soft", model, schedule=Linear(begin=0, end=1))
    s.step()
    plain = torch.autograd.grad(s.loss(), s.scores())
    optimizer = torch.optim.SGD(s.scores(), lr=0.1)
    add_penalty(s, optimizer, 8.0)
    assert all(p.grad is not None and torch.allclose(p.grad, 8 * g) for p, g in zip(s.scores(), plain, strict=True))
