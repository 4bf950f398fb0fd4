"""Word problems as batches: the same for a seed, none of them held out, masked as the loss counts."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workloads import word_problems

MAX_TOKENS = 256


def questions(batches: list[word_problems.Batch]) -> set[tuple[int, ...]]:
    """The tokens of each question: attended and not counted in the loss."""
    return {
        tuple(ids[(labels == word_problems.IGNORED_LABEL) & mask.bool()].tolist())
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    }


def fits(tokenizer: PreTrainedTokenizerBase, problem: word_problems.Problem) -> bool:
    text = word_problems.prompt(tokenizer, problem.question) + problem.solution + "<|im_end|>\n"
    return len(tokenizer(text)["input_ids"]) <= MAX_TOKENS


def test_the_same_seed_gives_the_same_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    one, same, other = (word_problems.training_batches(tokenizer, 4, 8, MAX_TOKENS, seed) for seed in (0, 0, 1))
    for first, second in zip(one, same, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert questions(one).isdisjoint(questions(other))


def test_no_training_question_is_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    # In 3000 problems about five would be: the short templates have few variants.
    held_out = questions(word_problems.held_out_batches(tokenizer, 1, 800, 400))
    trained = questions(word_problems.training_batches(tokenizer, 1, 3000, 400, seed=0))
    assert held_out.isdisjoint(trained)


def test_batches_have_one_shape_and_mask_their_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    for batch in word_problems.training_batches(tokenizer, 5, 3, MAX_TOKENS, seed=0):
        for tensor in batch.values():
            assert tensor.shape == (3, MAX_TOKENS)
            assert tensor.dtype == torch.int64
        attended = batch["attention_mask"].bool()
        assert (batch["input_ids"][~attended] == tokenizer.pad_token_id).all()
        assert (batch["labels"][~attended] == word_problems.IGNORED_LABEL).all()


def test_the_loss_counts_the_solution_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    problem = next(p for p in word_problems.held_out_problems(50) if fits(tokenizer, p))
    (batch,) = word_problems.held_out_batches(tokenizer, 1, 1, MAX_TOKENS)
    counted = batch["labels"] != word_problems.IGNORED_LABEL
    assert tokenizer.decode(batch["labels"][counted]) == f"{problem.solution}<|im_end|>\n"
    before = batch["input_ids"][~counted & batch["attention_mask"].bool()]
    assert tokenizer.decode(before) == word_problems.prompt(tokenizer, problem.question)


def test_a_base_model_needs_no_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    base = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    base.pad_token = base.eos_token
    (batch,) = word_problems.held_out_batches(base, 1, 1, MAX_TOKENS)
    text = base.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert text.startswith("Question: ")
    assert text.endswith("<|im_end|>")


def test_problems_carry_their_answers() -> None:
    problems = word_problems.held_out_problems(100)
    assert problems[:3] == word_problems.held_out_problems(3)
    for problem in problems:
        assert problem.solution.endswith(f"\n#### {problem.answer}")


def test_bounds(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="count: is 1001, expected 0 to 1000"):
        word_problems.held_out_problems(1001)
    with pytest.raises(ValueError, match="seed: is -1, expected 0 or more"):
        word_problems.training_batches(tokenizer, 1, 1, MAX_TOKENS, seed=-1)
    with pytest.raises(ValueError, match="max_tokens: is 40, and only 0 of the 2 problems asked for fit"):
        word_problems.training_batches(tokenizer, 1, 2, 40, seed=0)
