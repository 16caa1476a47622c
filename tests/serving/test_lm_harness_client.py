"""lm-evaluation-harness as a client of the server gives what `HarnessModel` gives."""

import lm_eval
import numpy as np
import pytest
from evaluation.conftest import write_rows
from evaluation.test_lm_harness import GENERATING, ROWS, TASK
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from tolerances import FLOAT32_LOGITS

from moe_jax.evaluation.lm_harness import HarnessModel


@pytest.fixture(scope="module")
def results(served, tmp_path_factory):
    """Results of both models on both tasks, with all samples."""
    tasks = tmp_path_factory.mktemp("tasks")
    data = write_rows(tasks / "rows.jsonl", ROWS)
    (tasks / "quiz.yaml").write_text(TASK.format(data=data))
    until = '["e", "\\n"]'
    (tasks / "words.yaml").write_text(GENERATING.format(data=data, until=until))
    client = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model="mix",
        tokenizer=str(served.folder),
        tokenizer_backend="huggingface",
        add_bos_token=True,
        max_length=96,
        num_concurrent=3,
        batch_size=2,
    )
    ours = HarnessModel(served.folder, served.adapters["mix"], batch_size=5)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["local_quiz", "local_words"]
    options = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0}
    return [lm_eval.simple_evaluate(model=model, **options) for model in (client, ours)]


def test_accuracies_are_equal_example_by_example(results):
    through_server, direct = results
    assert through_server["results"]["local_quiz"] == direct["results"]["local_quiz"]
    pairs = zip(*(r["samples"]["local_quiz"] for r in results), strict=True)
    for one, two in pairs:
        assert one["doc"] == two["doc"]
        actual, expected = (np.array(s["filtered_resps"], float) for s in (one, two))
        # Up to a dozen tokens' logits are in one sum.
        np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=0, atol=12 * FLOAT32_LOGITS)
        np.testing.assert_array_equal(actual[:, 1], expected[:, 1])
        assert one["acc"] == two["acc"]


def test_answers_are_equal_example_by_example(results):
    """Up to the space at the beginning, which `HarnessModel` leaves out as transformers does."""
    answers = [
        [sample["filtered_resps"][0].removeprefix(" ") for sample in r["samples"]["local_words"]]
        for r in results
    ]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
