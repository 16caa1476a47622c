"""Differences between methods with several seeds, by hand."""

import json

from benchmarks.compare_seeds import main

PICKED = {
    "mixlora-0": [0, 1, 1, 0],
    "mixlora-1": [0, 0, 1, 0],
    "lora-0": [1, 1, 1, 1],
    "lora-1": [0, 1, 0, 0],
}


def test_accuracies_and_paired_differences(tmp_path, capsys):
    for model, picked in PICKED.items():
        file = tmp_path / "predictions" / model / "openbookqa.choices.jsonl"
        file.parent.mkdir(parents=True)
        records = [{"question": n, "answer": 0, "picked": {"acc": p}} for n, p in enumerate(picked)]
        # As an interrupted evaluation leaves them: a heading, and answers in any order.
        lines = [{"model": model}, *records[::-1]]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(tmp_path), "mixlora", "lora"]) == 0
    _, mixlora, lora, difference = capsys.readouterr().out.splitlines()
    # Questions: 1, 1/2, 0, 1 of the seeds and 1/2, 0, 1/2, 1/2; seeds: 1/2 and 3/4, 0 and 3/4.
    assert mixlora.split() == ["openbookqa", "mixlora", "4", "2", "62.5", "±", "23.9", "17.7"]
    assert lora.split() == ["openbookqa", "lora", "4", "2", "37.5", "±", "12.5", "53.0"]
    # 1/2, 1/2, -1/2, 1/2: mean 1/4, standard deviation 1/2.
    assert difference.split() == ["openbookqa", "mixlora", "-", "lora", "+25.0", "±", "25.0"]


def test_missing_answers_are_named(tmp_path, capsys):
    assert main([str(tmp_path), "mixlora", "lora"]) != 0
    assert f"{tmp_path}: holds no answers of 'mixlora'" in capsys.readouterr().err
