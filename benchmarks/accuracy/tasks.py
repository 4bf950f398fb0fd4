"""What is measured on a model, problem by problem or window by window, so that methods compare in pairs.

Calibration and training read training problems only. Word problems that are held out, Shakespeare and MMLU's questions
are read for measuring alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy import texts
from benchmarks.accuracy.texts import LETTERS
from workloads import word_problems
from workloads.word_problems import IGNORED_LABEL, Batch

Measures = dict[str, list[float]]
"""Each measure's value per problem, window, question or batch."""

ANSWER_TOKENS = 160
CALIBRATION_BATCHES = 8
GRADIENT_BATCHES = 2
VALIDATION_SEED = 2**16
"""Of training problems that no training of a smaller seed takes."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; what stands in the output folder beside the results."""

    max_tokens: int
    batch_size: int
    steps: int
    words: int
    windows: int
    choices: int


@dataclass
class Material:
    """All batches, made on first use; the same for every method.

    Attributes:
        is_validation: whether `words` are validation problems in place of held-out ones, for choices to be made by.
        words: word problems to measure the loss on. shakespeare: windows of the plays. questions: of MMLU, with the
            place of the last token of each and its right letter.
    """

    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes
    is_validation: bool = False
    _by_seed: dict[int, list[Batch]] = field(default_factory=dict)

    def _shape(self) -> tuple[int, int]:
        return self.sizes.batch_size, self.sizes.max_tokens

    @cached_property
    def words(self) -> list[Batch]:
        count = math.ceil(self.sizes.words / self.sizes.batch_size)
        if self.is_validation:
            return word_problems.training_batches(self.tokenizer, count, *self._shape(), seed=VALIDATION_SEED)
        return word_problems.held_out_batches(self.tokenizer, count, *self._shape())

    def calibration(self, seed: int) -> list[Batch]:
        """Training problems that no training step takes."""
        return self._training(seed)[:CALIBRATION_BATCHES]

    def training(self, seed: int) -> list[Batch]:
        return self._training(seed)[CALIBRATION_BATCHES:]

    def _training(self, seed: int) -> list[Batch]:
        if seed not in self._by_seed:
            count = CALIBRATION_BATCHES + self.sizes.steps
            self._by_seed[seed] = word_problems.training_batches(self.tokenizer, count, *self._shape(), seed=seed)
        return self._by_seed[seed]

    @cached_property
    def shakespeare(self) -> list[Batch]:
        rows, tokens = self._shape()
        windows = text_windows(self.tokenizer, texts.plays(), math.ceil(self.sizes.windows / rows) * rows, tokens)
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids in windows.split(rows)]

    @cached_property
    def questions(self) -> list[tuple[Batch, Tensor]]:
        """Batches of questions of at most half of `max_tokens`, and the number of the right letter of each."""
        return question_batches(
            self.tokenizer,
            texts.questions(),
            math.ceil(self.sizes.choices / (2 * self.sizes.batch_size)),
            2 * self.sizes.batch_size,
            self.sizes.max_tokens // 2,
        )


def text_windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], count: int, tokens: int) -> Tensor:
    """Returns `count` windows of text as token ids, (count, tokens): evenly spaced in each text, the texts in turn.

    Raises:
        ValueError: a text is shorter than its windows.
    """
    windows: list[Tensor] = []
    for number, text in enumerate(texts):
        wanted = len(range(number, count, len(texts)))
        # Four characters a token and more: no need to tokenize whole plays.
        stride = len(text) // max(1, wanted)
        for start in range(0, wanted * stride, max(1, stride)):
            ids = tokenizer(text[start : start + 16 * tokens], add_special_tokens=False)["input_ids"][:tokens]
            if len(ids) < tokens:
                raise ValueError(f"windows: is {count}, expected fewer: a text has no room for {wanted} of them.")
            windows.append(torch.tensor(ids))
    return torch.stack(windows)


