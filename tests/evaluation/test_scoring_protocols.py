"""Token sequences of labels and choices with several kinds of tokenizers, by hand."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_jax.errors import DataError
from moe_jax.evaluation.packed_sequences import ScoredSequence
from moe_jax.evaluation.scoring_protocols import SCORING_PROTOCOLS
from moe_jax.tasks.task import Choice, Question, with_shots


def words(*vocabulary: str, split: str = "word") -> PreTrainedTokenizerFast:
    """One id per word (or character, `_` for a space), starting at 3; texts start with `<s>`, 1."""
    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *vocabulary])}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    if split == "word":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.normalizer = tokenizers.normalizers.Replace(" ", "_")
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_question(prompt: str, labels: tuple[str, ...]) -> Question:
    choices = tuple(Choice(prompt, f" {label}") for label in labels)
    return Question("rows: line 1", "", prompt, labels, choices, 0)


def label_sequences(tokenizer, *labels, prompt="q"):
    ((_, sequences),) = SCORING_PROTOCOLS["labels"].prepare(
        "mine", [make_question(prompt, labels)], tokenizer
    )
    return sequences


def test_labels_of_one_token_are_compared_at_the_end_of_the_prompt():
    #          3    4    5
    sequences = label_sequences(words("q", "A", "B"), "A", "B")
    assert sequences == (
        ScoredSequence(tokens=(1, 3), targets=(4,)),
        ScoredSequence(tokens=(1, 3), targets=(5,)),
    )


def test_shared_prefix_of_labels_belongs_to_the_prompt():
    #                          3    4    5    6
    sequences = label_sequences(words("q", "_", "A", "B", split="characters"), "A", "B")
    assert sequences == (
        ScoredSequence(tokens=(1, 3, 4), targets=(5,)),
        ScoredSequence(tokens=(1, 3, 4), targets=(6,)),
    )


def test_labels_of_several_tokens_are_compared_as_a_whole():
    #                        3    4    5    6    7    8
    tokenizer = words("q", "_", "n", "o", "y", "e", split="characters")
    no, yes = label_sequences(tokenizer, "no", "ye")
    assert no == ScoredSequence(tokens=(1, 3, 4, 5), targets=(5, 6))
    assert yes == ScoredSequence(tokens=(1, 3, 4, 7), targets=(7, 8))


@pytest.mark.parametrize(
    ("vocabulary", "labels", "message"),
    [
        ("q_may", ("ma", "may"), r"'mine': .* does not distinguish the labels 'ma' and 'may'"),
        ("q_A", ("A", "B"), "'mine': .* has no tokens for the label 'B'; .* 'choices' alone"),
    ],
)
def test_indistinguishable_labels(vocabulary, labels, message):
    tokenizer = words(*vocabulary, split="characters")
    tokenizer.name_or_path = "models/mine"
    with pytest.raises(DataError, match=message) as error:
        label_sequences(tokenizer, *labels)
    assert "models/mine" in str(error.value)


def test_choices_are_scored_token_by_token():
    #                 3    4    5    6
    tokenizer = words("q", "red", "dark", "blue")
    questions = [make_question("q q", ("red", "dark blue"))]
    ((_, sequences),) = SCORING_PROTOCOLS["choices"].prepare("mine", questions, tokenizer)
    assert sequences == (
        ScoredSequence(tokens=(1, 3, 3), targets=(4,)),
        ScoredSequence(tokens=(1, 3, 3, 5), targets=(5, 6)),
    )


def test_task_without_labels_is_scored_by_choices_only():
    tokenizer = words("q", "red", "blue")
    questions = [make_question("q", ("red", "blue"))._replace(labels=())]
    assert SCORING_PROTOCOLS["labels"].prepare("mine", questions, tokenizer) == []
    assert len(SCORING_PROTOCOLS["choices"].prepare("mine", questions, tokenizer)) == 1


def test_choice_without_tokens_is_rejected():
    questions = [make_question("q", ("red", "\N{ZERO WIDTH SPACE}"))]
    tokenizer = words("q", "red")
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    with pytest.raises(DataError, match="'mine': rows: line 1: no token of the choice"):
        SCORING_PROTOCOLS["choices"].prepare("mine", questions, tokenizer)


def test_picks_of_the_measures():
    question = make_question("q", ("red", "dark blue"))
    assert SCORING_PROTOCOLS["labels"].pick(question, [-2.0, -1.0]) == {"label_acc": 1}
    # 3 and 9 characters: -2 / 3 = -0.67 and -3 / 9 = -0.33.
    assert SCORING_PROTOCOLS["choices"].pick(question, [-2.0, -3.0]) == {"acc": 0, "acc_norm": 1}


def test_shots_have_answers_in_the_format_of_the_question():
    shot = Question("", "P: ", "a?", ("A", "B"), (Choice("c", " x"), Choice("d", " y")), 1)
    question = Question("", "P: ", "b?", ("A", "B"), (Choice("e", " x"), Choice("f", " y")), 0)
    with_answers = with_shots(question, [shot, shot])
    assert with_answers.preface + with_answers.prompt == "P: a? B\n\na? B\n\nb?"
    assert with_answers.choices == (
        Choice("d y\n\nd y\n\ne", " x"),
        Choice("d y\n\nd y\n\nf", " y"),
    )


def test_truncation_keeps_lead_and_targets():
    item = ScoredSequence.continuation([1, 2, 3, 4], [5, 6])
    assert item.tokens == (1, 2, 3, 4, 5)
    assert item.shortened(5, lead=1) == item
    assert item.shortened(4, lead=1).tokens == (1, 3, 4, 5)
    assert item.shortened(3, lead=1).tokens == (1, 4, 5)
    # 4 is what 5 is predicted from.
    with pytest.raises(ValueError, match="too long"):
        item.shortened(2, lead=1)
