"""Endless grade-school word problems with worked solutions, as token batches of one fixed shape.

The problems are `gsm_symbolic` of reasoning-gym: one hundred templates of the GSM8K benchmark with names and numbers
drawn anew. Held-out problems therefore share templates, but no question, with the training problems: they
measure whether a way of solving was learnt, not whether it carries over to unseen kinds of problem.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import reasoning_gym
import torch
from transformers import PreTrainedTokenizerBase

# Problem i of a data set with seed s is drawn by a generator seeded with s + i, so data sets of neighbouring seeds
# share generators. Each stream of problems gets a range of its own: the first is held out, all others train.
PROBLEMS_PER_STREAM = 100_000
HELD_OUT_PROBLEMS = 1_000

IGNORED_LABEL = -100  # what the loss of transformers leaves out

Batch = dict[str, torch.Tensor]


class Problem(NamedTuple):
    question: str
    solution: str
    """Some lines of reasoning, then "#### " and the answer."""
    answer: str
    """The number alone, for example "288"."""


def training_batches(
    tokenizer: PreTrainedTokenizerBase, count: int, batch_size: int, max_tokens: int, seed: int
) -> list[Batch]:
    """Returns `count` batches of problems, none of which is among the held-out ones; the same for the same seed.

    Each batch holds `input_ids`, `attention_mask` and `labels`, all int64 of shape (batch_size, max_tokens).

    The loss counts the tokens of the solution and the end-of-turn token after it, and no others. The question is
    given at inference, so learning to write questions would spend the adapter on what nobody asks of it. The
    solution has its reasoning, which reasoning-gym keeps in the metadata of each problem: a bare answer would be
    three or four tokens of loss per problem, and a small model cannot calculate without writing.

    All batches have one shape, so that a compiled training step is compiled once. Problems that do not fit
    are skipped whole: a solution cut off before its answer teaches to stop halfway.

    Raises:
        ValueError: `seed` is negative, or `max_tokens` so small that not enough problems fit.
    """
    if seed < 0:
        raise ValueError(f"seed: is {seed}, expected 0 or more.")
    # Short templates have few variants, so about one question in a thousand comes up in both streams.
    held_out = {problem.question for problem in held_out_problems(HELD_OUT_PROBLEMS)}
    problems = (problem for problem in _problems(seed + 1) if problem.question not in held_out)
    return _batches(tokenizer, problems, count, batch_size, max_tokens)


def held_out_batches(tokenizer: PreTrainedTokenizerBase, count: int, batch_size: int, max_tokens: int) -> list[Batch]:
    """Returns `count` batches in the form of `training_batches`, the same for every run whatever its training seed.

    Raises:
        ValueError: more problems are asked for than are held out, or than fit into `max_tokens`.
    """
    return _batches(tokenizer, iter(held_out_problems(HELD_OUT_PROBLEMS)), count, batch_size, max_tokens)


def held_out_problems(count: int) -> list[Problem]:
    """Returns the first `count` held-out problems as text, at most `HELD_OUT_PROBLEMS`.

    Raises:
        ValueError: `count` is negative or over `HELD_OUT_PROBLEMS`.
    """
    if not 0 <= count <= HELD_OUT_PROBLEMS:
        raise ValueError(f"count: is {count}, expected 0 to {HELD_OUT_PROBLEMS}.")
    return list(islice(_problems(0), count))


def prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Returns the text after which the model is to write its solution, special tokens included."""
    if tokenizer.chat_template is None:  # a base model
        return f"Question: {question}\nAnswer:\n"
    return str(tokenizer.apply_chat_template(_turns(question), tokenize=False, add_generation_prompt=True))


def _problems(stream: int) -> Iterator[Problem]:
    first = stream * PROBLEMS_PER_STREAM
    for entry in reasoning_gym.create_dataset("gsm_symbolic", size=PROBLEMS_PER_STREAM, seed=first):
        # Some solutions end in "#### 15.0" where the answer is "15": write the answer one way.
        reasoning, _, _ = entry["metadata"]["answer_cot"].rpartition("####")
        yield Problem(entry["question"], f"{reasoning.strip()}\n#### {entry['answer']}", entry["answer"])


def _turns(question: str, *solution: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in solution)]


def _token_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[list[int], list[int]]:
    """Returns the tokens of prompt and solution, tokenized apart: at inference the prompt stands alone as well."""
    before = prompt(tokenizer, problem.question)
    after = f"{problem.solution}{tokenizer.eos_token}"
    if tokenizer.chat_template is not None:
        whole = str(tokenizer.apply_chat_template(_turns(problem.question, problem.solution), tokenize=False))
        # A template that rewrites earlier turns (few do) is not a prompt plus an answer; then the line above serves.
        if whole.startswith(before):
            after = whole[len(before) :]
    return (
        tokenizer(before, add_special_tokens=False)["input_ids"],
        tokenizer(after, add_special_tokens=False)["input_ids"],
    )


def _batches(
    tokenizer: PreTrainedTokenizerBase, problems: Iterator[Problem], count: int, batch_size: int, max_tokens: int
) -> list[Batch]:
    wanted = count * batch_size
    rows: list[tuple[list[int], list[int]]] = []
    shortest = 0
    for seen, problem in enumerate(problems):
        # Fewer than one in a thousand fitting is a mistake to report now, not a search to go on with.
        if len(rows) == wanted or (seen == 1_000 and not rows):
            break
        row = _token_ids(tokenizer, problem)
        length = sum(map(len, row))
        shortest = min(shortest or length, length)
        if length <= max_tokens:
            rows.append(row)
    if len(rows) < wanted:
        raise ValueError(
            f"max_tokens: is {max_tokens}, and only {len(rows)} of the {wanted} problems asked for fit; "
            f"the shortest has {shortest} tokens. Raise max_tokens or ask for fewer."
        )
    return [_pad(tokenizer, rows[start : start + batch_size], max_tokens) for start in range(0, wanted, batch_size)]


def _pad(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[list[int], list[int]]], max_tokens: int) -> Batch:
    """Pads on the right. The mask is made from lengths: the padding token is often the end-of-turn token as well."""
    shape = (len(rows), max_tokens)
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL)
    for row, (before, after) in enumerate(rows):
        length = len(before) + len(after)
        input_ids[row, :length] = torch.tensor(before + after)
        attention_mask[row, :length] = 1
        labels[row, len(before) : length] = torch.tensor(after)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
