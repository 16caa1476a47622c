"""A few rows of every task in the format of the hub, and the expected texts by hand.

`expected` has for each row the prompt before the label, the labels, the context and continuation of
each choice, and the index of the right choice.
"""

from dataclasses import dataclass, field


@dataclass
class Family:
    """Rows of a task by file in its folder, and the expected texts of the evaluated rows."""

    files: dict[str, list[dict]]
    expected: list[tuple[str, list[str], list[tuple[str, str]], int]]
    fields: dict = field(default_factory=dict)


def _after(context: str, *continuations: str) -> list[tuple[str, str]]:
    return [(context, continuation) for continuation in continuations]


ARC_ROWS = [
    {
        "id": "a",
        "question": "What melts ice?",
        "choices": {"text": ["heat", "a colder wind", "darkness"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "b",
        "question": "Which is a planet?",
        "choices": {"text": ["Mars", "the Sun", "the Moon", "a comet"], "label": list("1234")},
        "answerKey": "1",
    },
    {
        "id": "c",
        "question": "What do plants need?",
        "choices": {"text": ["salt", "sand", "light", "noise"], "label": list("ABCD")},
        "answerKey": "C",
    },
]
ARC_EXPECTED = [
    (
        (
            "Choose the option that answers the science question.\n\n"
            "Question: What melts ice?\n(A) heat\n(B) a colder wind\n(C) darkness\nAnswer:"
        ),
        ["A", "B", "C"],
        _after("Question: What melts ice?\nAnswer:", " heat", " a colder wind", " darkness"),
        0,
    ),
    (
        (
            "Choose the option that answers the science question.\n\n"
            "Question: Which is a planet?\n"
            "(A) Mars\n(B) the Sun\n(C) the Moon\n(D) a comet\nAnswer:"
        ),
        ["A", "B", "C", "D"],
        _after(
            "Question: Which is a planet?\nAnswer:", " Mars", " the Sun", " the Moon", " a comet"
        ),
        0,
    ),
    (
        (
            "Choose the option that answers the science question.\n\n"
            "Question: What do plants need?\n(A) salt\n(B) sand\n(C) light\n(D) noise\nAnswer:"
        ),
        ["A", "B", "C", "D"],
        _after("Question: What do plants need?\nAnswer:", " salt", " sand", " light", " noise"),
        2,
    ),
]

FAMILIES = {
    "arc_easy": Family({"ARC-Easy/test-00000-of-00001.parquet": ARC_ROWS}, ARC_EXPECTED),
    "arc_challenge": Family({"test.jsonl": ARC_ROWS}, ARC_EXPECTED),
    "boolq": Family(
        {
            "validation.jsonl": [
                {"question": "is water wet", "answer": True},
                {"question": "can cows fly?", "answer": False, "passage": "Cows walk."},
            ],
            "train.jsonl": [{"question": "never read", "answer": None}],
        },
        [
            (
                (
                    "Say whether the answer to the question is true or false.\n\n"
                    "Question: is water wet?\nAnswer:"
                ),
                ["true", "false"],
                _after("Question: is water wet?\nAnswer:", " yes", " no"),
                0,
            ),
            (
                (
                    "Say whether the answer to the question is true or false.\n\n"
                    "Question: can cows fly?\nAnswer:"
                ),
                ["true", "false"],
                _after("Question: can cows fly?\nAnswer:", " yes", " no"),
                1,
            ),
        ],
    ),
    "openbookqa": Family(
        {
            "test.jsonl": [
                {
                    "question_stem": "The sun is responsible for",
                    "choices": {
                        "text": ["puppies", "plants growing", "rust", "noise"],
                        "label": list("ABCD"),
                    },
                    "answerKey": "B",
                }
            ]
        },
        [
            (
                (
                    "Choose the option that answers the question or completes the sentence.\n\n"
                    "Question: The sun is responsible for\n"
                    "(A) puppies\n(B) plants growing\n(C) rust\n(D) noise\nAnswer:"
                ),
                ["A", "B", "C", "D"],
                _after(
                    "The sun is responsible for", " puppies", " plants growing", " rust", " noise"
                ),
                1,
            )
        ],
    ),
    "piqa": Family(
        {
            "validation.json": [
                {
                    "goal": "dry a towel",
                    "sol1": "hang it up",
                    "sol2": "put it in water",
                    "label": 0,
                },
                {"goal": "open a jar", "sol1": "shout", "sol2": "turn the lid", "label": 1},
            ]
        },
        [
            (
                (
                    "Choose the solution that reaches the goal.\n\n"
                    "Goal: dry a towel\n(A) hang it up\n(B) put it in water\nAnswer:"
                ),
                ["A", "B"],
                _after("Goal: dry a towel\nSolution:", " hang it up", " put it in water"),
                0,
            ),
            (
                (
                    "Choose the solution that reaches the goal.\n\n"
                    "Goal: open a jar\n(A) shout\n(B) turn the lid\nAnswer:"
                ),
                ["A", "B"],
                _after("Goal: open a jar\nSolution:", " shout", " turn the lid"),
                1,
            ),
        ],
    ),
    "siqa": Family(
        {
            "validation.jsonl": [
                {
                    "context": "Kai won the race.",
                    "question": "How does Kai feel?",
                    "answerA": "sad",
                    "answerB": "like crying",
                    "answerC": "proud",
                    "label": "3",
                }
            ]
        },
        [
            (
                (
                    "Choose the option that answers the question about the situation.\n\n"
                    "Situation: Kai won the race.\nQuestion: How does Kai feel?\n"
                    "(A) sad\n(B) like crying\n(C) proud\nAnswer:"
                ),
                ["A", "B", "C"],
                _after(
                    "Situation: Kai won the race.\nQuestion: How does Kai feel?\nAnswer:",
                    " sad",
                    " like crying",
                    " proud",
                ),
                2,
            )
        ],
    ),
    "hellaswag": Family(
        {
            "validation.jsonl": [
                {
                    "activity_label": "Baking",
                    "ctx": "[header] Bread [title] Mix it. [step] Then",
                    "endings": ["wait.", "[step] bake it.", "sing.", "eat sand."],
                    "label": "1",
                }
            ]
        },
        [
            (
                # "[title]" with the blank before it becomes a full stop, other marks go.
                (
                    "Choose the ending that the text goes on with.\n\n"
                    "Text: Baking: Bread. Mix it. Then\n"
                    "(A) wait.\n(B) bake it.\n(C) sing.\n(D) eat sand.\nAnswer:"
                ),
                ["A", "B", "C", "D"],
                _after(
                    "Baking: Bread. Mix it. Then", " wait.", " bake it.", " sing.", " eat sand."
                ),
                1,
            )
        ],
    ),
    "winogrande": Family(
        {
            "validation.jsonl": [
                {
                    "sentence": "Sam thanked Lee because _ had helped.",
                    "option1": "Sam",
                    "option2": "Lee",
                    "answer": "2",
                }
            ]
        },
        [
            (
                (
                    "Choose the option that fills the blank, written as _, in the sentence.\n\n"
                    "Sentence: Sam thanked Lee because _ had helped.\n(A) Sam\n(B) Lee\nAnswer:"
                ),
                ["A", "B"],
                [
                    ("Sam thanked Lee because Sam", " had helped."),
                    ("Sam thanked Lee because Lee", " had helped."),
                ],
                1,
            )
        ],
    ),
    "csqa": Family(
        {
            "validation.jsonl": [
                {
                    "question": "Where is a door?",
                    "choices": {
                        "text": ["house", "sea", "sky", "soup", "song"],
                        "label": list("ABCDE"),
                    },
                    "answerKey": "A",
                }
            ]
        },
        [
            (
                (
                    "Use common sense to choose the option that answers the question.\n\n"
                    "Question: Where is a door?\n"
                    "(A) house\n(B) sea\n(C) sky\n(D) soup\n(E) song\nAnswer:"
                ),
                ["A", "B", "C", "D", "E"],
                _after(
                    "Question: Where is a door?\nAnswer:",
                    " house",
                    " sea",
                    " sky",
                    " soup",
                    " song",
                ),
                0,
            )
        ],
    ),
    "pubmedqa": Family(
        {
            "pqa_labeled/train-00000-of-00001.parquet": [
                {
                    "question": "Does tea help?",
                    "context": {
                        "contexts": ["We gave tea.", "Some got well."],
                        "labels": ["METHODS", "RESULTS"],
                    },
                    "final_decision": "maybe",
                }
            ]
        },
        [
            (
                (
                    "Answer the medical question by the abstract: yes, no or maybe.\n\n"
                    "METHODS: We gave tea.\nRESULTS: Some got well.\n\n"
                    "Question: Does tea help?\nAnswer:"
                ),
                ["yes", "no", "maybe"],
                _after(
                    "METHODS: We gave tea.\nRESULTS: Some got well.\n\n"
                    "Question: Does tea help?\nAnswer:",
                    " yes",
                    " no",
                    " maybe",
                ),
                2,
            )
        ],
    ),
    "mmlu": Family(
        {
            "all/test-00000-of-00001.parquet": [
                {
                    "question": "2 + 2?",
                    "subject": "easy_maths",
                    "choices": ["3", "4", "5", "6"],
                    "answer": 1,
                },
                {
                    "question": "Who ruled?",
                    "subject": "history",
                    "choices": ["Ann", "Bob", "a king", "nobody"],
                    "answer": 2,
                },
            ],
            "all/dev-00000-of-00001.parquet": [
                {
                    "question": f"{what} {number}?",
                    "subject": subject,
                    "choices": ["w", "x", "y", "z"],
                    "answer": number,
                }
                for number in range(3)
                for what, subject in (("When", "history"), ("1 +", "easy_maths"))
            ],
        },
        [
            (
                (
                    "Choose the right option for each question about easy maths.\n\n"
                    "Question: 1 + 0?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer: A\n\n"
                    "Question: 1 + 1?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer: B\n\n"
                    "Question: 2 + 2?\n(A) 3\n(B) 4\n(C) 5\n(D) 6\nAnswer:"
                ),
                ["A", "B", "C", "D"],
                _after(
                    "Question: 1 + 0?\nAnswer: w\n\nQuestion: 1 + 1?\nAnswer: x\n\n"
                    "Question: 2 + 2?\nAnswer:",
                    " 3",
                    " 4",
                    " 5",
                    " 6",
                ),
                1,
            ),
            (
                (
                    "Choose the right option for each question about history.\n\n"
                    "Question: When 0?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer: A\n\n"
                    "Question: When 1?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer: B\n\n"
                    "Question: Who ruled?\n(A) Ann\n(B) Bob\n(C) a king\n(D) nobody\nAnswer:"
                ),
                ["A", "B", "C", "D"],
                _after(
                    "Question: When 0?\nAnswer: w\n\nQuestion: When 1?\nAnswer: x\n\n"
                    "Question: Who ruled?\nAnswer:",
                    " Ann",
                    " Bob",
                    " a king",
                    " nobody",
                ),
                2,
            ),
        ],
        {"shots": 2},
    ),
}
