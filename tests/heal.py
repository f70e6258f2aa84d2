"""Tiny teachers and students of several kinds, and data for them, for the tests of training."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 48


def llama(seed: int = 0, **options: Any) -> Any:
    """A random Llama of two layers: hidden 16, vocabulary 48."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def rows(count: int = 12, length: int = 8, seed: int = 1) -> torch.Tensor:
    """Token rows, int64 [count, length]."""
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch whose row i has i + 1 tokens fewer."""
    mask = torch.ones_like(ids)
    for i in range(len(ids)):
        mask[i, : i + 1] = 0
    if not left:
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


class Net(nn.Module):
    """A classifier of pictures with batch norms and dropout; its blocks are in a list."""

    def __init__(self, inside: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([self.block(4, inside), self.block(inside, 4)])
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(4, classes)

    @staticmethod
    def block(a: int, b: int) -> nn.Sequential:
        """Convolution, norm, activation."""
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

    def forward(self, x: torch.Tensor) -> Any:
        """Logits [B, classes] of pictures [B, 3, H, W]."""
        x = functional.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(self.drop(x.mean((2, 3))))


def net(seed: int = 0, **sizes: Any) -> Net:
    """A random one."""
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def pictures(count: int = 12, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their classes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 5, 5, generator=draw), torch.randint(0, 5, (count,), generator=draw)


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pictures with noise from torch's own random numbers, as augmentation makes it."""

    def __init__(self, count: int = 12) -> None:
        self.x, self.y = pictures(count)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i] + 0.1 * torch.randn(3, 5, 5), self.y[i]


def loader(batch_size: int = 4, *, noisy: bool = False) -> DataLoader[Any]:
    """A loader that shuffles."""
    data: Any = Noisy() if noisy else TensorDataset(*pictures())
    return DataLoader(data, batch_size=batch_size, shuffle=True)


def half_masked(model: Any) -> Any:
    """A copy where every other entry of the blocks' matrices is zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name and p.dim() > 1:
                p.view(-1)[::2] = 0
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all that the state dicts hold is equal to the last bit."""
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