def question_batches(
    tokenizer: PreTrainedTokenizerBase,
    questions: list[texts.Question],
    count: int,
    batch_size: int,
    max_tokens: int,
) -> list[tuple[Batch, Tensor]]:
    """Returns batches of `batch_size` questions padded to `max_tokens` and the numbers of the right letters.

    Questions are taken across all subjects; those that are too long are left out.

    Raises:
        ValueError: not enough of them fit.
    """
    by_turns = sorted(questions, key=lambda q: [r for r in questions if r.subject == q.subject].index(q))
    rows: list[tuple[list[int], int]] = []
    for question in by_turns:
        text = f"The following is a multiple choice question about {question.subject}.\n\n{question.text}\nAnswer:"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= max_tokens:
            rows.append((ids, LETTERS.index(question.answer)))
    if len(rows) < count * batch_size:
        raise ValueError(
            f"choices: {count * batch_size} questions are asked for and {len(rows)} have at most {max_tokens} tokens, "
            "expected as many. Ask for fewer or raise max_tokens."
        )
    batches = []
    for start in range(0, count * batch_size, batch_size):
        chosen = rows[start : start + batch_size]
        ids = torch.full((batch_size, max_tokens), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        batches.append(({"input_ids": ids, "attention_mask": mask}, torch.tensor([answer for _, answer in chosen])))
    return batches


# --- measuring ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(model: nn.Module, batches: list[Batch]) -> Measures:
    """Returns the mean loss of each row's labelled tokens, in nats per token."""
    found: list[float] = []
    for batch in batches:
        tokens = batch["input_ids"].shape[1]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        # Prompt tuning puts positions of its own in front.
        logits, labels = logits[:, -tokens:-1].float(), batch["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
        found += (each.sum(dim=1) / (labels != IGNORED_LABEL).sum(dim=1)).tolist()
    return {"loss": found}


@torch.no_grad()
def choices(model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: list[tuple[Batch, Tensor]]) -> Measures:
    """Returns for each question the loss over its four letters, the letter chosen, and whether it is the right one."""
    letters = torch.tensor([tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS])
    found: Measures = {"loss": [], "choice": [], "correct": []}
    for batch, right in questions:
        logits = model(**batch, use_cache=False).logits[:, -batch["input_ids"].shape[1] :]
        last = batch["attention_mask"].sum(dim=1) - 1
        scores = logits[torch.arange(len(last)), last][:, letters].float()
        found["loss"] += F.cross_entropy(scores, right, reduction="none").tolist()
        found["choice"] += scores.argmax(dim=1).double().tolist()
        found["correct"] += (scores.argmax(dim=1) == right).double().tolist()
    return found


@torch.no_grad()
def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, batch_size: int) -> Measures:
    """Returns whether the greedy answer to each of `count` held-out problems is the right number."""
    found: list[float] = []
    problems = iter(word_problems.held_out_problems(count))
    while chosen := list(itertools.islice(problems, batch_size)):
        texts = [word_problems.prompt(tokenizer, problem.question) for problem in chosen]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        written = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [float(final_number(text) == problem.answer) for text, problem in zip(written, chosen, strict=True)]
    return {"correct": found}


def final_number(text: str) -> str:
    """Returns what a solution gives as its answer: the word after its last `####`; empty if it has none."""
    _, mark, answer = text.rpartition("####")
    return answer.split()[0].replace(",", "") if mark and answer.split() else ""


def gradients(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    """Returns the gradient of all trainable parameters for each batch, as one vector, in training mode."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    model.train()
    for batch in batches:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trainable]))
    model.zero_grad()
    model.eval()
    return found


def gradient_distance(found: list[Tensor], expected: list[Tensor]) -> Measures:
    """Returns the cosine and the relative error of each gradient."""
    pairs = list(zip(found, expected, strict=True))
    return {
        "cosine": [torch.cosine_similarity(a.double(), b.double(), dim=0).item() for a, b in pairs],
        "relative error": [((a - b).norm() / b.norm()).item() for a, b in pairs],
    }


def train(
    model: nn.Module,
    batches: list[Batch],
    learning_rate: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> Measures:
    """Trains the adapter, a batch a step: AdamW, warm-up and decay as in `finetune.py`; returns each step's loss."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
    warm_up = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1))
    )
    found: list[float] = []
    model.train()
    for step, batch in enumerate(tqdm(batches, desc="training", unit="step", leave=False, position=1)):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
        after_step(step)
    model.eval()
    return {"loss": found}
