"""Multiple-choice accuracy in the layout of MMLU, from a local file.

Measuring Massive Multitask Language Understanding, Hendrycks et al. 2021 (https://arxiv.org/abs/2009.03300): the model
reads the question and its lettered choices, and its answer is the letter that it finds most likely after "Answer:".
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from secateur.errors import SecateurError
from secateur.load.data import Tokenizer, existing_file, read_records
from secateur.load.mode import evaluating
from secateur.measure.quality import logits_of
from secateur.progress import Track, quiet


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        question: Its text.
        choices: The texts of the answers, 2 to 26.
        answer: Index of the right one.
        subject: What it is about, such as ``abstract_algebra``; empty when the file does not say.
        dev: It is an example for few-shot prompts, and never scored.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    dev: bool = False


def load_questions(path: str | Path, fraction: float = 1.0) -> list[Question]:
    """Read questions from a .jsonl or .parquet file.

    Columns: ``question``; ``choices`` (a list of texts); ``answer`` (an index from 0, or a letter); optional
    ``subject``; optional ``split``, whose value ``dev`` marks few-shot examples.

    Args:
        path: The file.
        fraction: The share of the scored questions to keep, in (0, 1]: an evenly spaced subset, always the same one,
            at least one question. Few-shot examples are all kept.

    Returns:
        The questions in the order of the file.

    Raises:
        SecateurError: The file is missing or not valid, or a row lacks a column or holds a value that makes no sense.
    """
    path = existing_file(Path(path))
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        raise SecateurError(f"{path}: unknown ending {path.suffix!r}; questions come from a .jsonl or .parquet file")
    if not 0 < fraction <= 1:
        raise SecateurError(f"fraction must be above 0 and at most 1, not {fraction}")
    questions = [_question(record, where) for where, record in read_records(path)]
    scored = [index for index, question in enumerate(questions) if not question.dev]
    if not scored:
        raise SecateurError(f"{path}: no questions to score ({len(questions)} rows of split 'dev')")
    count = max(1, round(fraction * len(scored)))
    kept = {scored[i * len(scored) // count] for i in range(count)}
    return [question for index, question in enumerate(questions) if question.dev or index in kept]


def _question(record: dict[str, Any], where: str) -> Question:
    """Check one row of the file."""
    missing = [name for name in ("question", "choices", "answer") if name not in record]
    if missing:
        raise SecateurError(f"{where}: no column {missing[0]!r}; it has {', '.join(map(repr, record)) or 'none'}")
    text, choices, answer = record["question"], record["choices"], record["answer"]
    if not isinstance(text, str) or not text.strip():
        raise SecateurError(f"{where}: 'question' must be a text, not {text!r}")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise SecateurError(f"{where}: 'choices' must be a list of texts, not {type(choices).__name__} {choices!r}")
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise SecateurError(f"{where}: a question has 2 to {len(ascii_uppercase)} choices, not {len(choices)}")
    index = answer
    if isinstance(answer, str):
        letter = answer.strip().upper()
        index = ascii_uppercase.index(letter) if len(letter) == 1 and letter in ascii_uppercase else None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        last = len(choices) - 1
        raise SecateurError(
            f"{where}: 'answer' must be an index from 0 to {last} or a letter from A to {ascii_uppercase[last]}, "
            f"not {answer!r}"
        )
    subject = record.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise SecateurError(f"{where}: 'subject' must be a text, not {subject!r}")
    return Question(text, tuple(choices), index, subject or "", record.get("split") == "dev")


def choice_accuracy(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    shots: int = 0,
    batch_size: int = 8,
    track: Track = quiet,
) -> float:
    """Measure the share of the questions that the model answers rightly.

    The answer is the letter of highest next-token logit after "Answer:"; where letters are several tokens, the one of
    highest summed log likelihood. Few-shot examples are the first `shots` dev questions of the same subject; a subject
    without any gives its first `shots` questions, which are then not scored.

    Args:
        model: A causal language model; it is put into evaluation mode meanwhile.
        tokenizer: Its tokenizer.
        questions: From `load_questions`.
        shots: Solved examples before each question.
        batch_size: Prompts per forward pass.
        track: Progress over the batches.

    Returns:
        The accuracy, in [0, 1]; a guess gets 1 / choices.

    Raises:
        SecateurError: There are too few examples, a prompt is longer than the model's context, or logits are NaN.

    Paper: Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300.
    """
    if shots < 0 or batch_size < 1:
        raise SecateurError(f"shots must be at least 0 and batch_size at least 1, not {shots} and {batch_size}")
    asked = _with_examples(questions, shots)
    if not asked:
        raise SecateurError(f"no questions are left to score: {len(questions)} given, with {shots} shots per subject")
    letters = _letter_tokens(tokenizer, max(len(question.choices) for question, _ in asked))
    prompts = [_prompt_tokens(tokenizer, prompt(question, examples)) for question, examples in asked]
    _check_length(model, prompts, max(map(len, letters)), shots)
    # One sequence per question answers all letters of one token; others are read one by one.
    single = all(len(tokens) == 1 for tokens in letters)
    rows = [
        _Row(index, letter, ids, letters[: len(question.choices)] if letter is None else [letters[letter]])
        for index, (ids, (question, _)) in enumerate(zip(prompts, asked, strict=True))
        for letter in ([None] if single else range(len(question.choices)))
    ]
    scores = [[0.0] * len(question.choices) for question, _ in asked]
    rows.sort(key=lambda row: len(row.prompt))  # batches of like lengths have little padding
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with evaluating(model), torch.inference_mode():
        for batch in track(batches, "multiple choice"):
            for row, values in zip(batch, _scored(model, batch), strict=True):
                if row.letter is None:
                    scores[row.question] = values
                else:
                    scores[row.question][row.letter] = values[0]
    right = sum(
        max(range(len(s)), key=s.__getitem__) == question.answer for s, (question, _) in zip(scores, asked, strict=True)
    )
    return right / len(asked)


@dataclass(frozen=True)
class _Row:
    """One sequence to run: the prompt, and the continuations to score after it (more than one if of one token)."""

    question: int
    letter: int | None
    prompt: list[int]
    continuations: list[list[int]]


def prompt(question: Question, examples: Sequence[Question]) -> str:
    """Write MMLU's prompt: a heading, the solved examples, the question, and "Answer:"."""
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    solved = "".join(f"{_asked(example)} {ascii_uppercase[example.answer]}\n\n" for example in examples)
    return f"The following are multiple choice questions (with answers){about}.\n\n{solved}{_asked(question)}"


