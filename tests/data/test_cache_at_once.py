"""Processes that fill one empty cache of tokenized data at the same time."""

import os

from tiny_run import fork_server

from moe_jax.data.tokenized_source import tokenize_source

PROCESSES, ROUNDS, ROWS = 3, 3, 3000


def _tokenize(barrier, results, source, configs, tokenizer):
    for config in configs:
        barrier.wait(300)
        made = tokenize_source("only", source, config, tokenizer)
        results.put((os.getpid(), config.cache_dir, made.digest, len(made.kept)))


def test_processes_fill_one_cache_at_once(completions, data_config, word_tokenizer, tmp_path):
    words = ["the", "fox", "sees", "a", "dog"]
    rows = [(words[i % 5], " ".join(words[: 1 + i % 4])) for i in range(ROWS)]
    source = completions(rows)
    alone = tokenize_source("only", source, data_config(source), word_tokenizer)
    configs = [
        data_config(source, cache_dir=str(tmp_path / f"fresh_{number}")) for number in range(ROUNDS)
    ]
    context = fork_server()
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    arguments = (barrier, results, source, configs, word_tokenizer)
    processes = [context.Process(target=_tokenize, args=arguments) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in range(PROCESSES * ROUNDS)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {(digest, kept) for _, _, digest, kept in found} == {(alone.digest, ROWS)}
    for config in configs:  # what they left is read by a later process
        again = tokenize_source("only", source, config, word_tokenizer)
        assert again.digest == alone.digest
