"""Multiple choice: the prompt word for word, and the scores against one slow forward per answer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.errors import SecateurError
from secateur.load.data import Tokenizer
from secateur.measure import choice
from secateur.measure.choice import Question, choice_accuracy, load_questions, prompt
from secateur.measure.quality import choice_metric

LETTERS = "ABCDE"


def tokenizer_with(single: bool) -> Tokenizer:
    """One token per byte, with <s> in front of a text; `single` makes " A" to " E" one token each."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("Ġ", letter) for letter in LETTERS] if single else []
    vocab |= {f"Ġ{letter}": len(vocab) + i for i, (_, letter) in enumerate(merges)}
    raw = RawTokenizer(models.BPE(vocab, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer: Tokenizer = fast
    return tokenizer


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=600,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attn" in name or "lm_head" in name:
                weight.mul_(40)  # what is said depends on the question, and not only on the colon before it
    return model.eval()


QUESTIONS = [
    Question(f"What is {i} plus {i * i}?{'!' * (i % 7)}", tuple(str(i + j) for j in range(2 + i % 4)), i % (2 + i % 4))
    for i in range(24)
]


def slow_answers(model: nn.Module, tokenizer: Tokenizer, questions: list[Question]) -> list[int]:
    """The letter that makes the whole text likeliest, answer by answer, in float64."""
    answers = []
    for question in questions:
        text = f"The following are multiple choice questions (with answers).\n\n{question.question}\n"
        for letter, answer in zip(LETTERS, question.choices, strict=False):
            text += f"{letter}. {answer}\n"
        text += "Answer:"
        context = [0, *tokenizer.encode(text, add_special_tokens=False)]
        scores = []
        for letter in LETTERS[: len(question.choices)]:
            ids = [0, *tokenizer.encode(f"{text} {letter}", add_special_tokens=False)]
            with torch.no_grad():
                log = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(log[t - 1, ids[t]]) for t in range(len(context), len(ids))))
        answers.append(scores.index(max(scores)))
    return answers


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_the_answer_is_the_likeliest_letter(monkeypatch: pytest.MonkeyPatch, single: bool, keep: bool) -> None:
    model, tokenizer = tiny_llama(), tokenizer_with(single)
    if not keep:  # a model that can only give the logits of all positions
        forward = model.forward

        def plain(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return forward(input_ids=input_ids, attention_mask=attention_mask)

        monkeypatch.setattr(model, "forward", plain)
    assert [len(t) for t in choice._letter_tokens(tokenizer, 5)] == [1 if single else 2] * 5
    answers = slow_answers(tiny_llama(), tokenizer, QUESTIONS[:12])
    assert len(set(answers)) > 1
    right = [replace(question, answer=answer) for question, answer in zip(QUESTIONS, answers, strict=False)]
    wrong = [replace(question, answer=(question.answer + 1) % len(question.choices)) for question in right]
    model.train()
    assert choice_accuracy(model, tokenizer, right, batch_size=5) == 1.0
    assert choice_accuracy(model, tokenizer, right[:3] + wrong[:1], batch_size=1) == 0.75
    assert choice_accuracy(model, tokenizer, wrong, batch_size=5) == 0.0
    assert model.training


class Oracle(nn.Module):
    """A plain PyTorch model: always says the byte-level token `answer`."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[torch.Tensor] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen += list(ids)
        logits = torch.zeros(*ids.shape, 270)
        logits[..., self.answer] = 1.0
        return logits


def test_the_right_letter_counts() -> None:
    tokenizer = tokenizer_with(True)
    (b,) = tokenizer.encode(" B", add_special_tokens=False)[:1]
    share = sum(question.answer == 1 for question in QUESTIONS) / len(QUESTIONS)
    assert 0 < share < 1
    assert choice_accuracy(Oracle(b), tokenizer, QUESTIONS) == share
    metric = choice_metric(tokenizer, QUESTIONS)
    assert metric.function(Oracle(b)) == share
    assert metric.better(0.5, 0.4)


def test_prompt_is_mmlus() -> None:
    example = Question("1 + 1?", ("1", "2"), 1, "abstract_algebra", dev=True)
    asked = Question("2 + 2?", ("3", "4", "5"), 1, "abstract_algebra")
    assert prompt(asked, [example]) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "1 + 1?\nA. 1\nB. 2\nAnswer: B\n\n"
        "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:"
    )


def test_examples_are_dev_rows_of_the_subject_or_its_first_rows() -> None:
    def rows(subject: str, count: int, dev: bool) -> list[Question]:
        return [Question(f"{subject} {i}{' dev' if dev else ''}", ("x", "y"), 0, subject, dev) for i in range(count)]

    questions = rows("law", 2, False) + rows("art", 4, False) + rows("law", 3, True)
    pairs = choice._with_examples(questions, 2)
    assert [(q.question, [e.question for e in examples]) for q, examples in pairs] == [
        ("law 0", ["law 0 dev", "law 1 dev"]),
        ("law 1", ["law 0 dev", "law 1 dev"]),
        ("art 2", ["art 0", "art 1"]),
        ("art 3", ["art 0", "art 1"]),
    ]
    assert len(choice._with_examples(questions, 0)) == 6  # dev rows are never scored
    tokenizer = tokenizer_with(True)
    oracle = Oracle(9)
    choice_accuracy(oracle, tokenizer, questions, shots=2, batch_size=1)
    assert len(oracle.seen) == 4
    text = prompt(*pairs[0])
    assert [0, *tokenizer.encode(text, add_special_tokens=False)] in [ids.tolist() for ids in oracle.seen]
    with pytest.raises(
        SecateurError, match="4 shots are too many for subject 'law': it has 3 dev questions and 2 others"
    ):
        choice_accuracy(oracle, tokenizer, questions, shots=4)
    with pytest.raises(SecateurError, match="too many for the file"):
        choice_accuracy(oracle, tokenizer, QUESTIONS, shots=24)


RECORDS: list[dict[str, Any]] = [
    {
        "question": f"q{i}",
        "choices": ["a", "b", "c"],
        "answer": i % 3,
        "subject": "s",
        "split": "dev" if i < 2 else "test",
    }
    for i in range(12)
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_load_questions(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "q.parquet")
    questions = load_questions(write(tmp_path / "q.jsonl", RECORDS))
    assert questions == load_questions(tmp_path / "q.parquet")
    assert questions[0] == Question("q0", ("a", "b", "c"), 0, "s", dev=True)
    assert questions[5] == Question("q5", ("a", "b", "c"), 2, "s", dev=False)
    half = load_questions(tmp_path / "q.jsonl", 0.5)
    assert [q.question for q in half] == ["q0", "q1", "q2", "q4", "q6", "q8", "q10"]
    assert len(load_questions(tmp_path / "q.jsonl", 0.001)) == 2 + 1
    letters = [{"question": "q", "choices": ["a", "b"], "answer": letter} for letter in ("A", " b ")]
    assert [q.answer for q in load_questions(write(tmp_path / "l.jsonl", letters))] == [0, 1]
    assert load_questions(tmp_path / "l.jsonl")[0].subject == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "line 3: 'question' must be a text, not None"),
        ({"choices": "abc"}, "line 3: 'choices' must be a list of texts, not str 'abc'"),
        ({"choices": ["a", 2]}, "line 3: 'choices' must be a list of texts"),
        ({"choices": ["a"]}, "line 3: a question has 2 to 26 choices, not 1"),
        ({"answer": 3}, "line 3: 'answer' must be an index from 0 to 2 or a letter from A to C, not 3"),
        ({"answer": -1}, "not -1"),
        ({"answer": True}, "not True"),
        ({"answer": 1.0}, "not 1.0"),
        ({"answer": "D"}, "from A to C, not 'D'"),
        ({"answer": "yes"}, "not 'yes'"),
        ({"subject": 7}, "line 3: 'subject' must be a text, not 7"),
    ],
)
def test_rows_that_make_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "q.jsonl", [*RECORDS[:2], RECORDS[2] | change])
    with pytest.raises(SecateurError) as caught:
        load_questions(path)
    assert message in str(caught.value)


def test_file_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "q", "options": ["a", "b"], "answer": 0}])
    with pytest.raises(SecateurError, match=r"line 1: no column 'choices'; it has 'question', 'options', 'answer'"):
        load_questions(path)
    with pytest.raises(SecateurError, match=r"did you mean 'q.jsonl'"):
        load_questions(tmp_path / "q.json")
    (tmp_path / "q.csv").write_text("a,b")
    with pytest.raises(SecateurError, match=r"unknown ending '.csv'"):
        load_questions(tmp_path / "q.csv")
    with pytest.raises(SecateurError, match="fraction must be above 0 and at most 1, not 0"):
        load_questions(path, 0)
    with pytest.raises(SecateurError, match="no questions to score \\(2 rows of split 'dev'\\)"):
        load_questions(write(path, RECORDS[:2]))


class Mute:
    """A tokenizer that knows no letters."""

    bos_token_id, eos_token_id = None, None

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return [5] * len(text)


def test_scoring_mistakes() -> None:
    model, tokenizer = tiny_llama(), tokenizer_with(True)
    with pytest.raises(SecateurError, match="does not tell the letters A to E apart"):
        choice_accuracy(model, Mute(), QUESTIONS)
    with pytest.raises(
        SecateurError, match=r"longest prompt has \d+ tokens, but the model's context 600; lower shots \(now 15\)"
    ):
        choice_accuracy(model, tokenizer, QUESTIONS, shots=15)
    with pytest.raises(SecateurError, match="shots must be at least 0"):
        choice_accuracy(model, tokenizer, QUESTIONS, shots=-1)
    with pytest.raises(SecateurError, match="no questions are left"):
        choice_accuracy(model, tokenizer, [])
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(torch.nan)
    with pytest.raises(SecateurError, match="logits are NaN"):
        choice_accuracy(model, tokenizer, QUESTIONS)