def _asked(question: Question) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, question.choices, strict=False)]
    return "\n".join([question.question, *lines, "Answer:"])


def _with_examples(questions: Sequence[Question], shots: int) -> list[tuple[Question, list[Question]]]:
    """Pair each question that is scored with its few-shot examples."""
    dev: dict[str, list[Question]] = defaultdict(list)
    scored: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        (dev if question.dev else scored)[question.subject].append(question)
    pairs = []
    for subject, own in scored.items():
        examples, rest = (dev[subject], own) if dev[subject] else (own[:shots], own[shots:])
        name = f"subject {subject!r}" if subject else "the file (it names no subjects)"
        if len(examples) < shots or not rest:
            raise SecateurError(
                f"{shots} shots are too many for {name}: it has {len(dev[subject])} dev questions and {len(own)} "
                "others; lower shots, or give more dev questions"
            )
        pairs += [(question, examples[:shots]) for question in rest]
    return pairs


def _letter_tokens(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Return the tokens of " A", " B"... as they follow "Answer:"."""
    stem = tokenizer.encode("Answer:", add_special_tokens=False)
    tokens = []
    for letter in ascii_uppercase[:count]:
        # SentencePiece writes " A" on its own differently from " A" behind a word, so it is cut from the whole.
        whole = tokenizer.encode(f"Answer: {letter}", add_special_tokens=False)
        alone = whole[: len(stem)] != stem
        tokens.append(tokenizer.encode(f" {letter}", add_special_tokens=False) if alone else whole[len(stem) :])
    if not all(tokens) or len({tuple(t) for t in tokens}) < count:
        raise SecateurError(
            f"the tokenizer does not tell the letters A to {ascii_uppercase[count - 1]} apart (tokens {tokens}); "
            "multiple choice cannot be scored with it"
        )
    return tokens


def _prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a prompt with what the tokenizer puts in front of texts (BOS), but not with an EOS behind."""
    ids = list(tokenizer.encode(text, verbose=False))
    return ids[:-1] if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id] else ids


def _check_length(model: nn.Module, prompts: Sequence[Sequence[int]], extra: int, shots: int) -> None:
    config: Any = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    length = max(map(len, prompts)) + extra - 1
    if longest is not None and length > longest:
        raise SecateurError(
            f"the longest prompt has {length} tokens, but the model's context {longest}; lower shots (now {shots})"
        )


def _scored(model: nn.Module, rows: Sequence[_Row]) -> Iterator[list[float]]:
    """Yield the scores of each row's continuations: logits for single tokens, else summed log likelihoods."""
    sequences = [row.prompt + row.continuations[0][:-1] for row in rows]
    width = max(map(len, sequences))
    # Padding on the right: causal models see none of it, and positions need no shift.
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences])
    kept: Sequence[int] = range(width)
    if hasattr(model, "config"):
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in sequences])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            # Prompts are long and vocabularies large: only the positions of the answers are worth their logits.
            kept = sorted({len(row.prompt) - 1 + i for row in rows for i in range(len(row.continuations[0]))})
            inputs["logits_to_keep"] = torch.tensor(kept)
        logits = logits_of(model, inputs)
    else:
        logits = logits_of(model, ids)
    place = {position: index for index, position in enumerate(kept)}
    for row, logits_SV in zip(rows, logits, strict=True):
        start = len(row.prompt) - 1
        length = len(row.continuations[0])
        here = logits_SV[[place[position] for position in range(start, start + length)]].float()
        if bool(here.isnan().any()):
            raise SecateurError(
                f"{type(model).__name__}: its logits are NaN after the prompt of question {row.question}"
            )
        if row.letter is None:
            values = here[0, [tokens[0] for tokens in row.continuations]]
        else:
            values = log_softmax(here, dim=-1)[range(length), row.continuations[0]].sum()[None]
        yield [float(value) for value in values]
